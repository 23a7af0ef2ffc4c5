"""Text from guests and VMMs, made safe for an error message or a terminal."""

from __future__ import annotations


def printable(raw: bytes) -> str:
    """Decode what may be anything; keep printable characters, line ends and tabs."""
    text = raw.decode("utf-8", errors="replace").replace("\r\n", "\n")
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def last_lines(text: str, *, lines: int, characters: int) -> str:
    """Return the last lines that are not empty, at most so many characters."""
    kept = [line.strip() for line in text.splitlines() if line.strip()][-lines:]
    return "\n".join(kept)[-characters:]
