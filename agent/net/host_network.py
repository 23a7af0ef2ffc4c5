"""The host's side of all slots: forwarding on, both slot ranges unreachable by default, one nftables table of our own.

Everything is idempotent, so a daemon that died half-way runs it again. Of what was there before only
`net.ipv4.ip_forward` is changed, and its old value is on disk before that. These functions block for milliseconds
(netlink, fsync): call them by `run_in_slot_thread`.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from agent.net.addresses import HOST_RANGE, VETH_RANGE, slot_of_veth
from agent.net.errors import AddressRangeInUseError, HostNetworkError, HostNetworkInUse
from agent.net.firewall import apply_rules
from agent.net.netlink import Links, open_links
from agent.net.rules import host_rules, no_host_rules
from agent.net.sysctl import IP_FORWARD, read_sysctl, write_sysctl
from agent.net.threads import require_slot_thread

LOCK_DIR = Path("/run/lock")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class HostNetworkState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the host was like before us, as kept in the state file (JSON)."""

    boot_id: str
    """The boot it was true for; a reboot puts every sysctl back by itself."""
    ip_forward: str


def lock_host_network() -> int:
    """Be the only agent in this network namespace; held until the process ends. Raises HostNetworkInUse.

    The lock of a state directory is not enough: a second agent beside it would collect the first one's slots.
    """
    LOCK_DIR.mkdir(parents=True, exist_ok=True)
    namespace = Path("/proc/self/ns/net").stat().st_ino
    fd = os.open(LOCK_DIR / f"capsule-network-{namespace}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(fd)
        raise HostNetworkInUse("another agent has the network slots of this host; only one can") from err
    return fd


def ensure_host_network(state_file: Path) -> None:
    """Prepare the host for slots, or repair what has been changed of it; run it before the first slot is made.

    AddressRangeInUseError if the host routes a part of the slot ranges itself: nothing was changed then.
    """
    require_slot_thread()
    with open_links() as links:
        _refuse_foreign_routes(links)
        _remember(state_file)
        apply_rules(host_rules())  # before forwarding: there is no moment without the fences
        for network in (HOST_RANGE, VETH_RANGE):
            try:
                links.add_unreachable(network)
            except FileExistsError as err:
                raise AddressRangeInUseError(f"{network} is routed elsewhere on this host") from err
    if read_sysctl(IP_FORWARD) != "1":
        write_sysctl(IP_FORWARD, "1")


def remove_host_network(state_file: Path) -> None:
    """Undo ensure_host_network: forwarding as it was, no routes, no table. Remove the slots first.

    Every step is tried, HostNetworkError reports all that failed, and the state file goes last: it can be run again.
    """
    require_slot_thread()
    failures: list[Exception] = []
    for step in (partial(_restore, state_file), _remove_routes, _remove_rules):
        try:
            step()
        except Exception as err:  # noqa: BLE001 - collected, and raised together
            failures.append(err)
    if failures:
        group = ExceptionGroup("removing the host's network", failures)
        raise HostNetworkError(f"not all was removed: {'; '.join(map(str, failures))}") from group
    state_file.unlink(missing_ok=True)


def _refuse_foreign_routes(links: Links) -> None:
    for network in (HOST_RANGE, VETH_RANGE):
        for route, link in links.routes_within(network):
            if link is not None and slot_of_veth(link) is None:
                raise AddressRangeInUseError(
                    f"this host routes {route} to {link}, but slots need all of {network}: move that network elsewhere"
                )


def _remember(state_file: Path) -> None:
    """Write the state file unless one of this boot is there: only the first value is the host's own."""
    boot_id = _BOOT_ID.read_text(encoding="ascii").strip()
    known = _read(state_file)
    if known is not None and known.boot_id == boot_id:
        return
    state = HostNetworkState(boot_id=boot_id, ip_forward=read_sysctl(IP_FORWARD))
    temporary = state_file.with_name(state_file.name + ".new")
    with temporary.open("wb") as file:
        file.write(msgspec.json.encode(state))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(state_file)


def _restore(state_file: Path) -> None:
    state = _read(state_file)
    if state is not None and state.boot_id == _BOOT_ID.read_text(encoding="ascii").strip():
        write_sysctl(IP_FORWARD, state.ip_forward)


def _read(state_file: Path) -> HostNetworkState | None:
    with suppress(FileNotFoundError):
        try:
            return msgspec.json.decode(state_file.read_bytes(), type=HostNetworkState)
        except msgspec.DecodeError as err:
            raise HostNetworkError(f"{state_file} is damaged; it holds the old ip_forward. Delete it to go on") from err
    return None


def _remove_routes() -> None:
    with open_links() as links:
        for network in (HOST_RANGE, VETH_RANGE):
            links.remove_unreachable(network)


def _remove_rules() -> None:
    apply_rules(no_host_rules())
