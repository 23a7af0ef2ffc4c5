"""`python -m agent.images`: build the images of this host, list them, remove old ones."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from agent.images.build import build_images
from agent.images.errors import ImagesError
from agent.images.in_use import digests_in_use
from agent.images.rootfs import MINIMAL, Recipe
from agent.images.store import DEFAULT_STORE, ImageStore

DEFAULT_STATE = Path("/var/lib/capsule/agent")

store_option = click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_STORE,
    envvar="CAPSULE_AGENT_IMAGES",
    show_default=True,
    help="Where the images are kept.",
)


@click.group()
def main() -> None:
    """The images that this host's virtual machines boot from."""


@main.command()
@store_option
@click.option("--daemon", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
@click.option("--disk-mb", type=click.IntRange(512, 1 << 20), default=MINIMAL.disk_mb, show_default=True)
@click.option("--refresh", is_flag=True, help="Take the kernel and the packages that the archive has today.")
def build(store: Path, daemon: Path, disk_mb: int, *, refresh: bool) -> None:
    """Make the image `minimal`, or find it made."""
    started = time.monotonic()

    def progress(step: str) -> None:
        click.echo(f"[{time.monotonic() - started:6.1f} s] {step}", err=True)

    recipe = Recipe(MINIMAL.name, MINIMAL.packages, disk_mb)
    try:
        image = build_images(store.absolute(), daemon, progress=progress, recipe=recipe, refresh=refresh)
    except ImagesError as err:
        click.echo(f"{err}", err=True)
        sys.exit(1)
    click.echo(f"{image.name} {image.digest[:12]} {image.rootfs.parent}")


@main.command("list")
@store_option
def list_images(store: Path) -> None:
    """Print the newest image of each name."""
    for image in ImageStore(store).list():
        click.echo(f"{image.name} {image.digest[:12]} {image.disk_mb} MiB {image.created_at:%Y-%m-%d %H:%M}")


@main.command()
@store_option
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_STATE,
    envvar="CAPSULE_AGENT_STATE",
    show_default=True,
    help="The agent's state directory, where its sandboxes and snapshots are.",
)
@click.option("--keep", multiple=True, help="Digest of another old image that is still in use; may be repeated.")
def collect(store: Path, state: Path, keep: tuple[str, ...]) -> None:
    """Remove old images, except those that sandboxes or snapshots of the agent need and those named by --keep."""
    try:
        in_use = digests_in_use(state)
    except ImagesError as err:
        click.echo(f"{err}", err=True)
        sys.exit(1)
    for digest in ImageStore(store).collect(in_use | set(keep)):
        click.echo(f"removed {digest[:12]}")


if __name__ == "__main__":
    main()
