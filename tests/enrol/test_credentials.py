from __future__ import annotations

import os
import stat

import msgspec
import pytest
import trio

from agent.enrol.credentials import CredentialsFile
from agent.enrol.errors import CredentialsInvalid


async def test_what_was_saved_is_loaded(tmp_path, credentials):
    file = CredentialsFile(tmp_path / "deep" / "credentials.json")
    assert await file.load() is None
    await file.save(credentials)
    assert await file.load() == credentials


async def test_only_the_owner_may_read_it(tmp_path, credentials):
    """Whatever the umask, and also when a crash left a temporary file that everyone may read."""
    file = CredentialsFile(tmp_path / "credentials.json")
    leftover = tmp_path / ".credentials.json.new"
    leftover.write_text("half")
    leftover.chmod(0o666)
    before = os.umask(0)
    try:
        await file.save(credentials)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file.path]


async def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, credentials, monkeypatch):
    """A disk that is full, or fails at any step before the rename, costs nothing that was there."""
    file = CredentialsFile(tmp_path / "credentials.json")
    await file.save(credentials)

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        await file.save(msgspec.structs.replace(credentials, token="token-1"))
    assert await file.load() == credentials
    assert list(tmp_path.iterdir()) == [file.path]


async def test_the_content_is_on_disk_before_the_name_points_to_it(tmp_path, credentials, monkeypatch):
    """fsync of the file, rename, fsync of the directory, in this order: a power cut leaves old or new, never empty."""
    steps = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        steps.append(f"fsync {kind}")
        real_fsync(descriptor)

    def replace(source, target):
        steps.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "rename", replace)
    await CredentialsFile(tmp_path / "c").save(credentials)
    assert steps == ["fsync file", "rename", "fsync directory"]


async def test_saves_at_once_leave_one_whole_file(tmp_path, credentials):
    file = CredentialsFile(tmp_path / "c")
    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(file.save, msgspec.structs.replace(credentials, token=f"token-{number}"))
    assert (await file.load()).token.startswith("token-")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": "x"}', "\0" * 100_000])
async def test_a_damaged_file_says_what_to_do(tmp_path, text):
    path = tmp_path / "c"
    path.write_text(text)
    with pytest.raises(CredentialsInvalid, match="fresh token"):
        await CredentialsFile(path).load()


async def test_a_file_that_cannot_be_read_is_not_taken_for_none(tmp_path):
    """Otherwise an agent would register anew over credentials that are good."""
    (tmp_path / "c").mkdir()
    with pytest.raises(CredentialsInvalid, match="cannot read"):
        await CredentialsFile(tmp_path / "c").load()


def test_secrets_stay_out_of_repr(credentials):
    assert "refresh-0" not in repr(credentials)
    assert "PRIVATE" not in repr(credentials)
