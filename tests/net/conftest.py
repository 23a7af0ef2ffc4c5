"""Fixtures for network tests, and the guard that keeps host tests off a real host's network.

Host tests make devices, routes and firewall rules. They run in a namespace that dies with them, and nowhere else:

    unshare -nm --propagation private sh -c 'mkdir -p /run/netns && mount -t tmpfs t /run/netns &&
      ip link set lo up && exec pytest -m host tests/net'
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from agent.net.host_network import remove_host_network
from agent.net.slots import existing_slots, remove_slot
from agent.net.threads import call_in_slot_thread

HOW = "see how in the docstring of tests/net/conftest.py"


def why_not_private() -> str | None:
    """None in a network namespace of our own with a /run/netns of our own; otherwise what is wrong."""
    if os.geteuid() != 0:
        return f"needs root; {HOW}"
    with suppress(PermissionError):  # some containers hide what belongs to process 1
        if Path("/proc/self/ns/net").stat().st_ino == Path("/proc/1/ns/net").stat().st_ino:
            return f"this is the host's own network; {HOW}"
    routes = Path("/proc/thread-self/net/route").read_text(encoding="ascii").splitlines()[1:]
    if routes or not Path("/run/netns").is_mount() or any(Path("/run/netns").iterdir()):
        return f"this network namespace is in use; {HOW}"
    return None


# Looked at before any test has put a route or a namespace there.
NOT_PRIVATE = why_not_private()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture, of whatever scope, has done something to the network."""
    if item.get_closest_marker("host") is not None and NOT_PRIVATE is not None:
        pytest.skip(NOT_PRIVATE)


@pytest.fixture
def clean_host(tmp_path):
    """Whatever a test leaves behind is removed; yields a state file for the host's network."""
    state_file = tmp_path / "host-network.json"
    yield state_file
    for number in call_in_slot_thread(existing_slots):
        call_in_slot_thread(partial(remove_slot, number))
    call_in_slot_thread(partial(remove_host_network, state_file))
