"""What can go wrong with networks; NetworkError is never raised itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading


class NetworkError(Exception):
    """Base of every failure of agent.net."""


class AddressRangeInUseError(NetworkError):
    """The host already routes a part of the slot ranges somewhere else; nothing was changed."""


class FirewallError(NetworkError):
    """libnftables is missing or refused a ruleset, in its own words; rulesets are atomic, so nothing was changed."""


class HostNetworkError(NetworkError):
    """Some steps of taking the host's side down failed; the cause is an ExceptionGroup of all of them."""


class HostNetworkInUse(NetworkError):  # noqa: N818 - reads as what happened
    """Another agent, with a state directory of its own, has the slots of this host."""


class InvalidSlotError(NetworkError):
    """The number is outside what the address ranges can hold."""


class NoFreeSlots(NetworkError):  # noqa: N818 - the name is the interface
    """Every slot of the range is in use; one must be released first, or the range made larger."""


class PoolClosedError(NetworkError):
    """The pool's task has ended, so no slot will be prepared any more."""


class SlotBusyError(NetworkError):
    """An earlier job on this slot overran its time limit and is still in the kernel; try again later."""


class SlotCreateError(NetworkError):
    """A slot could not be built; all that was made of it has been undone, unless the cause is an ExceptionGroup."""


class SlotInspectError(NetworkError):
    """The slots of this host, or the state of one, could not be read."""


class SlotRemoveError(NetworkError):
    """Some steps of removing a slot failed; the cause is an ExceptionGroup of all of them. Removing again is safe."""


class SlotTimeoutError(NetworkError):
    """A slot job overran its time limit. Its thread goes on, since a kernel call cannot be taken back."""

    def __init__(self, message: str, thread: threading.Thread) -> None:
        super().__init__(message)
        self.thread = thread


class TapError(NetworkError):
    """The slot's tap device could not be opened: no such slot, or another process still holds it."""


class WrongThreadError(NetworkError):
    """A function that changes its thread's namespace was called outside a SlotThread (a bug of the caller)."""
