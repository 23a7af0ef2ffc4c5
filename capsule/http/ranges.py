"""Range and If-Range (RFC 9110 §13.1.5, §14), which we understand on one POST as the RFC does on GET.

Only one range of bytes is served: of several, and of what cannot be read, the RFC lets us send the whole instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_POSITION = 2**63 - 1
"""Of a byte in a file."""

_FORM = re.compile(r"bytes=[ \t]*(?:([0-9]{1,40})-([0-9]{0,40})|-([0-9]{1,40}))[ \t]*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `first` to `last` of `size`, all counted from 0."""

    first: int
    last: int
    size: int

    @property
    def length(self) -> int:
        """How many they are."""
        return self.last - self.first + 1

    @property
    def content_range(self) -> str:
        """The header Content-Range."""
        return f"bytes {self.first}-{self.last}/{self.size}"


@dataclass(frozen=True, slots=True)
class Range:
    """What a client asks for: from `first` to `last` (None: to the end), or the last `suffix` bytes."""

    first: int = 0
    last: int | None = None
    suffix: int | None = None

    @property
    def wanted(self) -> int | None:
        """How many bytes from `first` on, None for all."""
        return None if self.last is None else self.last - self.first + 1

    def within(self, size: int) -> Span | None:
        """Of a file with `size` bytes; None when it has none of them."""
        if self.suffix is not None:
            return Span(max(0, size - self.suffix), size - 1, size) if self.suffix and size else None
        if self.first >= size:
            return None
        return Span(self.first, size - 1 if self.last is None else min(self.last, size - 1), size)


def parse(header: str | None) -> Range | None:
    """A Range header; None when there is none that we serve: then the whole is sent."""
    found = _FORM.fullmatch(header or "")
    if found is None:
        return None
    first, last, suffix = found.groups()
    if suffix is not None:
        return Range(suffix=min(int(suffix), MAX_POSITION))
    if not last:
        return Range(first=min(int(first), MAX_POSITION))
    if int(last) < int(first):
        return None
    return Range(first=min(int(first), MAX_POSITION), last=min(int(last), MAX_POSITION - 1))


def etag(version: str | None) -> str | None:
    """The ETag of a version, strong: a file's inode, size and time of change."""
    return None if version is None else f'"{version}"'


def still(if_range: str | None, version: str | None) -> bool:
    """Whether a range may be served: the client names no version, or this one. A date never matches, we send none."""
    return if_range is None or if_range.strip() == etag(version)
