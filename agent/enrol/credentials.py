"""The file that makes this machine a host of its fleet: who it is, its secrets, its key and certificate.

Mode 0600; written to a temporary name, fsynced, renamed, and the directory fsynced: a crash leaves the old file or the
new one, whole.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import msgspec
import trio

from agent.enrol.errors import CredentialsInvalid

if TYPE_CHECKING:
    from pathlib import Path

MAX_FILE_BYTES = 64 * 1024
"""Ours has about 4 KiB."""


class Credentials(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that a registered host keeps. Times are seconds of this host's wall clock."""

    url: str
    """Base URL of the control plane."""
    host_id: str
    """As the API spells it: host-{uuid}."""
    token: str
    """The host JWT; opaque to us."""
    token_received_at: float
    token_lifetime: float
    """Seconds from receipt to expiry: relative, so that a clock that is wrong by hours does no harm."""
    refresh_token: str
    key_pem: str
    """This host's private key. Never leaves this file and this process."""
    cert_pem: str
    ca_cert_pem: str
    address: str = ""
    """host:port that this host joined with; empty when the settings say where it is."""

    @property
    def refresh_due_at(self) -> float:
        """Wall-clock time of the token's half-life."""
        return self.token_received_at + self.token_lifetime / 2

    def __repr__(self) -> str:
        """Keep the secrets out of tracebacks."""
        return f"Credentials(host_id={self.host_id!r}, url={self.url!r})"


class CredentialsFile:
    """Where they are kept. Reads and writes run in a thread, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._limiter = trio.CapacityLimiter(1)

    async def load(self) -> Credentials | None:
        """What was saved last, None when this host was never registered. CredentialsInvalid for a damaged file."""
        return await trio.to_thread.run_sync(self._load, limiter=self._limiter)

    async def save(self, credentials: Credentials) -> None:
        """Replace the file durably. OSError when the disk will not have it; the old file is then untouched."""
        await trio.to_thread.run_sync(self._save, credentials, limiter=self._limiter)

    def _load(self) -> Credentials | None:
        try:
            with self.path.open("rb") as file:
                text = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as err:
            raise CredentialsInvalid(f"cannot read the credentials in {self.path}: {err.strerror}") from err
        try:
            return msgspec.json.decode(text, type=Credentials)
        except msgspec.MsgspecError as err:
            raise CredentialsInvalid(
                f"{self.path} is damaged ({err}); move it away and register this host again with a fresh token"
            ) from err

    def _save(self, credentials: Credentials) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(self.path, msgspec.json.format(msgspec.json.encode(credentials)) + b"\n")


def replace_file(path: Path, data: bytes) -> None:
    """Durably, mode 0600; blocks. OSError when the disk will not have it; the old file is then untouched."""
    temporary = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()  # left by a crash; O_EXCL below makes sure the mode is ours
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
