"""Both overlay drivers, and a base image."""

from __future__ import annotations

import shutil

import pytest

from agent.storage.fake import FakeOverlays
from agent.storage.qcow2 import Qcow2Overlays

BASE_MB = 4


@pytest.fixture(params=["fake", "qcow2"])
def overlays(request):
    if request.param == "fake":
        return FakeOverlays()
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed (apt-get install qemu-utils)")
    return Qcow2Overlays()


@pytest.fixture
def base(tmp_path):
    """A raw image of BASE_MB MiB, all zeros but its first block and its last."""
    path = tmp_path / "base.raw"
    with path.open("wb") as file:
        file.write(b"first".ljust(4096, b"\0"))
        file.seek((BASE_MB << 20) - 4096)
        file.write(b"last".ljust(4096, b"\0"))
    return path
