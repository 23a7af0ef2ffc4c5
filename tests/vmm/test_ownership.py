"""The one file a VM's user may write."""

from __future__ import annotations

import os
import stat

import pytest

from agent.vmm.ownership import give


@pytest.fixture(autouse=True)
def _root():
    if os.geteuid() != 0:
        pytest.skip("giving files away needs root")


def test_a_file_that_was_given_is_one_users(tmp_path):
    """Whatever its mode was."""
    path = tmp_path / "disk"
    path.touch()
    path.chmod(0o666)
    give(path, 64321, 64322)
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (64321, 64322, 0o600)


@pytest.mark.parametrize("trap", ["symlink", "fifo", "directory", "absent"])
def test_only_a_plain_file_is_given(tmp_path, trap):
    """A link planted in a directory that a VM's user can write to gives nothing of the host away, and nothing hangs."""
    path, secret = tmp_path / "disk", tmp_path / "secret"
    secret.touch(mode=0o600)
    if trap == "symlink":
        path.symlink_to(secret)
    elif trap == "fifo":
        os.mkfifo(path)
    elif trap == "directory":
        path.mkdir()
    with pytest.raises(OSError):
        give(path, 64321, 64321)
    assert secret.stat().st_uid == 0
