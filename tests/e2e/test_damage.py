"""Damaged snapshots: refused with a clear error, nothing starts, nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

MIB = 1024 * 1024


def _snapshot(platform, sandbox):
    """The directory of the sandbox's snapshot."""
    name = sandbox["id"].removeprefix("sb-")
    root = platform.data / "agent/snapshots/snapshots"
    found = json.loads((platform.directory(sandbox) / "record.json").read_bytes())["base"]
    assert name in (root / found / "manifest.json").read_text(errors="replace")
    return root / found


def _flip(path: Path, offset: int) -> None:
    """Flip one bit; the second time puts it back."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


@pytest.fixture
def paused(api, create, run):
    """A paused sandbox with something to lose."""
    sandbox = create()
    run(sandbox, "mount -t tmpfs none /mnt; head -c 20000000 /dev/urandom > /mnt/blob; echo kept > /root/kept; sync")
    assert api.post(f"/sandboxes/{sandbox['id']}/pause").status_code == 200
    return sandbox


@pytest.mark.parametrize("name", ["manifest.json", "mem.header", "vm.state"])
def test_a_flipped_bit_is_refused(platform, api, run, paused, poll, name):
    """409 `snapshot_damaged` naming the file; no VM, still paused; with the bit put back it resumes."""
    url = f"/sandboxes/{paused['id']}"
    file = _snapshot(platform, paused) / name
    poll(lambda: platform.vmm_pids(paused) == [], 30, "its VMM gone")
    _flip(file, file.stat().st_size // 2)
    answer = api.post(f"{url}/resume")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "snapshot_damaged"), answer.text
    assert name in answer.json()["error"]["message"]
    assert platform.vmm_pids(paused) == []
    assert api.get(url).json()["status"] == "paused"
    _flip(file, file.stat().st_size // 2)
    assert api.post(f"{url}/resume").json()["status"] == "running"
    assert run(paused, "cat /root/kept")["stdout"] == "kept\n"


def test_a_flipped_bit_in_the_data(platform, api, paused, poll):
    """A page that cannot be trusted is never shown to the guest: the sandbox ends in `error`, with the file's name in
    its reason, and the files stay."""
    url = f"/sandboxes/{paused['id']}"
    snapshot = _snapshot(platform, paused)
    (snapshot / "working-set").unlink(missing_ok=True)
    builds = [path for path in (platform.data / "agent/snapshots/builds").glob("*/data") if _belongs(snapshot, path)]
    builds = [path for path in builds if path.stat().st_size > MIB]
    for data in builds:
        for offset in range(2048, data.stat().st_size, 64 * 1024):
            _flip(data, offset)
    answer = api.post(f"{url}/resume")
    if answer.status_code == 200:
        poll(lambda: api.get(url).json()["status"] == "error", 60, "the damage to be found")
        assert "data" in api.get(url).json()["reason"]
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "snapshot_damaged"), answer.text
        assert api.get(url).json()["status"] == "paused"
    assert snapshot.is_dir()
    assert all(data.exists() for data in builds)


def _belongs(snapshot: Path, data: Path) -> bool:
    return data.parent.name in (snapshot / "manifest.json").read_text()
