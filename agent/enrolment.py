"""How this machine comes by its credentials: they are on disk, or it registers, at its first start or for `join`."""

from __future__ import annotations

import os
import platform
import shutil
from functools import partial
from typing import TYPE_CHECKING

import trio

from agent.enrol.address import choose_address
from agent.enrol.credentials import Credentials, CredentialsFile
from agent.enrol.host_id import HostIdFile
from agent.enrol.joining import Joining, check_unregistered, register
from agent.enrol.registration import Capacity, ControlPlane

if TYPE_CHECKING:
    from pathlib import Path

    from agent.config import Settings
    from agent.sandboxes.records import StateDirectory

CREDENTIALS_FILE = "credentials.json"
HOST_ID_FILE = "host-id"
UNREGISTERED = "this host is not registered: capsule-agent join, or set CAPSULE_AGENT_URL and CAPSULE_AGENT_TOKEN"


class NotRegistered(Exception):  # noqa: N818 - reads as what is wrong
    """There are no credentials and no token to get some."""


async def stored_url(root: Path) -> str:
    """The control plane that this host belongs to. NotRegistered."""
    stored = await CredentialsFile(root / CREDENTIALS_FILE).load()
    if stored is None:
        raise NotRegistered(UNREGISTERED)
    return stored.url


async def stored_or_registered(settings: Settings, state: StateDirectory, control_plane: ControlPlane) -> Credentials:
    """Those on disk; else register with the one-time token."""
    file = CredentialsFile(state.root / CREDENTIALS_FILE)
    stored = await file.load()
    if stored is not None:
        return stored
    if not settings.token:
        raise NotRegistered(UNREGISTERED)
    address = settings.address or f"{settings.bind_host}:{settings.bind_port}"
    capacity, only_as = await _capacity(settings, state), await _only_as(state, None)
    return await register(control_plane, file, settings.token, address, capacity, only_as=only_as)


async def join(settings: Settings, state: StateDirectory, control_plane: ControlPlane, joining: Joining) -> Credentials:
    """Register, whatever was before; VMs are not touched."""
    file = CredentialsFile(state.root / CREDENTIALS_FILE)
    before = await check_unregistered(file, force=joining.force)
    only_as = await _only_as(state, before)
    choose = partial(choose_address, settings.url, settings.address, settings.bind_host, settings.bind_port)
    address = await trio.to_thread.run_sync(choose, abandon_on_cancel=True)
    credentials = await register(
        control_plane,
        file,
        settings.token,
        address,
        await _capacity(settings, state),
        only_as=only_as,
        remember_address=True,
    )
    joining.tell(credentials)
    return credentials


async def _only_as(state: StateDirectory, before: Credentials | None) -> str:
    """The one host that this machine can be; "" for any, when nothing lives or rests here. HostForgotten."""
    if not await trio.to_thread.run_sync(state.load):
        return ""
    return await HostIdFile(state.root / HOST_ID_FILE).load() if before is None else before.host_id


async def _capacity(settings: Settings, state: StateDirectory) -> Capacity:
    disk = await trio.to_thread.run_sync(shutil.disk_usage, state.root)
    return Capacity(
        arch=platform.machine(),
        cpu_cores=os.cpu_count() or 1,
        memory_mb=settings.memory_for_guests(),
        disk_gb=max(1, disk.total // 2**30),
    )
