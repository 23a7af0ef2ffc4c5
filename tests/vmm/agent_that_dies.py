"""A program: boot the VM described on standard input, print its process, and die of SIGKILL."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import msgspec
import trio
import trio.testing

from agent.vmm.cgroup import CgroupTree
from agent.vmm.driver import VmSpec
from agent.vmm.qemu import QemuDriver
from agent.vmm.qemu_command import Accelerator
from agent.vmm.qemu_launch import Launcher


async def main() -> None:
    spec, accelerator, parent = msgspec.json.decode(
        sys.stdin.buffer.read(), type=tuple[VmSpec, Accelerator, str], dec_hook=convert
    )
    launcher = Launcher(binary=Path("/usr/bin/qemu-system-x86_64"), accelerator=accelerator)
    driver = QemuDriver(launcher, version="0", cgroups=CgroupTree.detect(parent))
    vm = await driver.boot(spec)
    print(msgspec.json.encode(vm.process).decode(), flush=True)  # noqa: T201
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vm.wait_exit)
        await trio.testing.wait_all_tasks_blocked()
        os.kill(os.getpid(), signal.SIGKILL)


def convert(kind: type, value: str) -> object:
    """Paths travel as text."""
    return kind(value)


trio.run(main)
