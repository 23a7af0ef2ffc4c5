"""What our page fault service costs beside a bare C loop; goals: four fifths of its MiB/s, storms that stay at home.

Run: `.venv/bin/python scripts/bench.d/pager.py`, as root. Prints `name  value unit  ratio-to-baseline`, a line each.

A program stands for the VMM (tests/pager/vmm.c): memory in a memfd, registered as QEMU's is. A round runs every
measurement once, so that a noisy moment hits the thing and its baseline alike; medians of the rounds, and of the
rounds' ratios.
- rate: 128 MiB read page by page. Ours: the real process as shipped, checksums of everything, the working set recorded
  already, as it is soon after a resume; then while it is being recorded; then with all of it prefetched. Baseline:
  poll, read, UFFDIO_COPY of 64 KiB from mapped data without checksums, in a process of its own.
- random: the same, 64 KiB apart and out of order, so that no reading ahead helps.
- fault: single faults of one VM, half a millisecond between them, none of which can be foreseen. Alone; beside a VM
  that reads a gigabyte through the same pager; its baseline: beside one that reads it through the C loop, which takes
  as much of the machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import trio

from agent.pager.client import PagerClient
from agent.pager.service import PagedVm
from agent.pager.supervisor import PagerSupervisor, stop_pager
from agent.snapshots import working_set
from agent.snapshots.blocks import BuildWriter
from agent.snapshots.header import Header, Run

ROUNDS = 9
SIZE = 128 << 20
STORM = 1024 << 20
IN_ORDER = f"read 0 {SIZE} 4096"
OUT_OF_ORDER = f"scatter {SIZE >> 16} 65536"
PROBES = 400
PROBE_SIZE = 64 << 20
VMM = Path(__file__).parents[2] / "tests" / "pager" / "vmm.c"

LOOP = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <signal.h>
#include <unistd.h>
#include <linux/userfaultfd.h>
// loop SOCKET DATA CHUNK: the data file is mapped again and again behind itself, so that it covers any memory.
int main(int argc, char **argv) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int data = open(argv[2], O_RDONLY);
    struct stat st;
    fstat(data, &st);
    uint64_t chunk = strtoull(argv[3], 0, 10), length = st.st_size, base = 0, size = 0;
    char *source = mmap(0, length, PROT_READ, MAP_PRIVATE | MAP_POPULATE, data, 0);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    strcpy(a.sun_path, argv[1]);
    if (bind(listener, (void *)&a, sizeof a) || listen(listener, 1)) return 1;
    puts("listening"), fflush(stdout);
    int s = accept(listener, 0, 0);
    char text[4096] = "", control[CMSG_SPACE(sizeof(int))];
    struct iovec iov = {text, sizeof text - 1};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    recvmsg(s, &m, 0);
    int fd = *(int *)CMSG_DATA(CMSG_FIRSTHDR(&m));
    sscanf(text, "[{\"base_host_virt_addr\":%lu,\"size\":%lu", &base, &size);
    struct pollfd p = {fd, POLLIN, 0};
    struct uffd_msg events[64];
    for (;;) {
        poll(&p, 1, -1);
        for (int n; (n = read(fd, events, sizeof events)) > 0;)
            for (int i = 0; i < n / (int)sizeof *events; i++) {
                uint64_t o = (events[i].arg.pagefault.address - base) / chunk * chunk;
                uint64_t l = o + chunk > size ? size - o : chunk;
                struct uffdio_copy c = {base + o, (uintptr_t)source + o % length, l, UFFDIO_COPY_MODE_WP, 0};
                struct uffdio_range w = {base + o, l};
                if (ioctl(fd, UFFDIO_COPY, &c)) ioctl(fd, UFFDIO_WAKE, &w);
            }
    }
}
"""


