"""Settings of the control plane: `CAPSULE_…` variables, with a `.env` file beneath them."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from agent.actor.settings import SettingsError, load_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "CAPSULE_"

MIN_SECRET_KEY = 32
"""Characters. Everything signed or encrypted hangs on this key; 32 hex digits are 128 bits."""

HOW_TO_MAKE_A_KEY = "make one with: python3 -c 'import secrets; print(secrets.token_hex(32))'"

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Factor = Annotated[float, msgspec.Meta(gt=0)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator can set. `CAPSULE_DATABASE_URL` and `CAPSULE_SECRET_KEY` have no default."""

    database_url: str
    """postgresql://… of the database that holds everything."""
    redis_url: str = ""
    """redis://…, rediss://… or unix://… that keeps the one-time tokens of hosts; empty: the database does. The same for
    all control planes of one database."""
    secret_key: Annotated[str, msgspec.Meta(min_length=MIN_SECRET_KEY)]
    """Root of every signature and of the encryption of the CA's private key. All control planes of one database
    share it; with another one hosts and sessions must be enrolled afresh."""
    bind: str = "127.0.0.1:8080"
    """host:port the HTTP server listens on."""
    public_url: str = ""
    """How browsers and agents reach us; empty for http://<bind>."""
    allowed_origins: str = ""
    """Origins (https://app.example), separated by commas, whose pages may open WebSockets here, beside our own."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False
    create_timeout: Seconds = 120.0
    """Seconds a create may take, from the request to a running sandbox."""
    pause_timeout: Seconds = 300.0
    """Seconds a pause or a snapshot may take: the guest's changed memory is written to a disk."""
    resume_timeout: Seconds = 120.0
    """Seconds a resume may take, from the request to a running sandbox."""
    call_timeout: Seconds = 30.0
    """Seconds for every other short call to an agent."""
    connect_timeout: Seconds = 5.0
    """Seconds for dialling an agent: TCP, TLS and the peer's HELLO."""
    link_idle_timeout: Seconds = 300.0
    """Seconds after which an unused link to an agent is closed."""
    heartbeat_interval: Seconds = 30.0
    """Seconds between the heartbeats of an agent."""
    heartbeat_timeout: Seconds = 90.0
    """Seconds of silence after which a host counts as unreachable: three heartbeats."""
    host_token_lifetime: Annotated[float, msgspec.Meta(ge=60, le=5_184_000)] = 604_800.0
    """Seconds a host's token is good for, no longer than the refresh token; agents renew theirs at half of that. What
    was signed keeps its own."""
    trusted_proxies: str = ""
    """Networks (CIDR, separated by commas) of reverse proxies whose X-Forwarded-For names the client."""
    rate_limits: str = ""
    """Rules that differ from the usual ones, as rule=attempts/seconds, separated by commas; their names are in
    capsule.auth.rate_limits."""
    argon2_memory_kib: Annotated[int, msgspec.Meta(ge=8, le=4_194_304)] = 65_536
    """KiB that hashing one password takes. These three change what later logins store, and cost."""
    argon2_time_cost: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3
    """Passes over that memory."""
    argon2_parallelism: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Lanes of that memory; argon2 uses a thread for each."""
    password_threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    """Passwords that are hashed at the same time; 64 more wait, others are told to try again."""
    shutdown_timeout: Seconds = 30.0
    """Seconds a shutdown may take before the process ends anyhow."""
    disk_mb: Annotated[int, msgspec.Meta(ge=1)] = 2048
    """MiB of a new sandbox's disk: what base images are built with."""
    spool: str = "/var/tmp"  # noqa: S108 - files in it have no name
    """Where uploads wait for their last byte: on a disk, not in memory as /tmp often is."""
    vcpu_overcommit: Factor = 8.0
    """Virtual CPUs sold per core: sandboxes idle most of the time."""
    memory_overcommit: Factor = 1.0
    """Memory is not sold twice unless asked: a host that runs out of it kills guests."""
    disk_overcommit: Factor = 4.0
    """Overlays are sparse; few sandboxes fill their disk."""
    scheduler: Literal["round_robin", "least_loaded"] = "round_robin"
    """Which of the hosts that fit gets a new sandbox: the next in turn, or the one with the most room."""
    max_teams_per_user: Annotated[int, msgspec.Meta(ge=1)] = 50
    """Teams that a user may own; those that were deleted do not count."""
    github_client_id: str = ""
    """Of the OAuth app that people sign in with; empty: nobody signs in through GitHub."""
    github_client_secret: str = ""
    github_url: str = "https://github.com"
    """Where GitHub asks people whether they want to sign in; an Enterprise server's own address."""
    github_api_url: str = "https://api.github.com"
    """Its API; an Enterprise server's is https://<its name>/api/v3."""

    @property
    def bind_address(self) -> tuple[str, int]:
        """Host and port of `bind`."""
        return split_address(self.bind)

    @property
    def trusted_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """`trusted_proxies` in parts; ValueError says what is wrong."""
        return tuple(ip_network(part.strip()) for part in self.trusted_proxies.split(",") if part.strip())

    @property
    def origins(self) -> tuple[str, ...]:
        """`allowed_origins` in parts, and our own; ValueError says what is wrong."""
        given = [part.strip() for part in self.allowed_origins.split(",") if part.strip()]
        for text in given:
            if not _is_origin(text):
                raise ValueError(f"{text!r} is no origin; give them like https://app.example, with commas")
        own = urlsplit(self.url)
        return (f"{own.scheme}://{own.netloc.rpartition('@')[2]}", *given)

    @property
    def url(self) -> str:
        """Base URL of the API for users and agents, without a slash at the end."""
        return self.public_url.rstrip("/") or f"http://{self.bind}"

    def derive_key(self, purpose: str) -> bytes:
        """32 bytes for one purpose; keys of two purposes tell nothing about each other (HKDF, RFC 5869)."""
        info = b"capsule/" + purpose.encode()
        return HKDF(SHA256(), length=32, salt=None, info=info).derive(self.secret_key.encode())

    def __repr__(self) -> str:
        """Keep the key and the database's password out of tracebacks and logs."""
        return f"Settings(bind={self.bind!r}, public_url={self.public_url!r})"


