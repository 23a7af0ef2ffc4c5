"""A full host disk while a sandbox is paused: an error for whoever asked, nothing for the sandbox."""

from __future__ import annotations

import os
import subprocess

MIB = 1024 * 1024


def test_a_full_disk_while_pausing(start_platform):
    """The pause fails with 409 `disk_full`, the VM goes on with all it had, no half snapshot is left; with room again
    it works."""
    with (
        start_platform(CAPSULE_AGENT_GOLDEN="false") as platform,
        platform.client() as api,
    ):
        store = platform.data / "agent/snapshots"
        sandbox = api.post("/sandboxes", json={"memory_mb": 512}).json()
        url = f"/sandboxes/{sandbox['id']}"
        work = "mount -t tmpfs -o size=300m none /mnt; head -c 200000000 /dev/urandom > /mnt/blob; sha256sum /mnt/blob"
        digest = api.post(f"{url}/exec", json={"cmd": work, "timeout_sec": 120}).json()["stdout"]
        builds = store / "builds"
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(builds)], check=True)
        try:
            answer = api.post(f"{url}/pause")
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "disk_full"), answer.text
            assert api.get(url).json()["status"] == "running"
            again = api.post(f"{url}/exec", json={"cmd": "sha256sum /mnt/blob", "timeout_sec": 120}).json()["stdout"]
            assert again == digest
            assert list(builds.iterdir()) == []
            assert list((store / "snapshots").iterdir()) == []
            assert os.statvfs(builds).f_bavail * os.statvfs(builds).f_frsize > 60 * MIB
        finally:
            subprocess.run(["umount", str(builds)], check=True)
        assert api.post(f"{url}/pause").json()["status"] == "paused"
        assert api.post(f"{url}/resume").json()["status"] == "running"
        again = api.post(f"{url}/exec", json={"cmd": "sha256sum /mnt/blob", "timeout_sec": 120}).json()["stdout"]
        assert again == digest
