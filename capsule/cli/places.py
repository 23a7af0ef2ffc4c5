"""Where something is copied from or to: here, in a sandbox, or in our standard streams. The rules are scp's."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any

import click
from click.shell_completion import CompletionItem

from capsule.cli.finding import known

STANDARD = "-"


@dataclass(frozen=True, slots=True)
class Place:
    """A path; in a sandbox (what the user calls it) unless that is None. `-`: standard input or output."""

    sandbox: str | None
    path: str

    @property
    def standard(self) -> bool:
        """Whether it is one of our standard streams."""
        return self.sandbox is None and self.path == STANDARD

    @property
    def name(self) -> str:
        """Its last part; nothing for a root, `.` and `..`, whose content is meant."""
        last = posixpath.basename(self.path.rstrip("/"))
        return "" if last in (".", "..") else last

    def __str__(self) -> str:
        return self.path if self.sandbox is None else f"{self.sandbox}:{self.path}"


class PlaceType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """`SANDBOX:/path`, or a local path: one with a slash before the first colon, or without a colon."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        """Tell them apart; paths in a sandbox are absolute, there is no directory that they could begin in."""
        if isinstance(value, Place):
            return value
        head, colon, path = str(value).partition(":")
        if not value:
            raise click.BadParameter("there is no path without a name", ctx, param)
        if not colon or not head or "/" in head:
            return Place(None, value)
        if not path.startswith("/"):
            raise click.BadParameter(f"paths in a sandbox are absolute: {head}:/{path or '…'}", ctx, param)
        if ".." in path.split("/"):
            raise click.BadParameter(f"{value!r}: paths in a sandbox have no ..", ctx, param)
        return Place(head, path)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Local files, and sandboxes with their colon."""
        del ctx, param
        files = [CompletionItem(incomplete, type="file")]
        if ":" in incomplete or "/" in incomplete:
            return files
        return [*files, *(CompletionItem(f"{name}:", help=about) for name, about in known(incomplete))]