def load(values: Mapping[str, str]) -> Settings:
    """Settings from environment variables; SettingsError names the variable and says what to do."""
    if len(values.get(PREFIX + "SECRET_KEY", "")) < MIN_SECRET_KEY:
        raise SettingsError(f"{PREFIX}SECRET_KEY must be at least {MIN_SECRET_KEY} characters; {HOW_TO_MAKE_A_KEY}")
    settings = load_settings(Settings, values, prefix=PREFIX)
    try:
        split_address(settings.bind)
    except ValueError as err:
        raise SettingsError(f"{PREFIX}BIND: {err}") from err
    try:
        _ = settings.trusted_networks
    except ValueError as err:
        raise SettingsError(f"{PREFIX}TRUSTED_PROXIES: {err}; give networks like 10.0.0.0/8, with commas") from err
    try:
        _ = settings.origins
    except ValueError as err:
        raise SettingsError(f"{PREFIX}ALLOWED_ORIGINS: {err}") from err
    if settings.argon2_memory_kib < 8 * settings.argon2_parallelism:
        raise SettingsError(f"{PREFIX}ARGON2_MEMORY_KIB must be at least 8 for each of {PREFIX}ARGON2_PARALLELISM")
    if settings.public_url and urlsplit(settings.public_url).scheme not in {"http", "https"}:
        raise SettingsError(f"{PREFIX}PUBLIC_URL must start with http:// or https://")
    _check_redis(settings.redis_url)
    _check_github(settings)
    return settings


def _check_github(settings: Settings) -> None:
    """SettingsError when signing in through GitHub is configured by half."""
    if bool(settings.github_client_id) != bool(settings.github_client_secret):
        given, missing = ("ID", "SECRET") if settings.github_client_id else ("SECRET", "ID")
        raise SettingsError(
            f"{PREFIX}GITHUB_CLIENT_{given} is set without {PREFIX}GITHUB_CLIENT_{missing}; set both, or neither"
        )
    if settings.github_client_id and not settings.public_url:
        raise SettingsError(
            f"{PREFIX}PUBLIC_URL must be set for signing in through GitHub: it sends people back to that address"
        )
    for name, url in (("GITHUB_URL", settings.github_url), ("GITHUB_API_URL", settings.github_api_url)):
        if not _is_base_url(url):
            raise SettingsError(f"{PREFIX}{name} must be like https://github.example, without a query")


def _check_redis(url: str) -> None:
    """SettingsError for what cannot be Redis's address; nothing of it is quoted: it may have a password."""
    try:
        parts = urlsplit(url)
        sound = not url or (parts.scheme in {"redis", "rediss"} and bool(parts.hostname) and parts.port != 0)
        sound = sound or (parts.scheme == "unix" and parts.path.startswith("/"))
    except ValueError:
        sound = False
    if not sound:
        raise SettingsError(f"{PREFIX}REDIS_URL must be like redis://host:6379/0, rediss://host:6379 or unix:///path")


def _is_base_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:  # a bracket without its other half
        return False
    return parts.scheme in {"http", "https"} and bool(parts.netloc) and not parts.query and not parts.fragment


def _is_origin(text: str) -> bool:
    """Scheme, host and port, and nothing else."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # ValueError for what is none
    except ValueError:
        return False
    return (
        parts.scheme in {"http", "https"}
        and bool(parts.hostname)
        and text == f"{parts.scheme}://{parts.netloc}"
        and ("@" not in text)
    )


def split_address(text: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` in two parts; ValueError says what is wrong."""
    host, separator, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not separator or not host or ("[" in host or "]" in host) or (":" in host and not text.startswith("[")):
        raise ValueError(f"{text!r} is not host:port (an IPv6 address goes into brackets)")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536):
        raise ValueError(f"{port!r} is not a port (at most 65535)")
    return host, int(port)
