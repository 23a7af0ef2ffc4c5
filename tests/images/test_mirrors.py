from __future__ import annotations

from pathlib import Path

import pytest

from agent.images.errors import BuildFailed
from agent.images.mirrors import Source, host_suite, parse_apt_options, parse_sources

TARGETS = """\
Debian|bookworm|http://user:secret@mirror.test/debian/|bookworm|main|/etc/apt/sources.list:1
Debian|bookworm|http://user:secret@mirror.test/debian/|bookworm|contrib|/etc/apt/sources.list:1
Debian|bookworm-security|http://mirror.test/security/|bookworm-security|main|/etc/apt/debian.sources:2
Debian|trixie|http://mirror.test/debian/|trixie|main|/etc/apt/sources.list:3
Debian Backports|bookworm-backports|http://mirror.test/debian/|bookworm-backports|main|/etc/apt/sources.list:4
Other|bookworm|http://other.test/|bookworm|main|/etc/apt/other.list:1
Debian|bookworm|file:/srv/debian/|bookworm|main|/etc/apt/sources.list:5

garbage
"""


def test_only_this_release_of_debian() -> None:
    """Of the host's sources the build takes Debian's own for the suite, with updates and security, and no others."""
    found = parse_sources(TARGETS.splitlines(), "bookworm", keyrings=lambda _entry: ())
    assert [source.line() for source in found] == [
        "deb http://user:secret@mirror.test/debian/ bookworm main contrib",
        "deb http://mirror.test/security/ bookworm-security main",
    ]


def test_keys_of_the_host() -> None:
    """A mirror with keys of its own is checked with those."""
    found = parse_sources(TARGETS.splitlines(), "bookworm", keyrings=lambda entry: (f"/keys/{Path(entry).name}",))
    assert found[1].line() == (
        "deb [signed-by=/keys/debian.sources:2] http://mirror.test/security/ bookworm-security main"
    )


def test_no_credentials_in_the_guest() -> None:
    """The line that goes into an image has neither the host's password nor paths of the host's keys."""
    source = Source("http://user:secret@mirror.test:8080/debian/", "bookworm", ("main",), ("/keys/site.gpg",))
    assert source.public_line() == "deb http://mirror.test:8080/debian/ bookworm main"


def test_apt_options() -> None:
    """Of the host's configuration only what decides whether the archive can be reached is taken over."""
    dump = """\
APT::Architecture "amd64";
Acquire "";
Acquire::http::Proxy "http://proxy.test:3128";
Acquire::https::CAInfo "/etc/ca.pem";
Acquire::Check-Date "false";
Acquire::http::Timeout "";
DPkg::Post-Invoke:: "rm -f /var/cache/apt/*.bin";
"""
    assert parse_apt_options(dump.splitlines()) == [
        'Acquire::http::Proxy "http://proxy.test:3128";',
        'Acquire::https::CAInfo "/etc/ca.pem";',
        'Acquire::Check-Date "false";',
    ]


def test_suite(tmp_path: Path) -> None:
    """Debian is known by its code name; on another system the error says which one it is."""
    release = tmp_path / "os-release"
    release.write_text('# release\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nID=debian\nVERSION_CODENAME=trixie\n')
    assert host_suite(release) == "trixie"
    release.write_text('PRETTY_NAME="Other Linux 1"\nID=other\nVERSION_CODENAME=one\n')
    with pytest.raises(BuildFailed, match="Other Linux 1"):
        host_suite(release)
