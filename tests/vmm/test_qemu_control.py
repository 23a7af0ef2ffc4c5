"""Commands to a QEMU that was taken over by its guest: whatever it answers, a typed error in bounded time."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from agent.vmm import qemu_control, qemu_state
from agent.vmm.driver import VmCommandFailed, VmGone, VmStateFailed
from agent.vmm.qemu_control import QemuControl

PAUSED = {"running": False, "status": "paused"}
RUNNING = {"running": True, "status": "running"}
BLOCK = [{"device": "", "inserted": {"node-name": "disk-0"}}]
NODES = [{"node-name": "disk-0"}, {"node-name": "disk-0-file", "file": "/disk.qcow2"}]


class Refusal(dict):
    """An error instead of an answer."""


class Qemu:
    """Answers what a test says, by command; {} to everything else. Also what QemuControl wants of a process."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = []
        self.exited = False
        self.descriptors = []
        self.on = {}

    def has_exited(self):
        return self.exited

    async def wait(self):
        if not self.exited:
            await trio.sleep_forever()
        return "exited with status 1"

    async def serve(self, listener):
        while True:
            connection, _ = await listener.accept()
            with connection:
                await connection.send(b'{"QMP": {}}\n')
                await self._converse(connection)

    async def _converse(self, connection):
        received = b""
        while True:
            chunk, rights, _, _ = await connection.recvmsg(4096, 1024)
            for _, _, data in rights:
                self.descriptors += memoryview(data).cast("i").tolist()
            if not chunk:
                return
            received += chunk
            while b"\n" in received:
                line, _, received = received.partition(b"\n")
                request = json.loads(line)
                self.asked.append(request["execute"])
                if (action := self.on.get(request["execute"])) is not None:
                    action()
                if (answer := self.answers.get(request["execute"], {})) is None:
                    return  # it hangs up
                kind = "error" if isinstance(answer, Refusal) else "return"
                await connection.send(json.dumps({kind: answer, "id": request["id"]}).encode() + b"\n")


@pytest.fixture
async def qemu(tmp_path, nursery, monkeypatch):
    monkeypatch.setattr(qemu_control, "DYING_TIMEOUT", 0.2)
    machine = Qemu({})
    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(str(tmp_path / "qmp.sock"))
        listener.listen()
        nursery.start_soon(machine.serve, listener)
        machine.control = QemuControl(tmp_path, machine)
        yield machine
    for descriptor in machine.descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("status", ["shutdown", "guest-panicked", "internal-error"])
async def test_a_guest_that_has_ended_is_gone(qemu, status):
    """It can neither be stopped nor go on nor be saved; QEMU itself is still there."""
    qemu.answers["query-status"] = {"running": False, "status": status}
    qemu.answers["cont"] = Refusal({"class": "GenericError", "desc": "Resetting the Virtual Machine is required"})
    for ask in (qemu.control.pause, qemu.control.resume, qemu.control.paused, qemu.control.save_state):
        with pytest.raises(VmGone, match=status):
            await ask()


async def test_a_command_without_effect_is_no_success(qemu):
    """QEMU says yes, and nothing has changed."""
    qemu.answers["query-status"] = RUNNING
    with pytest.raises(VmCommandFailed, match="running"):
        await qemu.control.pause()
    qemu.answers["query-status"] = PAUSED
    with pytest.raises(VmCommandFailed, match="paused"):
        await qemu.control.resume()


@pytest.mark.parametrize("answer", [[], {}, "text", 7, [7], {"status": []}, {"running": 1}, [{"inserted": 3}]])
async def test_answers_of_any_form_are_typed_errors(qemu, answer):
    """Whatever is asked for."""
    for command in ("query-status", "query-block", "query-named-block-nodes", "query-migrate"):
        qemu.answers = {"query-status": PAUSED, "query-block": BLOCK, "query-named-block-nodes": NODES, command: answer}
        qemu.on = {"migrate": lambda: os.close(qemu.descriptors.pop())}
        calls = [partial(qemu.control.pivot_disk, Path("/next")), qemu.control.disk_file]
        calls += [qemu.control.pause, qemu.control.paused, qemu.control.save_state]
        for call in calls:
            with suppress(VmCommandFailed, VmStateFailed):
                await call()


async def test_a_connection_lost_by_a_dying_qemu_is_its_end(qemu):
    """VmGone with its exit; a connection lost by one that lives is a failed command."""
    qemu.answers["stop"] = None
    with pytest.raises(VmCommandFailed, match="closed"):
        await qemu.control.pause()
    qemu.on["stop"] = partial(setattr, qemu, "exited", True)
    with pytest.raises(VmGone, match="status 1"):
        await qemu.control.pause()


async def test_a_pivot_that_is_refused_takes_its_node_back(qemu):
    """Else the file would stay open, and the next pivot would find the name taken."""
    qemu.answers |= {"query-block": BLOCK, "query-named-block-nodes": NODES}
    qemu.answers["blockdev-snapshot"] = Refusal({"class": "GenericError", "desc": "no"})
    with pytest.raises(VmCommandFailed, match="blockdev-snapshot: no"):
        await qemu.control.pivot_disk(Path("/next.qcow2"))
    assert qemu.asked[-2:] == ["blockdev-snapshot", "blockdev-del"]


async def test_a_save_that_fails_is_cancelled(qemu):
    """On a new connection, and waited for: the VM can be resumed afterwards."""
    qemu.answers |= {"query-status": PAUSED, "query-migrate": {"status": "failed", "error-desc": "no reason"}}
    qemu.on["migrate"] = lambda: os.close(qemu.descriptors.pop())
    with pytest.raises(VmStateFailed, match="no reason"):
        await qemu.control.save_state()
    assert qemu.asked[-3:] == ["closefd", "migrate_cancel", "query-migrate"]


async def test_a_save_that_never_ends_is_given_up(qemu, monkeypatch):
    """QEMU accepts and writes nothing: bounded, and cancelled."""
    monkeypatch.setattr(qemu_state, "SAVE_TIMEOUT", 2.0)
    monkeypatch.setattr(qemu_control, "QMP_TIMEOUT", 2.0)
    qemu.answers |= {"query-status": PAUSED, "query-migrate": {"status": "active"}}
    with trio.fail_after(30), pytest.raises(VmStateFailed, match="not written its state"):
        await qemu.control.save_state()
    assert "migrate_cancel" in qemu.asked


async def test_a_save_that_is_refused_gives_its_descriptor_back(qemu):
    """QEMU had taken it already."""
    qemu.answers |= {"query-status": PAUSED, "migrate": Refusal({"class": "GenericError", "desc": "not now"})}
    with pytest.raises(VmStateFailed, match="migrate: not now"):
        await qemu.control.save_state()
    assert "closefd" in qemu.asked
