"""The answers of the checks, and how they are shown."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One question put to the machine.

    `ok` None is information only: good to know, nothing to fix. Where `ok` is False, `remedy` says what to do, as a
    command where there is one; without what is `essential` no sandbox can run here, the rest only costs something.
    """

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""
    essential: bool = True

    @property
    def failed(self) -> bool:
        """Whether something essential is missing."""
        return self.ok is False and self.essential


def exit_code(checks: Sequence[Check]) -> int:
    """0, or 1 when something essential is missing."""
    return 1 if any(check.failed for check in checks) else 0


def render(checks: Sequence[Check], *, json: bool) -> str:
    """The report: lines for a terminal, or a JSON object `{ok, checks: [{name, ok, essential, detail, remedy}]}`."""
    if json:
        found = [dataclasses.asdict(check) for check in checks]
        return jsonlib.dumps({"ok": exit_code(checks) == 0, "checks": found}, indent=2)
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{_word(check):<7} {check.name:<{width}}  {check.detail}")
        if check.ok is False:
            lines.append(f"{'':<7} {'':<{width}}  fix: {check.remedy}")
    return "\n".join([*lines, "", _verdict(checks)])


def _word(check: Check) -> str:
    match check.ok:
        case True:
            return "ok"
        case None:
            return "info"
        case False:
            return "MISSING" if check.essential else "warn"


def _verdict(checks: Sequence[Check]) -> str:
    missing = [check.name for check in checks if check.failed]
    if missing:
        return f"This machine cannot run sandboxes yet: {', '.join(missing)}."
    if any(check.ok is False for check in checks):
        return "This machine can run sandboxes, with the restrictions above."
    return "This machine can run sandboxes."
