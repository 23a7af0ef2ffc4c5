"""Building the daemon."""

from __future__ import annotations

import subprocess

import pytest

from agent.guest import build


def test_the_binary_is_static_and_small(daemon_binary):
    """No interpreter to look for in the image; small enough for every guest's memory."""
    listing = subprocess.run(["readelf", "-l", daemon_binary], capture_output=True, text=True, check=True, timeout=30)
    assert "INTERP" not in listing.stdout
    assert daemon_binary.stat().st_size < 200_000
    assert list(daemon_binary.parent.iterdir()) == [daemon_binary]


def test_a_missing_compiler_names_its_package(tmp_path, monkeypatch):
    """What to install, not a stack trace; the old output stays."""
    output = tmp_path / "capsule-guest"
    output.write_bytes(b"old")
    monkeypatch.setattr(build, "COMPILER", "no-such-compiler")
    with pytest.raises(build.CompilerMissingError, match="musl-tools"):
        build.build_daemon(output)
    assert output.read_bytes() == b"old"
    assert build.main([str(output)]) == 1


def test_what_the_compiler_says_is_in_the_error(tmp_path):
    """And nothing is left in the directory."""
    with pytest.raises(build.CompileError, match="no-such-flag"):
        build.compile_daemon(tmp_path / "x", compiler="gcc", flags=("--no-such-flag",))
    assert list(tmp_path.iterdir()) == []


def test_the_digest_follows_every_source(tmp_path, monkeypatch):
    """Content and name of sources and headers; nothing else."""
    (tmp_path / "a.c").write_text("int a;")
    (tmp_path / "a.h").write_text("")
    monkeypatch.setattr(build, "DAEMON", tmp_path)
    seen = {build.source_digest()}
    (tmp_path / "README").write_text("x")
    assert {build.source_digest()} == seen
    (tmp_path / "a.h").write_text("int b;")
    seen.add(build.source_digest())
    (tmp_path / "a.c").rename(tmp_path / "b.c")
    seen.add(build.source_digest())
    assert len(seen) == 3


def test_limits_are_those_of_the_wire():
    """The C header repeats agent/wire/limits.py."""
    from agent.wire import limits  # noqa: PLC0415

    scope = {"KIB": 1024, "MIB": 1024 * 1024}
    for line in (build.DAEMON / "guest_limits.h").read_text().splitlines():
        parts = line.split(maxsplit=2)
        if parts[:1] == ["#define"] and len(parts) == 3:
            value = parts[2].split("/*")[0].replace("ULL", "").replace("U", "")
            scope[parts[1]] = eval(value, {}, scope)  # noqa: S307 - our own header
    assert scope["PROTOCOL_VERSION"] == limits.VERSION
    for name in ("MAX_FRAME_BYTES", "MAX_DATA_BYTES", "MAX_DEPTH", "MAX_FEATURES", "INITIAL_CREDIT", "MAX_CREDIT"):
        assert scope[name] == getattr(limits, name), name
    assert scope["MAX_STREAM_ID"] == limits.MAX_STREAM_ID
    assert scope["HELLO_TIMEOUT_NS"] == limits.HELLO_TIMEOUT * 10**9
