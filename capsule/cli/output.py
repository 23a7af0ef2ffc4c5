"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import base64
import errno
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def as_document(value: Any) -> str:
    """One JSON document on one line, shaped as the API has it."""
    return msgspec.json.encode(value).decode()


def as_text(name: str) -> str:
    """The name of a file as JSON can have it: bytes in it that are not UTF-8 are replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def show(value: Any, *, as_json: bool, text: str) -> None:
    """One answer: `value` as JSON, or `text`."""
    write(as_document(value) if as_json else text)


def write(text: str) -> None:
    """A line on stdout, at once: a broken pipe is noticed here, and not when the interpreter ends."""
    if sys.stdout is None:  # closed when we were started
        raise OSError(errno.EBADF, "our output is closed")
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two blanks between."""
    lines = [tuple(columns), *(tuple(printable(cell) for cell in row) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def fields(pairs: Iterable[tuple[str, Any]]) -> str:
    """One `name: value` per line; what is absent is left out."""
    present = [(name, printable(str(value))) for name, value in pairs if value is not None]
    width = max((len(name) for name, _ in present), default=0)
    return "\n".join(f"{name + ':':<{width + 1}}  {value}" for name, value in present)


def printable(text: str) -> str:
    """What others named cannot steer our terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def ago(moment: datetime, now: datetime | None = None) -> str:
    """How long ago, in its largest unit: `40s`, `5m`, `3h`, `12d`."""
    seconds = max(0, int(((now or datetime.now(UTC)) - moment).total_seconds()))
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def size(count: int) -> str:
    """Bytes for people: `12 B`, `3.4 MiB`."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def chunk_line(stream: str, data: bytes) -> bytes:
    """A piece of output as one line of JSON: `data`, or `data_b64` where the piece alone is not UTF-8."""
    piece: dict[str, str] = {"type": stream}
    try:
        piece["data"] = data.decode()
    except UnicodeDecodeError:
        piece["data_b64"] = base64.b64encode(data).decode()
    return msgspec.json.encode(piece) + b"\n"
