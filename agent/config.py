"""Settings of the agent, from `CAPSULE_AGENT_…` variables or `.env`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from agent.actor.settings import environment, load_settings
from agent.enrol.heartbeat import INTERVAL
from agent.snapshots.header import COMPACT_AT

PREFIX = "CAPSULE_AGENT_"
RESERVED_MEMORY_MB = 1024
"""What the host keeps for itself when `memory_mb` is not set."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """`url` and `token` are needed once, to register; then the credentials file has everything.

    Sizes are MiB. At a time: `boots_at_once` cold boots, `restores_at_once` starts from snapshots, `captures_at_once`
    pauses and checkpoints. `golden`: keep snapshots of booted images, at most `golden_limit`, to create sandboxes from;
    those of `golden_shapes` (vCPUs x MiB, comma-separated) ahead of need. `prefetch`: bring back what a resumed sandbox
    used first the last time, before it asks. `compact_generations`: after so many pauses what they wrote of a
    memory is made one, in the background. `address` is where the control plane reaches this agent (host:port); by
    default the bound one, and for `join` the one on the route to the control plane. `heartbeat_interval` in seconds;
    without an answer for three of them the control plane is lost, and with `pause_on_loss` every sandbox is paused.
    """

    state: str = "/var/lib/capsule/agent"
    images: str = "/var/lib/capsule/images"
    url: str = ""
    token: str = ""
    bind_host: str = "127.0.0.1"
    bind_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 7443
    address: str = ""
    heartbeat_interval: Annotated[float, msgspec.Meta(ge=0.1, le=300)] = INTERVAL
    pause_on_loss: bool = True
    memory_mb: Annotated[int, msgspec.Meta(ge=0)] = 0
    slot_first: Annotated[int, msgspec.Meta(ge=1, le=65000)] = 1
    slot_count: Annotated[int, msgspec.Meta(ge=1, le=65000)] = 1000
    slots_ahead: Annotated[int, msgspec.Meta(ge=0, le=64)] = 4
    boots_at_once: Annotated[int, msgspec.Meta(ge=1, le=256)] = 4
    restores_at_once: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8
    captures_at_once: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    prefetch: bool = True
    compact_generations: Annotated[int, msgspec.Meta(ge=2)] = COMPACT_AT
    golden: bool = True
    golden_shapes: str = "1x512"
    golden_limit: Annotated[int, msgspec.Meta(ge=1, le=256)] = 16
    uid_base: Annotated[int, msgspec.Meta(ge=1000)] = 2_000_000
    guest_dns: str = "1.1.1.1,8.8.8.8"
    guest_timeout: Annotated[float, msgspec.Meta(gt=0)] = 90.0
    drain_seconds: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False

    def state_directory(self) -> Path:
        """`state`, absolute."""
        return Path(self.state).absolute()

    def memory_for_guests(self) -> int:
        """MiB that sandboxes may have together."""
        if self.memory_mb:
            return self.memory_mb
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        return max(256, total - RESERVED_MEMORY_MB)


def load() -> Settings:
    """Read the environment over `./.env`. Raises SettingsError naming the variable."""
    return load_settings(Settings, environment(Path(".env")), prefix=PREFIX)
