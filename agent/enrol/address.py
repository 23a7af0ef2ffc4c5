"""Where the control plane is, where it dials us, and where we listen for that."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from agent.enrol.errors import AddressUnusable, UrlInvalid

LOCALHOST = "localhost"


def split_url(url: str) -> tuple[str, int]:
    """Host and port of a control plane's base URL. UrlInvalid says what is wrong with it."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as err:
        raise UrlInvalid(f"{url!r} is no URL: {err}") from err
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UrlInvalid(f"{url!r} is not the URL of a control plane, such as https://capsule.example")
    if parts.username is not None or parts.query or parts.fragment or any(not "!" <= c <= "~" for c in url):
        raise UrlInvalid(f"{url!r}: a control plane's URL has a host and perhaps a port and a path, nothing else")
    return parts.hostname, port or (443 if parts.scheme == "https" else 80)


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port`; an IPv6 address stands in brackets. AddressUnusable for anything else."""
    host, colon, digits = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    right = colon and bare and (":" in bare) == bracketed and digits.isascii() and digits.isdecimal()
    if not right or not 0 < int(digits) < 65536:
        raise AddressUnusable(f"{text!r} is no address: host:port, such as 192.0.2.7:7443 or [2001:db8::7]:7443")
    return bare, int(digits)


def join_address(host: str, port: int) -> str:
    """`host:port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine gets there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == LOCALHOST


def routed_address(host: str, port: int) -> str:
    """The address of this machine on the route to there. Blocks for a name's look-up; sends no packet.

    AddressUnusable when there is none.
    """
    trouble: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError as err:
        raise AddressUnusable(f"cannot look up {host}: {err.strerror}") from err
    for family, kind, protocol, _, target in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                address: str = probe.getsockname()[0]
        except OSError as err:
            trouble = err
            continue
        if not ipaddress.ip_address(address).is_link_local:
            return address
    said = "" if trouble is None else f" ({trouble.strerror})"
    raise AddressUnusable(f"no route to {host}{said}; mend it, or say with --address where this host can be dialled")


def is_ours(host: str) -> bool:
    """Whether this machine has the address; a name is none."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except (ValueError, OSError):
        return False
    return True


def choose_address(url: str, given: str, bind_host: str, bind_port: int) -> str:
    """What to tell the control plane: `given`, or else where we are bound, or else the address on the route to it.

    Blocks as `routed_address` does. AddressUnusable when nobody would listen there.
    """
    if given:
        host, port = split_address(given)
        if is_loopback(bind_host) and not is_loopback(host) and not is_ours(host):
            raise AddressUnusable(
                f"{host} is not an address of this machine: "
                "set CAPSULE_AGENT_BIND_HOST to the one that it is forwarded to (0.0.0.0 is all of them)"
            )
        return join_address(host, port)
    if bind_port == 0:
        raise AddressUnusable("CAPSULE_AGENT_BIND_PORT is 0, any port: say with --address where this host is dialled")
    if is_loopback(bind_host) or bind_host in {"0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
        return join_address(routed_address(*split_url(url)), bind_port)
    return join_address(bind_host, bind_port)


def listen_at(bind_host: str, bind_port: int, joined: str) -> tuple[str, int]:
    """Where to listen: as configured, unless that is loopback and this host has joined with another address."""
    if not joined or not is_loopback(bind_host):
        return bind_host, bind_port
    host, port = split_address(joined)
    return (bind_host, bind_port) if is_loopback(host) else (host, port)
