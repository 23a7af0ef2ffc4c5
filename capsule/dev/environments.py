"""What the programs of `capsule dev` are told, each no more than it needs, and where the agent keeps who it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import msgspec

from agent.actor.settings import SettingsError, environment
from capsule.db.embedded import dsn_of
from capsule.dev import files

if TYPE_CHECKING:
    from collections.abc import Mapping

API_KEY = "CAPSULE_API_KEY"
OF_THE_CONTROL_PLANE = frozenset({"CAPSULE_SECRET_KEY", "CAPSULE_DATABASE_URL"})
"""Who has these can be anybody; the agent, next to which untrusted code runs, does without."""


def base(data: Path) -> dict[str, str]:
    """Our own environment over `.env`, over what `capsule dev` decides."""
    decided = {"CAPSULE_AGENT_STATE": str(data / "agent"), "PYTHONUNBUFFERED": "1"}
    return {**decided, **files.read_secrets(data), **environment(Path(".env"))}


def of_running(data: Path) -> dict[str, str]:
    """What the control plane of the `capsule dev` that runs on `data` was told. SettingsError when none does."""
    if not (data / files.SECRETS).is_file():
        raise SettingsError(f"{data} is not the data directory of a `capsule dev`")
    environ = base(data)
    if not environ.get("CAPSULE_DATABASE_URL"):
        if not files.is_locked(data):
            raise SettingsError(f"no `capsule dev` runs on {data}; start it, its database comes with it")
        environ["CAPSULE_DATABASE_URL"] = dsn_of(data / "run")
    return for_control_plane(environ)


def for_control_plane(environ: Mapping[str, str]) -> dict[str, str]:
    """Everything but the user's key."""
    return {name: value for name, value in environ.items() if name != API_KEY}


def for_agent(environ: Mapping[str, str]) -> dict[str, str]:
    """Nothing of the control plane's."""
    return {name: value for name, value in environ.items() if name not in OF_THE_CONTROL_PLANE | {API_KEY}}


def credentials(environ: Mapping[str, str]) -> Path:
    """The agent's credentials file."""
    return Path(environ["CAPSULE_AGENT_STATE"]) / "credentials.json"


def remembered_host(environ: Mapping[str, str]) -> UUID | None:
    """The host that the agent's sandboxes are of, also when its credentials are lost; None when nothing says so."""
    known = host_of(credentials(environ))
    if known is not None:
        return known
    try:
        return UUID(host_id_file(environ).read_text().strip().removeprefix("host-"))
    except (OSError, ValueError):
        return None


def host_id_file(environ: Mapping[str, str]) -> Path:
    """Where the agent keeps which host it is, beside its credentials."""
    return credentials(environ).with_name("host-id")


def has_sandboxes(environ: Mapping[str, str]) -> bool:
    """Whether something of the agent's lives or rests here."""
    try:
        return any((credentials(environ).parent / "sandboxes").iterdir())
    except OSError:
        return False


def host_of(path: Path) -> UUID | None:
    """The host that the agent's credentials are for; None when there are none that can be read."""
    try:
        stored = msgspec.json.decode(path.read_bytes())
        return UUID(str(stored["host_id"]).removeprefix("host-"))
    except (OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError):
        return None
