"""`collect` spares the images of what the agent keeps: running and paused sandboxes, and snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from click.testing import CliRunner

from agent.images.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path

OLD, PAUSED, NAMED, NEW = (letter * 64 for letter in "abcd")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three old images and a new one."""
    folder = tmp_path / "store" / "minimal"
    for digest in (OLD, PAUSED, NAMED, NEW):
        (folder / digest).mkdir(parents=True)
    (folder / "current").symlink_to(NEW)
    return tmp_path / "store"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """An agent's, with a paused sandbox and a snapshot."""
    state = tmp_path / "state"
    for name, digest in (("sandboxes/one/record.json", PAUSED), ("snapshots/snapshots/two/manifest.json", NAMED)):
        (state / name).parent.mkdir(parents=True)
        (state / name).write_bytes(msgspec.json.encode({"image_digest": digest}))
    return state


def test_images_in_use_are_not_collected(store: Path, state: Path) -> None:
    """Nobody has to name them."""
    done = CliRunner().invoke(main, ["collect", "--store", str(store), "--state", str(state)])
    assert done.exit_code == 0, done.output
    assert done.output == f"removed {OLD[:12]}\n"
    assert {path.name for path in (store / "minimal").iterdir()} == {PAUSED, NAMED, NEW, "current"}


def test_nothing_is_collected_when_that_is_not_known(store: Path, state: Path) -> None:
    """A record that tells nothing is named, and every image stays."""
    (state / "sandboxes/one/record.json").write_bytes(b"")
    done = CliRunner().invoke(main, ["collect", "--store", str(store), "--state", str(state)])
    assert done.exit_code == 1
    assert "sandboxes/one/record.json" in done.output
    assert (store / "minimal" / OLD).exists()
