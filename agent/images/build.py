"""Putting an image together from its three parts, each made only if it is not there yet."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from agent.images.cache import cached
from agent.images.files import digest_file, exclusive, remove_leftovers
from agent.images.initramfs import RECIPE as INITRAMFS_RECIPE
from agent.images.initramfs import initramfs
from agent.images.kernel import VMLINUX, Kernel, build_kernel, kernel_inputs
from agent.images.mirrors import host_suite
from agent.images.rootfs import MINIMAL, ROOTFS, Recipe, build_rootfs, rootfs_inputs
from agent.images.store import Artifact, Image, ImageStore, Parts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agent.images.cache import Part

INITRAMFS = "initramfs.cpio"


def build_images(
    store: Path,
    daemon: Path,
    *,
    progress: Callable[[str], None],
    recipe: Recipe = MINIMAL,
    refresh: bool = False,
) -> Image:
    """Make the image of `recipe` with `daemon` (the guest daemon's static binary) as its /init, or find it made.

    A changed daemon costs a new initramfs (well under a second), not a new root file system. `refresh` takes the
    kernel and the packages that the archive has today. Two builds at once: the second waits and finds all done.
    ImagesError says what failed.
    """
    suite = host_suite()
    with exclusive(store, on_wait=lambda: progress("another build is running: waiting for it")):
        remove_leftovers(store)
        kernel = cached(
            store,
            "kernel",
            inputs={"suite": suite, **kernel_inputs()},
            make=functools.partial(build_kernel, progress=progress),
            refresh=refresh,
        )
        rootfs = cached(
            store,
            "rootfs",
            inputs=rootfs_inputs(recipe, suite),
            make=functools.partial(build_rootfs, recipe, suite, progress=progress),
            refresh=refresh,
        )
        ramdisk = _initramfs(store, daemon, kernel, progress)
        parts = Parts(
            kernel=Artifact(kernel.path / VMLINUX, kernel.digest(VMLINUX)),
            initramfs=Artifact(ramdisk.path / INITRAMFS, ramdisk.digest(INITRAMFS)),
            rootfs=Artifact(rootfs.path / ROOTFS, rootfs.digest(ROOTFS)),
        )
        inputs = {"suite": suite, "kernel": kernel.record.details, "rootfs": rootfs.record.details}
        return ImageStore(store).publish(recipe.name, parts, disk_mb=recipe.disk_mb, inputs=inputs)


def _initramfs(store: Path, daemon: Path, kernel: Part, progress: Callable[[str], None]) -> Part:
    def make(_scratch: Path, into: Path) -> dict[str, Any]:
        progress("initramfs: packing the guest daemon and its modules")
        (into / INITRAMFS).write_bytes(initramfs(daemon.read_bytes(), Kernel(kernel.path).modules()))
        return {}

    modules = {name: kernel.digest(name) for name in kernel.record.files if name.startswith("modules/")}
    inputs = {"daemon": digest_file(daemon), "modules": modules, "recipe": INITRAMFS_RECIPE}
    return cached(store, "initramfs", inputs=inputs, make=make)
