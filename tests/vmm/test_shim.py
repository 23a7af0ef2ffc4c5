"""The preloaded library: its build, and what it does in a process that is no VMM. The rest is test_restore's."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess

import pytest

from agent.vmm.shim import build
from agent.vmm.shim.build import ShimError, find_shim


@pytest.fixture(scope="module")
def shim(shim_directory):
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    return find_shim(shim_directory)


def run(shim, **settings):
    """Run `true` with the library preloaded."""
    environment = {"LD_PRELOAD": str(shim), **{f"CAPSULE_PAGES_{name}": value for name, value in settings.items()}}
    return subprocess.run(["true"], env=environment, capture_output=True, text=True, check=False)


def test_it_is_built_once(shim, monkeypatch):
    """Whole, readable by every VM's user, and found again without a compiler."""
    assert stat.S_IMODE(shim.stat().st_mode) == 0o644
    assert [path.name for path in shim.parent.iterdir()] == [shim.name]
    monkeypatch.setattr(build, "COMPILE_TIMEOUT", 0)
    assert find_shim(shim.parent) == shim


def test_our_umask_keeps_nobody_out(shim, tmp_path):
    """Else QEMU's user could not load it, and the VM would run without."""
    before = os.umask(0o077)
    try:
        path = find_shim(tmp_path / "shims")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_another_source_is_another_file(shim, monkeypatch, tmp_path):
    """A library in use is never replaced: its name is that of its content."""
    source = tmp_path / "pages.c"
    source.write_bytes(build.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(build, "SOURCE", source)
    assert build.shim_name() != shim.name


def test_a_compiler_that_is_missing_or_refuses_is_said(tmp_path, monkeypatch):
    """What to install; what the compiler said; what cannot be written. Nothing half-made stays."""
    monkeypatch.setattr(build, "COMPILER", "absent-gcc")
    with pytest.raises(ShimError, match="apt-get install gcc"):
        find_shim(tmp_path)
    source = tmp_path / "broken.c"
    source.write_text("int main(void) { return x; }\n")
    monkeypatch.setattr(build, "COMPILER", "gcc")
    monkeypatch.setattr(build, "SOURCE", source)
    with pytest.raises(ShimError, match="undeclared"):
        find_shim(tmp_path)
    assert list(tmp_path.iterdir()) == [source]
    with pytest.raises(ShimError, match="could not be made"):
        find_shim(source)


@pytest.mark.parametrize("name", ["with space", "with:colon"])
def test_a_directory_that_cannot_be_named_is_refused(tmp_path, name):
    """LD_PRELOAD would take such a name for two."""
    with pytest.raises(ShimError, match="without spaces"):
        find_shim(tmp_path / name)


def test_without_settings_it_does_nothing(shim):
    """A program that is no VMM runs as ever."""
    done = run(shim)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "settings",
    [
        {"DEVICE": "x", "MEMORY": "4096"},
        {"DEVICE": "-1", "MEMORY": "4096"},
        {"DEVICE": "3", "MEMORY": "4096x"},
        {"DEVICE": "3", "MEMORY": "99999999999999999999999"},
        {"DEVICE": "99999999999", "MEMORY": "4096"},
        {"DEVICE": "3"},
        {"DEVICE": "", "MEMORY": ""},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(shim, settings):
    """On boot a warning; with a page socket the end: without its memory a VM must not run."""
    done = run(shim, **settings)
    assert done.returncode == 0
    assert done.stderr.startswith("capsule-pages: settings: ")
    done = run(shim, SOCKET="/nowhere", **settings)
    assert done.returncode == 70


def test_a_program_that_maps_other_files_is_left_alone(shim):
    """Only QEMU's memory of exactly that size is meant: not any shared mapping of a file."""
    program = (
        "import mmap, os\n"
        "fd = os.memfd_create('other')\n"
        "os.ftruncate(fd, 8192)\n"
        "mmap.mmap(fd, 8192)[0] = 1\n"
        "fd = os.memfd_create('memory-backend-memfd')\n"
        "os.ftruncate(fd, 8192)\n"
        "mmap.mmap(fd, 4096)[0] = 1\n"
        "mmap.mmap(fd, 8192, prot=mmap.PROT_READ)[0]\n"
        "mmap.mmap(fd, 8192, flags=mmap.MAP_PRIVATE)[0] = 1\n"
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "CAPSULE_PAGES_DEVICE": "99",
        "CAPSULE_PAGES_MEMORY": "8192",
        "CAPSULE_PAGES_SOCKET": "/nowhere",
    }
    python = shutil.which("python3", path="/usr/bin:/bin") or shutil.which("python3")
    done = subprocess.run([python, "-S", "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    program = program.replace("prot=mmap.PROT_READ", "prot=mmap.PROT_READ | mmap.PROT_WRITE")
    done = subprocess.run([python, "-S", "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (70, "capsule-pages: userfaultfd: Bad file descriptor\n")
