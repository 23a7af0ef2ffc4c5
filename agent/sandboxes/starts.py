"""How the life of a sandbox begins, or goes on under a new agent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uuid import UUID

    from agent.net.ledger import Slot
    from agent.sandboxes.made import Golden
    from agent.vmm.driver import Vm


@dataclass(frozen=True, slots=True)
class Start:
    """How a new sandbox begins. `snapshot`: what it must start from. `golden`: what it may start from, or boot.

    `envs`: the defaults of its calls; None: those that its snapshot has.
    """

    envs: dict[str, str] | None = field(default_factory=dict)
    snapshot: UUID | None = None
    golden: Golden | None = None


@dataclass(frozen=True, slots=True)
class Adopted:
    """How the life of a sandbox goes on whose VM an earlier agent started."""

    vm: Vm
    slot: Slot


@dataclass(frozen=True, slots=True)
class Rested:
    """How that of a paused one does."""
