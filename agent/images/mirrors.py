"""Which Debian archive the guest's packages come from: the one this host is configured for.

The host's own sources work where only a site's mirror can be reached. What they may hold of secrets (credentials in an
address, a proxy) is used for the build and never gets into an image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from agent.images.commands import run
from agent.images.errors import BuildFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FIELDS = ("ORIGIN", "CODENAME", "REPO_URI", "RELEASE", "COMPONENT", "SOURCESENTRY")
SIGNED_BY = re.compile(r"signed-by\s*[:=]\s*([^\]\n]+)", re.IGNORECASE)
# How apt reaches an archive from here; the rest of the host's configuration is the host's business.
APT_OPTIONS = re.compile(r'^(Acquire::(?:https?::.+|Check-Date|Check-Valid-Until)) "(.*)";$')
APT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Source:
    """A line of sources.list."""

    uri: str
    release: str
    components: tuple[str, ...]
    keyrings: tuple[str, ...] = ()

    def line(self) -> str:
        """The line with which the build reaches the archive."""
        signed = f"[signed-by={','.join(self.keyrings)}] " if self.keyrings else ""
        return f"deb {signed}{self.uri} {self.release} {' '.join(self.components)}"

    def public_line(self) -> str:
        """The line for the guest: no credentials, and keys of Debian's, which every image has."""
        parts = urlsplit(self.uri)
        host = parts.netloc.rpartition("@")[2]
        return f"deb {urlunsplit(parts._replace(netloc=host))} {self.release} {' '.join(self.components)}"


def host_suite(os_release: Path = Path("/etc/os-release")) -> str:
    """The host's Debian release by its code name. BuildFailed on anything but Debian."""
    fields = dict(line.replace('"', "").split("=", 1) for line in os_release.read_text().splitlines() if "=" in line)
    if fields.get("ID") != "debian" or not fields.get("VERSION_CODENAME"):
        name = fields.get("PRETTY_NAME", "this system")
        raise BuildFailed(f"images are built on Debian 12 or 13, and this is {name}")
    return fields["VERSION_CODENAME"]


def host_sources(suite: str) -> list[Source]:
    """The host's Debian sources for `suite`, with updates and security; none when apt has no lists yet."""
    form = "|".join(f"$({field})" for field in FIELDS)
    said = run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"], seconds=APT_SECONDS)
    return parse_sources(said.decode().splitlines(), suite, keyrings=_host_keyrings)


def parse_sources(lines: Iterable[str], suite: str, *, keyrings: Callable[[str], tuple[str, ...]]) -> list[Source]:
    """The sources in the output of `apt-get indextargets` (`FIELDS`, separated by `|`) that are of Debian's `suite`.

    `keyrings` answers which keys the host trusts for an entry (`FILE:STANZA`).
    """
    components: dict[tuple[str, str, str], dict[str, None]] = {}
    for line in lines:
        fields = dict(zip(FIELDS, line.split("|"), strict=False))
        release = fields.get("RELEASE", "")
        if fields.get("ORIGIN") != "Debian" or release not in {suite, f"{suite}-updates", f"{suite}-security"}:
            continue
        key = (fields["REPO_URI"], release, fields["SOURCESENTRY"])
        components.setdefault(key, {})[fields["COMPONENT"]] = None
    return [
        Source(uri, release, tuple(names), keyrings(entry))
        for (uri, release, entry), names in components.items()
        if urlsplit(uri).scheme in {"http", "https"}
    ]


def host_apt_options() -> list[str]:
    """The host's apt settings that decide whether an archive can be reached (proxies, clocks), as `key "value";`."""
    said = run(["apt-config", "dump"], seconds=APT_SECONDS).decode()
    return parse_apt_options(said.splitlines())


def parse_apt_options(lines: Iterable[str]) -> list[str]:
    """Those lines of `apt-config dump` that say how to reach an archive."""
    found = (APT_OPTIONS.match(line) for line in lines)
    return [f'{match[1]} "{match[2]}";' for match in found if match and match[2]]


def _host_keyrings(entry: str) -> tuple[str, ...]:
    """The key files that the file of this entry names; for none of them apt takes those it trusts anyway."""
    try:
        text = Path(entry.rpartition(":")[0]).read_text()
    except OSError:
        return ()
    named = [path for value in SIGNED_BY.findall(text) for path in re.split(r"[,\s]+", value)]
    return tuple(path for path in dict.fromkeys(named) if path.startswith("/") and Path(path).is_file())
