"""Base root file systems: a Debian tree made by mmdebstrap, turned into an ext4 image without mounting anything."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.images.commands import run, run_confined
from agent.images.mirrors import host_apt_options, host_sources

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agent.images.mirrors import Source

ROOTFS = "rootfs.ext4"
RECIPE = 1  # raise it when `finish` changes: cached root file systems are made anew
FORMAT_SECONDS = 300
LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")
KEPT = ("/usr/share/doc/*/copyright",)
# A journal, because guests are killed and copied while they run: without one a restored disk may need a repair that
# nobody is there to make. 16 MB of it costs nothing measurable; mke2fs's own choice for 2 GiB would be 64.
# The file is all holes, so nothing has to be zeroed: neither by mke2fs now nor by a guest's background thread later.
FORMAT = (
    *("-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "capsule-root"),
    *("-J", "size=16", "-E", "assume_storage_prezeroed=1"),
)
HOSTNAME = "capsule"
FILES = {
    "etc/hostname": f"{HOSTNAME}\n",
    "etc/hosts": f"127.0.0.1 localhost {HOSTNAME}\n::1 localhost ip6-localhost ip6-loopback\n",
    # A plain file, which the guest daemon fills in when the sandbox is configured.
    "etc/resolv.conf": "",
    # Empty means "not chosen yet": two sandboxes never share one.
    "etc/machine-id": "",
    "etc/fstab": "",
    "etc/apt/apt.conf.d/99capsule": 'APT::Install-Recommends "false";\nAcquire::Languages "none";\n',
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A base image: its name, the packages beyond Debian's minimum, and the size of its disk in MiB."""

    name: str
    packages: tuple[str, ...]
    disk_mb: int = 2048


MINIMAL = Recipe("minimal", ("python3", "iproute2", "ca-certificates", "procps", "curl", "vim-tiny"))


def rootfs_inputs(recipe: Recipe, suite: str) -> dict[str, Any]:
    """What decides how the file system is made, for the cache's key; not what the mirror has today."""
    return {
        "suite": suite,
        "packages": recipe.packages,
        "disk_mb": recipe.disk_mb,
        "left_out": (LEFT_OUT, KEPT),
        "format": FORMAT,
        "files": FILES,
        "recipe": RECIPE,
    }


def build_rootfs(
    recipe: Recipe, suite: str, work: Path, into: Path, *, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Make `into/rootfs.ext4`; `work` is a directory for what is not kept. Returns the packages. BuildFailed.

    Needs root, the network, and to mount (mmdebstrap's chroot); takes about half a minute.
    """
    tree = work / "tree"
    sources = host_sources(suite)
    run_confined(
        bootstrap_command(recipe, suite, tree, [source.line() for source in sources], host_apt_options()),
        on_line=lambda line: progress(f"{recipe.name}: {line.removeprefix('I: ')}"),
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "TMPDIR": str(work)} | _proxies(),
    )
    finish(tree, sources)
    progress(f"{recipe.name}: writing the file system")
    image = into / ROOTFS
    with image.open("wb") as file:
        file.truncate(recipe.disk_mb << 20)
    run(["mke2fs", *FORMAT, "-d", str(tree), str(image)], seconds=FORMAT_SECONDS)
    return {"packages": installed_packages(tree)}


def bootstrap_command(recipe: Recipe, suite: str, tree: Path, sources: list[str], apt_options: list[str]) -> list[str]:
    """The mmdebstrap call. Without sources it takes Debian's own archive."""
    excludes = [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
    includes = [f"--dpkgopt=path-include={pattern}" for pattern in KEPT]
    return [
        *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"),
        f"--include={','.join(recipe.packages)}",
        *excludes,
        *includes,
        # It needs gpg, and is only for archives that are given without their keys.
        *(["--skip=check/signed-by"] if sources else []),
        *(f"--aptopt={option}" for option in ('APT::Install-Recommends "false";', *apt_options)),
        *(suite, str(tree), *sources),
    ]


def finish(tree: Path, sources: list[Source]) -> None:
    """Turn mmdebstrap's tree into a guest's: nothing of this host or of the build is left in it."""
    (tree / "etc/apt/apt.conf.d/99mmdebstrap").unlink(missing_ok=True)
    for name, text in FILES.items():
        _write(tree / name, text)
    if sources:
        _write(tree / "etc/apt/sources.list", "".join(f"{source.public_line()}\n" for source in sources))
    for name in ("var/log", "var/cache/apt", "var/lib/apt/lists", "tmp", "run"):
        _empty(tree / name)


def installed_packages(tree: Path) -> dict[str, str]:
    """{package: version} in the tree, as its dpkg knows them."""
    argv = ["dpkg-query", f"--admindir={tree / 'var/lib/dpkg'}", "-W", "-f", "${Package} ${Version}\n"]
    return dict(line.split(" ", 1) for line in run(argv, seconds=60).decode().splitlines())


def _write(path: Path, text: str) -> None:
    """A new file: writing through a link would leave the tree and change the host."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o644)


def _empty(folder: Path) -> None:
    """Remove every file below `folder`, keeping directories: programs expect those that their packages made."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            path.unlink()


def _proxies() -> dict[str, str]:
    return {
        name: value for name, value in os.environ.items() if name.lower() in {"http_proxy", "https_proxy", "no_proxy"}
    }
