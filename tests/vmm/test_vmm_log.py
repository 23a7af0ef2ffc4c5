"""A VMM's own log, and text from hostile sources."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.vmm import vmm_log
from agent.vmm.text import last_lines, printable
from agent.vmm.vmm_log import VmmLog


def test_the_log_starts_again_when_it_has_grown(tmp_path):
    """A guest can make its VMM complain without end; the file stays small while the VMM writes on."""
    log = VmmLog.create(tmp_path)
    for _ in range(3):
        os.write(log.fileno(), b"complaint\n" * (vmm_log.MAX_BYTES // 10 + 1))
        log.limit()
    assert (tmp_path / "vmm.log").stat().st_size == 0
    os.write(log.fileno(), b"last words\n")
    log.limit()
    assert log.tail() == "last words"
    assert VmmLog.open(tmp_path).tail() == "last words"


def test_the_tail_is_bounded_and_printable(tmp_path):
    """The end of the file, without terminal escapes."""
    log = VmmLog.create(tmp_path)
    os.write(log.fileno(), b"x" * 100_000 + b"\x1b[31mred\n")
    assert len(log.tail()) <= vmm_log.TAIL_BYTES
    assert log.tail().endswith("x[31mred")


@pytest.mark.parametrize("trap", ["symlink", "fifo", "directory"])
def test_a_replaced_log_is_not_followed(tmp_path, trap):
    """The VM's user may own the directory: neither another file nor a pipe is read in the log's place."""
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    path = tmp_path / "vmm.log"
    if trap == "symlink":
        path.symlink_to(secret)
    elif trap == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert VmmLog.open(tmp_path) is None
    with pytest.raises(OSError):
        VmmLog.create(tmp_path)
    assert secret.read_text() == "s3cret"


@given(st.binary(max_size=200))
def test_any_bytes_become_harmless_text(raw):
    """No control character survives but line ends and tabs."""
    text = printable(raw)
    assert all(character.isprintable() or character in "\n\t" for character in text)
    assert len(last_lines(text, lines=3, characters=50)) <= 50
