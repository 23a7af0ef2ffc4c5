"""Ctrl-C ends everything and leaves nothing behind; the next start knows what became of it."""

from __future__ import annotations

import subprocess
from pathlib import Path


def rules():
    return subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout


def links():
    return subprocess.run(["ip", "-o", "-br", "link"], capture_output=True, text=True, check=True).stdout


def test_nothing_is_left(start_platform, slots, poll):
    """Processes, namespaces, links, rules, sockets, overlays: gone after SIGINT; the rows say stopped."""
    before = (slots(), links(), rules(), Path("/proc/sys/net/ipv4/ip_forward").read_text())
    with start_platform() as one:
        with one.client() as api:
            made = [api.post("/sandboxes", json={"memory_mb": 128}).json() for _ in range(2)]
            assert [sandbox["status"] for sandbox in made] == ["running", "running"]
        assert len(one.vmm_pids()) >= 2  # a golden snapshot may be in the making
        one.stop()
        assert one.pids() == []
        assert list((one.data / "agent/sandboxes").iterdir()) == []
        assert not one.ready_file.exists()
        assert list((one.data / "run").iterdir()) == []
        poll(lambda: (slots(), links(), rules(), Path("/proc/sys/net/ipv4/ip_forward").read_text()) == before, 60)
        one.start()
        with one.client() as api:
            for sandbox in made:
                assert api.get(f"/sandboxes/{sandbox['id']}").json()["status"] == "stopped"
            assert api.post("/sandboxes", json={"memory_mb": 128}).status_code == 201
