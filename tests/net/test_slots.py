"""Building and removing real slots, in a network namespace of our own."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from agent.net import slots
from agent.net.addresses import GUEST_MAC, TAP_MAC, slot_addresses
from agent.net.errors import SlotCreateError, SlotRemoveError
from agent.net.namespace import NAMESPACE_DIR, create_namespace, enter_namespace
from agent.net.netlink import open_links
from agent.net.slots import CREATE_STEPS, create_slot, existing_slots, open_tap, remove_slot, slot_is_clean
from agent.net.threads import SlotThread, call_in_slot_thread

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("clean_host")]


def in_thread(fn, *args, **kwargs):
    return call_in_slot_thread(partial(fn, *args, **kwargs))


def links():
    return {name for _index, name in socket.if_nameindex()} - {"lo"}


def descriptors():
    gc.collect()  # what tests before this one have left
    return len(list(Path("/proc/self/fd").iterdir()))


def show(*args):
    return subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=10).stdout


def test_a_slot_is_as_the_contract_says():
    """Names, addresses, MACs, routes, the pinned neighbour, and no IPv6, as seen by iproute2."""
    in_thread(create_slot, 3)
    slot = slot_addresses(3)
    assert f"inet {slot.veth_host_ip}/31" in show("addr", "show", slot.veth)
    assert f"{slot.host_ip} via {slot.veth_slot_ip} dev {slot.veth}" in show("route")
    inside = show("-n", slot.namespace, "addr")
    assert f"inet {slot.veth_slot_ip}/31" in inside
    assert "inet 169.254.0.22/30" in inside
    assert TAP_MAC in inside
    assert "inet6" not in inside
    assert f"default via {slot.veth_host_ip}" in show("-n", slot.namespace, "route")
    assert f"169.254.0.21 dev tap0 lladdr {GUEST_MAC} PERMANENT" in show("-n", slot.namespace, "neigh")


@pytest.mark.parametrize("step", CREATE_STEPS)
def test_a_failure_at_any_step_leaves_nothing(step):
    """Whatever was made before the failing step is undone, and the error says what happened."""
    before = descriptors()

    def fail(name):
        if name == step:
            raise OSError(28, f"injected at {name}")

    with pytest.raises(SlotCreateError, match=f"slot 3 could not be built: .*injected at {step}"):
        in_thread(create_slot, 3, before_step=fail)
    assert links() == set()
    assert list(NAMESPACE_DIR.iterdir()) == []
    assert show("route") == ""
    assert descriptors() == before
    in_thread(create_slot, 3)  # and nothing stands in the way of the next try


def test_a_failing_undo_is_reported_beside_the_first_error(monkeypatch):
    """The error that came first is not lost among those of undoing, and the other undo steps are still taken."""

    def cannot(_name):
        raise OSError(16, "cannot unmount")

    def fail(name):
        if name == CREATE_STEPS[-1]:
            raise OSError(28, "first")

    with monkeypatch.context() as patch:
        patch.setattr(slots, "delete_namespace", cannot)
        with pytest.raises(SlotCreateError) as caught:
            in_thread(create_slot, 3, before_step=fail)
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert [error.strerror for error in caught.value.__cause__.exceptions] == ["first", "cannot unmount"]
    assert links() == set(), "the veth was removed nevertheless"
    assert in_thread(existing_slots) == {3}


@pytest.mark.parametrize("step", CREATE_STEPS)
def test_a_death_at_any_step_can_be_cleaned_up(step):
    """The daemon is killed while it builds: what is left is found by number, removed, and can be built again."""
    program = (
        "import os, signal\n"
        "from functools import partial\n"
        "from agent.net.slots import create_slot\n"
        "from agent.net.threads import call_in_slot_thread\n"
        f"die = lambda step: step == {step!r} and os.kill(os.getpid(), signal.SIGKILL)\n"
        "call_in_slot_thread(partial(create_slot, 3, before_step=die))\n"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert in_thread(existing_slots) == (set() if step == CREATE_STEPS[0] else {3})
    in_thread(remove_slot, 3)
    assert in_thread(existing_slots) == set()
    in_thread(create_slot, 3)
    assert in_thread(slot_is_clean, 3)


def test_a_death_before_the_mount_can_be_cleaned_up():
    """The name's file without a namespace behind it is the smallest half-made slot."""
    (NAMESPACE_DIR / "capsule-4").touch()
    assert in_thread(existing_slots) == {4}
    assert not in_thread(slot_is_clean, 5)
    in_thread(remove_slot, 4)
    assert list(NAMESPACE_DIR.iterdir()) == []


def test_a_veth_without_a_namespace_is_found_and_removed():
    """The other half alone: someone deleted the namespace's name."""
    in_thread(create_slot, 4)
    subprocess.run(["umount", str(NAMESPACE_DIR / "capsule-4")], check=True, timeout=10)
    (NAMESPACE_DIR / "capsule-4").unlink()
    show("link", "add", "cap6", "type", "veth", "peer", "name", "other")
    assert in_thread(existing_slots) >= {6}
    in_thread(remove_slot, 4)
    in_thread(remove_slot, 6)
    assert links() == set()


