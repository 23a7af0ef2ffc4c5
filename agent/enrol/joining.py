"""How a machine becomes a host: a one-time token is spent, and what it bought is written down.

A crash between the two wastes the token, and nothing else: the operator makes another one for the same host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio

from agent.enrol.errors import (
    AlreadyRegistered,
    AnotherHost,
    ControlPlaneUnreachable,
    CredentialsInvalid,
    CredentialsNotStored,
    RegistrationInDoubt,
    TokenInvalid,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.enrol.credentials import Credentials, CredentialsFile
    from agent.enrol.registration import Capacity, ControlPlane

log = structlog.get_logger()

REGISTER_SECONDS = 15
"""For spending the one-time token and writing down what it bought: a stop in between would waste it."""

_TOKEN = re.compile(r"htok-[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Joining:
    """What the operator asked for. `force`: also when this machine is a host already. `serve`: and then serve.

    `tell` is called with what was bought, once it is stored.
    """

    force: bool = False
    serve: bool = True
    tell: Callable[[Credentials], None] = lambda _: None


def check_token(token: str) -> None:
    """TokenInvalid unless it has the form of a registration token."""
    if not _TOKEN.fullmatch(token):
        raise TokenInvalid("that is no registration token: htok- and 64 hex digits; was it copied whole?")


async def check_unregistered(file: CredentialsFile, *, force: bool) -> Credentials | None:
    """The credentials that are to be replaced, if any can be read. AlreadyRegistered, CredentialsInvalid without
    `force`."""
    try:
        stored = await file.load()
    except CredentialsInvalid:
        if not force:
            raise
        return None
    if stored is not None and not force:
        raise AlreadyRegistered(
            f"this machine is {stored.host_id} of {stored.url} already: `capsule-agent serve` goes on as that host; "
            "if it was told to register anew, add --force and use a fresh token of the same host"
        )
    return stored


async def register(
    control_plane: ControlPlane,
    file: CredentialsFile,
    token: str,
    address: str,
    capacity: Capacity,
    *,
    only_as: str = "",
    remember_address: bool = False,
) -> Credentials:
    """Spend the token, and store what it buys; a cancellation waits for that.

    `only_as`: the id of the one host that this machine can be. Raises an EnrolError that says what became of the token.
    """
    with trio.move_on_after(REGISTER_SECONDS, shield=True):
        try:
            credentials = await control_plane.register(token, address, capacity)
        except ControlPlaneUnreachable as err:
            raise RegistrationInDoubt(
                f"{err}; try again, and if the token is then refused the answer was lost: make another for this host"
            ) from err
        if only_as and credentials.host_id != only_as:
            raise AnotherHost(
                f"the token is of {credentials.host_id}, but this machine has sandboxes of {only_as}: use a fresh "
                "token of that host, or remove them first (capsule-agent purge); nothing here was changed. The token "
                f"is spent: {credentials.host_id}, if a machine is that host, has to join again with a fresh token"
            )
        if remember_address:
            credentials = msgspec.structs.replace(credentials, address=address)
        try:
            await file.save(credentials)
        except OSError as err:
            raise CredentialsNotStored(_spent(f"{file.path} cannot be written ({err.strerror})")) from err
        log.info("host_registered", host_id=credentials.host_id, address=address)
        return credentials
    raise CredentialsNotStored(_spent(f"{file.path} was not written in {REGISTER_SECONDS} s"))


def _spent(trouble: str) -> str:
    return f"{trouble}, and the token is spent: mend that, then join again with another token for this host"
