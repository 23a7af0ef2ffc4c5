"""The guest kernel, taken out of Debian's cloud kernel package without installing that package on the host."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent.images.bzimage import decompress, extract_vmlinux
from agent.images.commands import run
from agent.images.errors import BuildFailed, KernelUnusable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

META_PACKAGE = "linux-image-cloud-amd64"
# What the guest needs before its root is mounted; what the kernel has built in is left out by modprobe.
MODULES = ("virtio_mmio", "virtio_blk", "virtio_net", "ext4")
# The packages that carry a kernel's files: one up to 6.12, apart in later kernels.
KERNEL_PACKAGE = re.compile(r"^linux-(?:image|binary|modules)-[0-9]")
RECIPE = 1  # raise it when what is taken out of the package changes: cached kernels are made anew
DOWNLOAD_SECONDS = 600
UNPACK_SECONDS = 120

VMLINUX = "vmlinux"
MODULES_DIRECTORY = "modules"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel's files in a directory: `vmlinux`, `modules/<name>.ko` and `modules/order`."""

    path: Path

    @property
    def vmlinux(self) -> Path:
        """The uncompressed ELF file."""
        return self.path / VMLINUX

    def modules(self) -> list[tuple[str, bytes]]:
        """(file name, content) of each module, in load order."""
        base = self.path / MODULES_DIRECTORY
        return [(name, (base / name).read_bytes()) for name in (base / "order").read_text().split()]


def build_kernel(work: Path, into: Path, *, progress: Callable[[str], None]) -> dict[str, str]:
    """Download, unpack and extract into the existing directory `into`; returns {package: version} for the record.

    `work` is a directory for what is not kept. BuildFailed or KernelUnusable.
    """
    packages = resolve(META_PACKAGE, depends=_apt_depends)
    progress(f"kernel: downloading {', '.join(packages)}")
    tree = _unpack(_download(list(packages), work), work / "tree")
    progress("kernel: extracting vmlinux and modules")
    release = _release(tree)
    image = tree / "boot" / f"vmlinuz-{release}"
    (into / VMLINUX).write_bytes(extract_vmlinux(image.read_bytes()))
    target = into / MODULES_DIRECTORY
    target.mkdir()
    names = []
    for source in load_order(tree, release, MODULES):
        name = source.name.split(".ko")[0] + ".ko"
        content = source.read_bytes()
        (target / name).write_bytes(content if source.name.endswith(".ko") else decompress(content))
        names.append(name)
    (target / "order").write_text("".join(f"{name}\n" for name in names))
    return packages


def kernel_inputs() -> dict[str, object]:
    """What decides how the kernel is made, for the cache's key; not which version the mirror has today."""
    return {"package": META_PACKAGE, "modules": MODULES, "recipe": RECIPE}


def resolve(package: str, *, depends: Callable[[str], tuple[str, list[str]]]) -> dict[str, str]:
    """{name: version} of the packages that hold the kernel `package` stands for.

    `depends` answers (version, names it depends on) for a package.
    """
    found: dict[str, str] = {}
    seen, ahead = {package}, [package]
    while ahead:
        name = ahead.pop()
        version, names = depends(name)
        if KERNEL_PACKAGE.match(name):
            found[name] = version
        fresh = [other for other in names if KERNEL_PACKAGE.match(other) and other not in seen]
        seen.update(fresh)
        ahead += fresh
    if not found:
        raise BuildFailed(f"{package} stands for no kernel: is this Debian, and did apt-get update succeed?")
    return dict(sorted(found.items()))


def load_order(tree: Path, release: str, wanted: Sequence[str]) -> list[Path]:
    """The module files of `wanted` and of all they need, each after what it needs, as modprobe would load them."""
    run(["depmod", "-b", str(tree), release], seconds=UNPACK_SECONDS)
    files: dict[Path, None] = {}
    for module in wanted:
        argv = ["modprobe", "-d", str(tree), "-S", release, "--show-depends", module]
        for line in run(argv, seconds=UNPACK_SECONDS).decode().splitlines():
            action, _, rest = line.partition(" ")
            if action == "insmod":
                files[Path(rest.split()[0])] = None
    return list(files)


def _apt_depends(package: str) -> tuple[str, list[str]]:
    said = run(["apt-cache", "show", "--no-all-versions", package], seconds=60).decode()
    fields = dict(re.findall(r"^(Version|Depends): (.*)$", said, re.MULTILINE))
    if "Version" not in fields:
        raise BuildFailed(f"apt knows no package {package}: is this Debian, and did apt-get update succeed?")
    alternatives = re.split(r"[,|]", fields.get("Depends", ""))
    return fields["Version"], [name.split()[0] for name in alternatives if name.strip()]


def _download(packages: list[str], work: Path) -> list[Path]:
    """The package files. apt drops to its own user for this, which therefore must be able to write there."""
    folder = work / "packages"
    folder.mkdir()
    work.chmod(0o755)
    # Where apt's user does not exist apt downloads as root by itself.
    subprocess.run(["chown", "_apt", str(folder)], check=False, capture_output=True)
    run(["apt-get", "download", "-q", "-o", "Acquire::Retries=3", *packages], cwd=folder, seconds=DOWNLOAD_SECONDS)
    return sorted(folder.glob("*.deb"))


def _unpack(packages: list[Path], tree: Path) -> Path:
    tree.mkdir()
    for package in packages:
        run(["dpkg-deb", "-x", str(package), str(tree)], seconds=UNPACK_SECONDS)
    # Packages of Debian 12 have /lib/modules, later ones /usr/lib/modules; kmod looks into one, its own.
    if (tree / "usr/lib/modules").is_dir() and not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")
    elif (tree / "lib/modules").is_dir() and not (tree / "usr/lib").exists():
        (tree / "usr").mkdir(exist_ok=True)
        (tree / "usr/lib").symlink_to("../lib")
    return tree


def _release(tree: Path) -> str:
    images = sorted((tree / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise KernelUnusable(f"expected one kernel in the package, found {len(images)}")
    return images[0].name.removeprefix("vmlinuz-")
