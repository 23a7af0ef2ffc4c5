"""`capsule template`: what sandboxes start from."""

from __future__ import annotations

import click

from capsule.cli.finding import SandboxId, find
from capsule.cli.output import ago, as_document, json_option, show, size, table, write
from capsule.cli.running import Command, run
from capsule.client import Template, TrioClient


class TemplateGroup(click.Group):
    """Its commands fail in one line, too."""

    command_class = Command


@click.group(cls=TemplateGroup)
def template() -> None:
    """Make, list and delete what sandboxes start from."""


@template.command("ls")
@json_option
def list_templates(*, as_json: bool) -> None:
    """List the platform's templates and your team's, newest first."""

    async def action(capsule: TrioClient) -> list[Template]:
        return [one async for one in capsule.templates.list()]

    found = run(action)
    write(as_document(found) if as_json else table(("NAME", "TYPE", "SIZE", "FROM", "AGE"), map(_row, found)))


@template.command()
@click.argument("sandbox_id", metavar="SANDBOX", type=SandboxId())
@click.argument("name", required=False)
@click.option("--pause", is_flag=True, help="Pause the sandbox as well; else it runs on.")
@json_option
def create(*, sandbox_id: str, name: str | None, pause: bool, as_json: bool) -> None:
    """Make a template of a sandbox as it is now; prints its name."""

    async def action(capsule: TrioClient) -> Template:
        return await capsule.templates.create(await find(capsule, sandbox_id), name, pause=pause)

    made = run(action)
    show(made, as_json=as_json, text=made.name)


@template.command()
@click.argument("name")
@json_option
def rm(*, name: str, as_json: bool) -> None:
    """Delete one of your team's templates."""

    async def action(capsule: TrioClient) -> None:
        await capsule.templates.delete(name)

    run(action)
    show({"name": name}, as_json=as_json, text=name)


def _row(one: Template) -> tuple[str, ...]:
    return one.name, one.type, size(one.size_bytes), "platform" if one.platform else "team", ago(one.created_at)
