"""Sandboxes by what people type: `sb-` and a UUID, its hex digits, or the first of them."""

from __future__ import annotations

import os
import re

import click
import trio
from click.shell_completion import CompletionItem

from capsule.cli.failures import Failure
from capsule.client import CapsuleError, TrioClient, TrioSandbox

SHORTEST = 4
DIGITS = 32
SHOWN = 5
COMPLETION_SECONDS = 2.0


class SandboxId(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A sandbox on the command line. Checked when it is asked for; the shell completes it."""

    name = "sandbox"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Those that there are, with their status. Nothing when the server is not there at once."""
        del ctx, param
        return [CompletionItem(name, help=about) for name, about in known(incomplete)]


def known(incomplete: str) -> list[tuple[str, str]]:
    """Ids that begin so, with a word on each; none when that cannot be found out in time."""

    async def ask() -> list[tuple[str, str]]:
        with trio.move_on_after(COMPLETION_SECONDS):
            async with TrioClient() as capsule:
                found = [one.info async for one in capsule.sandboxes.list()]
                return [(one.id, f"{one.status} {one.template}") for one in found if one.id.startswith(incomplete)]
        return []

    try:
        return trio.run(ask)
    except (CapsuleError, OSError, ExceptionGroup):
        if os.environ.get("CAPSULE_DEBUG"):
            raise
        return []


async def find(capsule: TrioClient, text: str) -> TrioSandbox:
    """The one sandbox that is meant. Failure when there is none, or more than one."""
    digits = re.sub("-", "", text.removeprefix("sb-")).lower()
    if not re.fullmatch("[0-9a-f]+", digits) or len(digits) > DIGITS:
        raise Failure(f"{text!r} is not the id of a sandbox: sb-…, or at least its first {SHORTEST} digits")
    if len(digits) == DIGITS:
        return await capsule.sandboxes.get(digits)
    if len(digits) < SHORTEST:
        raise Failure(f"{text!r} is too short: give at least {SHORTEST} digits of the sandbox's id")
    found = [one async for one in capsule.sandboxes.list() if _digits(one.id).startswith(digits)]
    if not found:
        raise Failure(
            f"no sandbox begins with {text!r}; `capsule sandbox ls` lists them, stopped ones need the whole id"
        )
    if len(found) > 1:
        names = ", ".join(one.id for one in found[:SHOWN]) + (", …" if len(found) > SHOWN else "")
        raise Failure(f"{text!r} may be any of {len(found)} sandboxes: {names}")
    return found[0]


def _digits(sandbox_id: str) -> str:
    return sandbox_id.removeprefix("sb-").replace("-", "")