def test_what_only_looks_like_a_slot_is_left_alone():
    """Another program's interface or namespace with a similar name is not ours to remove."""
    show("link", "add", "cap9", "type", "bridge")
    show("netns", "add", "capsule-x")
    try:
        assert in_thread(existing_slots) == set()
        in_thread(remove_slot, 9)
        assert links() == {"cap9"}
    finally:
        show("link", "del", "cap9")
        show("netns", "del", "capsule-x")


def test_removal_tries_every_step_and_reports_all(monkeypatch):
    """One failing step does not keep the others from being tried, and no error hides another."""
    in_thread(create_slot, 3)

    def cannot(word, _argument):
        raise OSError(5, word)

    with monkeypatch.context() as patch:
        patch.setattr(slots, "_remove_veth", partial(cannot, "veth"))
        patch.setattr(slots, "forget_address", partial(cannot, "flows"))
        with pytest.raises(SlotRemoveError) as caught:
            in_thread(remove_slot, 3)
    assert [error.strerror for error in caught.value.__cause__.exceptions] == ["veth", "flows"]
    assert list(NAMESPACE_DIR.iterdir()) == [], "the step between them was done"


def test_two_slots_at_once():
    """Building many at the same time mixes nothing up: each is whole and has its own addresses."""
    numbers = range(1, 9)
    threads = [SlotThread(partial(create_slot, number), finished=lambda: None, discard=None) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        thread.result()
    for number in numbers:
        slot = slot_addresses(number)
        assert in_thread(slot_is_clean, number)
        assert slot.veth_slot_ip in show("-n", slot.namespace, "addr", "show", "eth0")


def test_one_number_twice_at_once():
    """Two makers of one slot: exactly one succeeds, and the loser's undoing does not touch the winner's slot."""

    def meet(barrier, step):
        if step == "namespace":
            barrier.wait(30)

    for _ in range(5):
        build = partial(create_slot, 3, before_step=partial(meet, threading.Barrier(2)))
        threads = [SlotThread(build, finished=lambda: None, discard=None) for _ in range(2)]
        for thread in threads:
            thread.start()
        lost = 0
        for thread in threads:
            thread.join(30)
            try:
                thread.result()
            except SlotCreateError:
                lost += 1
        assert lost == 1
        assert in_thread(slot_is_clean, 3)
        in_thread(remove_slot, 3)


def test_the_tap_carries_frames():
    """What the descriptor is for: a frame for the guest comes out, with a vnet header and no packet information."""
    in_thread(create_slot, 3)
    tap = in_thread(open_tap, 3)
    try:

        def send():
            enter_namespace("capsule-3")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                udp.sendto(b"hello guest", ("169.254.0.21", 9))

        deadline = time.monotonic() + 30
        while not select.select([tap], [], [], 0.1)[0] and time.monotonic() < deadline:
            in_thread(send)  # what is sent before the kernel has noticed the carrier is dropped
        frame = os.read(tap, 65536)
        header, ethernet = frame[:10], frame[10:]
        assert len(header) == 10
        assert ethernet[:6] == bytes.fromhex(GUEST_MAC.replace(":", ""))
        assert ethernet[6:12] == bytes.fromhex(TAP_MAC.replace(":", ""))
        assert struct.unpack(">H", ethernet[12:14]) == (0x0800,)
        assert ethernet.endswith(b"hello guest")
    finally:
        os.close(tap)


def test_neighbours_learnt_make_a_slot_unclean():
    """slot_is_clean sees traffic that left only a neighbour entry behind."""
    in_thread(create_slot, 3)

    def learn():
        enter_namespace("capsule-3")
        with open_links() as inside:
            index = inside.index("eth0")
            inside._route.neigh("add", ifindex=index, dst="10.12.0.6", lladdr="02:00:00:00:00:01", state=0x02)

    in_thread(learn)
    assert not in_thread(slot_is_clean, 3)


def test_a_namespace_without_devices_is_not_clean():
    """Half a slot is never taken for a prepared one."""
    in_thread(create_namespace, "capsule-3")
    assert not in_thread(slot_is_clean, 3)


def test_nothing_leaks_and_it_is_quick_enough(capsys):
    """Twenty slots made and removed leave no descriptor and no thread; the times are printed, with a generous bound."""
    in_thread(create_slot, 1)
    in_thread(remove_slot, 1)
    fds, threads = descriptors(), set(threading.enumerate())
    made, removed = [], []
    for number in range(1, 21):
        start = time.perf_counter()
        in_thread(create_slot, number)
        made.append(time.perf_counter() - start)
    for number in range(1, 21):
        start = time.perf_counter()
        in_thread(remove_slot, number)
        removed.append(time.perf_counter() - start)
    assert descriptors() == fds
    assert set(threading.enumerate()) <= threads  # those of other tests may end meanwhile
    with capsys.disabled():
        for what, times in (("create", made), ("remove", removed)):
            line = f"  {what}: median {1e3 * statistics.median(times):.1f} ms, max {1e3 * max(times):.1f} ms"
            print(f"\n{line}")  # noqa: T201
    assert statistics.median(made) < 1
    assert statistics.median(removed) < 2