class Vmm:
    """One program that stands for a VMM, armed and shaken hands."""

    def __init__(self, program: Path, socket: Path, size: int) -> None:
        self._process = subprocess.Popen(
            [program, socket, str(size >> 20), "1", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answer()

    def answer(self) -> list[str]:
        return self._process.stdout.readline().split()

    def send(self, command: str) -> None:
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    async def ask(self, command: str) -> list[str]:
        self.send(command)
        return await trio.to_thread.run_sync(self.answer)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Bench:
    """The files, the programs, the pager."""

    def __init__(self, root: Path, client: PagerClient) -> None:
        self.root = root
        self.client = client
        self.vmm = self._compile("vmm", VMM.read_text())
        self.loop = self._compile("loop", LOOP)
        self.build = uuid4()
        self.data = root / "builds" / str(self.build) / "data"
        (root / "builds").mkdir()
        writer = BuildWriter(self.data.parent)
        for _ in range(SIZE >> 20):
            writer.append(os.urandom(1 << 20))
        writer.finish()
        for name, size in (("rate", SIZE), ("probe", PROBE_SIZE), ("storm", STORM)):
            (root / name).mkdir()
            runs = [Run(at, min(SIZE, size - at), self.build, 0) for at in range(0, size, SIZE)]
            header = Header.of(memory_bytes=size, generation=1, build=self.build, runs=runs)
            (root / name / "mem.header").write_bytes(header.encode())

    def _compile(self, name: str, source: str) -> Path:
        (self.root / f"{name}.c").write_text(source)
        subprocess.run(["cc", "-O2", "-o", self.root / name, self.root / f"{name}.c", "-lpthread"], check=True)
        return self.root / name

    async def ours(self, name: str, size: int) -> Vmm:
        """A VM served by the pager."""
        vm = PagedVm(
            vm_id=name, snapshot=self.root / name, builds=self.root / "builds", socket=self.root / f"{name}.sock", uid=0
        )
        await self.client.listen(vm)
        vmm = Vmm(self.vmm, vm.socket, size)
        await self.client.wait_connected(name, timeout=10)
        return vmm

    def bare(self, stack: ExitStack, size: int) -> Vmm:
        """A VM served by the C loop."""
        socket = self.root / f"{uuid4()}.sock"
        process = subprocess.Popen([self.loop, socket, self.data, "65536"], stdout=subprocess.PIPE, text=True)
        stack.callback(process.communicate)
        stack.callback(process.kill)
        process.stdout.readline()
        vmm = Vmm(self.vmm, socket, size)
        stack.callback(vmm.close)
        return vmm

    async def rate_bare(self, command: str = IN_ORDER) -> float:
        with ExitStack() as stack:
            return await rate(self.bare(stack, SIZE), command)

    async def rate_ours(self, command: str = IN_ORDER, *, recorded: bool = True, prefetched: bool = False) -> float:
        path = self.root / "rate" / "working-set"
        path.unlink(missing_ok=True)
        if prefetched:
            working_set.write(path, working_set.combine(None, [(0, SIZE)]))
        vmm = await self.ours("rate", SIZE)
        try:
            if recorded:
                await self.client.record_working_set("rate")
            return await rate(vmm, command)
        finally:
            vmm.close()
            await self.client.release("rate")

    async def probe(self, storm: Vmm | None) -> float:
        """Median seconds of a fault, while `storm` reads all of its memory."""
        vmm = await self.ours("probe", PROBE_SIZE)
        try:
            await self.client.record_working_set("probe")
            if storm is not None:
                storm.send(f"read 0 {STORM} 4096")
            median, _ = await vmm.ask(f"latency {PROBES} 65536 500")
            return int(median) / 1e9
        finally:
            vmm.close()
            await self.client.release("probe")

    async def probe_beside_ours(self) -> float:
        storm = await self.ours("storm", STORM)
        try:
            await self.client.record_working_set("storm")
            return await self.probe(storm)
        finally:
            storm.close()
            await self.client.release("storm")

    async def probe_beside_bare(self) -> float:
        with ExitStack() as stack:
            return await self.probe(self.bare(stack, STORM))


async def rate(vmm: Vmm, command: str) -> float:
    """MiB/s of reading everything."""
    (nanoseconds,) = await vmm.ask(command)
    return (SIZE >> 20) / (int(nanoseconds) / 1e9)


async def measure(root: Path) -> dict[str, list[float]]:
    """Figures of all rounds by name."""
    figures: dict[str, list[float]] = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(PagerSupervisor(root / "pager").run)
        client = PagerClient(root / "pager")
        await nursery.start(client.run)
        bench = Bench(root, client)
        for number in range(ROUNDS + 1):
            values = {
                "bare": await bench.rate_bare(),
                "ours": await bench.rate_ours(),
                "random bare": await bench.rate_bare(OUT_OF_ORDER),
                "random": await bench.rate_ours(OUT_OF_ORDER),
                "recording": await bench.rate_ours(recorded=False),
                "prefetched": await bench.rate_ours(recorded=False, prefetched=True),
                "alone": await bench.probe(None),
                "beside bare": await bench.probe_beside_bare(),
                "beside ours": await bench.probe_beside_ours(),
            }
            if number:  # the first one warms everything up
                for name, value in values.items():
                    figures.setdefault(name, []).append(value)
        nursery.cancel_scope.cancel()
    return figures


def main() -> None:
    """Measure and print."""
    if os.geteuid() != 0:
        sys.exit("the pager needs root")
    with tempfile.TemporaryDirectory(prefix="capsule-bench-") as name:
        try:
            figures = trio.run(measure, Path(name))
        finally:
            trio.run(stop_pager, Path(name) / "pager")
    for key, label, unit, base, factor in (
        ("bare", "pager_rate_bare_c_loop", "MiB/s", "bare", 1),
        ("ours", "pager_rate", "MiB/s", "bare", 1),
        ("recording", "pager_rate_while_recording", "MiB/s", "bare", 1),
        ("prefetched", "pager_rate_prefetched", "MiB/s", "bare", 1),
        ("random bare", "pager_rate_random_bare_c_loop", "MiB/s", "random bare", 1),
        ("random", "pager_rate_random", "MiB/s", "random bare", 1),
        ("alone", "pager_fault_median_alone", "us", "alone", 1e6),
        ("beside bare", "pager_fault_median_beside_c_storm", "us", "alone", 1e6),
        ("beside ours", "pager_fault_median_beside_storm", "us", "beside bare", 1e6),
    ):
        ratio = statistics.median(a / b for a, b in zip(figures[key], figures[base], strict=True))
        print(f"{label:36}  {statistics.median(figures[key]) * factor:10.0f} {unit:5}  {ratio:.2f}")


if __name__ == "__main__":
    main()
