"""Where the server is and who asks: arguments, then the environment, then the file that `capsule login` writes."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from capsule.client.errors import ConfigurationError

URL_VARIABLE = "CAPSULE_URL"
KEY_VARIABLE = "CAPSULE_API_KEY"
FILE_VARIABLE = "CAPSULE_CONFIG"
MAX_FILE = 64 * 1024


class StoredCredentials(Struct, frozen=True, kw_only=True):
    """What the file holds. The key stays out of the repr."""

    url: str
    api_key: str

    def __repr__(self) -> str:
        return f"StoredCredentials(url={self.url!r})"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client goes on with. At most one of `api_key` and `token` (of a session) counts: the key."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries; empty for somebody without credentials."""
        if self.api_key is not None:
            return {"X-API-Key": self.api_key}
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}


def credentials_path() -> Path:
    """`$CAPSULE_CONFIG`, else `~/.config/capsule/credentials.json`. ConfigurationError where there is no home."""
    named = os.environ.get(FILE_VARIABLE)
    try:
        return Path(named) if named else Path.home() / ".config" / "capsule" / "credentials.json"
    except RuntimeError:
        raise ConfigurationError(f"you have no home directory: set {FILE_VARIABLE}, or HOME") from None


def load(path: Path | None = None) -> StoredCredentials | None:
    """What the file holds, None without one. ConfigurationError for one that cannot be read or is not one of ours."""
    path = path or credentials_path()
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_FILE), type=StoredCredentials)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigurationError(f"{path}: {exc.strerror}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError):
        problem = f"{path} is not a credentials file; run `capsule login` again"
    raise ConfigurationError(problem)  # not from the decoder's error, which may quote what it read


def save(credentials: StoredCredentials, path: Path | None = None) -> Path:
    """Write the file for its owner alone (0600), in one step: whoever reads it sees the old one or the new one."""
    path = path or credentials_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(credentials), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return path


def forget(path: Path | None = None) -> bool:
    """Remove the file; whether there was one."""
    with contextlib.suppress(FileNotFoundError):
        (path or credentials_path()).unlink()
        return True
    return False


def resolve(url: str | None = None, api_key: str | None = None, token: str | None = None) -> Credentials:
    """Arguments, then the environment, then the file. The file's key goes to the file's server only.

    ConfigurationError without a URL; there may be no credential: logging in needs none.
    """
    url = url or os.environ.get(URL_VARIABLE) or None
    if api_key is None and token is None:
        api_key = os.environ.get(KEY_VARIABLE) or None
    if url is None or (api_key is None and token is None):
        stored = load()
        if stored is not None:
            same = url is None or normal_url(url) == normal_url(stored.url)
            if same and api_key is None and token is None:
                api_key = stored.api_key
            url = url or stored.url
    if url is None:
        raise ConfigurationError(f"no server is known: give `url`, set {URL_VARIABLE}, or run `capsule login`")
    for name, text in (("API key", api_key), ("token", token)):
        if text is not None and not (text.isascii() and text.isprintable() and text and " " not in text):
            raise ConfigurationError(f"the {name} has characters that none has")
    return Credentials(normal_url(url), api_key, token)


def normal_url(url: str) -> str:
    """`https://host[:port][/prefix]`, without a slash at the end. ConfigurationError for anything else."""
    try:
        parts = urlsplit(url.strip())
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        good = good and "@" not in parts.netloc and not parts.query and not parts.fragment
    except ValueError:
        good = False
    if not good:
        raise ConfigurationError("the URL of a server is http:// or https://, a host, and perhaps a port and a path")
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"
