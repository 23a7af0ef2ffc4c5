"""Reading events where the kernel cannot be told for one call not to wait."""

from __future__ import annotations

import errno
import os

import pytest

from agent.pager.abi import Userfault


@pytest.fixture
def old_kernel(monkeypatch):
    """Linux before 6.10."""

    def refuse(*_arguments):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "preadv", refuse)


def test_an_old_kernel_does_not_hang_the_pager(old_kernel):
    """A descriptor that its other holder has made a blocking one is refused, whether there is something to read."""
    reader, writer = os.pipe2(os.O_NONBLOCK)
    userfault, buffer = Userfault(reader), bytearray(64)
    try:
        with pytest.raises(BlockingIOError):
            userfault.read_events(buffer)
        os.write(writer, b"x" * 32)
        assert userfault.read_events(buffer) == 32
        os.set_blocking(reader, True)
        for content in (b"", b"x"):
            os.write(writer, content)
            with pytest.raises(OSError, match="blocking"):
                userfault.read_events(buffer)
    finally:
        userfault.close()
        os.close(writer)
