"""The HTTP calls of a host to its control plane: register, refresh, heartbeat. One time-out covers a whole call."""

from __future__ import annotations

import base64
import math
import time
from typing import TYPE_CHECKING, Annotated, Any, Self

import httpx
import msgspec
import trio

from agent.enrol.credentials import Credentials
from agent.enrol.errors import NO_CODE, ControlPlaneRefused, ControlPlaneUnreachable, CredentialsInvalid
from agent.enrol.identity import certificate_request, check_identity, new_key
from agent.enrol.resolver import OwnThreads

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

CALL_TIMEOUT = 10.0
"""Seconds for one call, all of it: a heartbeat that takes longer has missed its purpose."""

CLOSE_TIMEOUT = 2.0
"""Seconds for saying goodbye on idle connections, also while we are being cancelled."""

MAX_ANSWER_BYTES = 256 * 1024
"""The largest answer (two certificates) has about 4 KiB."""

DEFAULT_LIFETIME = 24 * 3600.0
"""Seconds a token is taken to live when it does not say so itself."""

TRY_AGAIN = frozenset({408, 425, 429})
"""Client-error statuses that say "later", not "no"."""


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What this machine brings into the fleet."""

    arch: str
    cpu_cores: int
    memory_mb: int
    disk_gb: int


Token = Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,4096}$")]
"""Goes into a header as it is."""


class _Host(msgspec.Struct, frozen=True):
    id: Annotated[str, msgspec.Meta(pattern=r"^host-[0-9a-f-]{36}$")]


class _Enrolled(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of register and refresh; a refresh may leave the certificates as they were."""

    host: _Host
    token: Token
    refresh_token: Token
    cert_pem: str = ""
    ca_cert_pem: str = ""


class _ErrorBody(msgspec.Struct, frozen=True):
    code: str = NO_CODE
    message: str = ""


class _ErrorAnswer(msgspec.Struct, frozen=True):
    error: _ErrorBody


class ControlPlane:
    """A client of the hosts' part of the API; an async context manager that owns its connections.

    Every call raises ControlPlaneRefused or ControlPlaneUnreachable, nothing else.
    """

    def __init__(
        self,
        url: str,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.url = url.rstrip("/")
        self._wall = wall
        # No compression: it lets a small answer grow large. _post bounds the time of a whole call.
        identity = {"Accept-Encoding": "identity"}
        self._http = httpx.AsyncClient(transport=transport, timeout=None, headers=identity)  # noqa: S113

    async def __aenter__(self) -> Self:
        trio.socket.set_custom_hostname_resolver(OwnThreads())  # of this whole run; httpx lets nobody choose
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            await self._http.__aexit__(kind, error, trace)

    async def register(self, token: str, address: str, capacity: Capacity) -> Credentials:
        """Spend a one-time registration token. `address` (host:port): where the control plane will dial us."""
        key_pem = new_key()
        body = {
            "token": token,
            "address": address,
            **msgspec.structs.asdict(capacity),
            "csr_pem": certificate_request(key_pem),
        }
        answer = _decoded(await self._post("/v1/hosts/register", body))
        return self._credentials(answer, key_pem=key_pem)

    async def refresh(self, old: Credentials) -> Credentials:
        """Spend the refresh token; a new certificate for the same key comes along.

        Safe to repeat with the same `old`: the control plane knows an answer that was lost by the key that asks again.
        """
        body = {"refresh_token": old.refresh_token, "csr_pem": certificate_request(old.key_pem)}
        answer = _decoded(await self._post("/v1/hosts/auth/refresh", body))
        return self._credentials(answer, key_pem=old.key_pem, old=old)

    async def heartbeat(self, credentials: Credentials) -> None:
        """Say that this host is alive."""
        headers = {"X-Host-Token": credentials.token}
        await self._post(f"/v1/hosts/{credentials.host_id}/heartbeat", None, headers=headers)

    def _credentials(self, answer: _Enrolled, *, key_pem: str, old: Credentials | None = None) -> Credentials:
        credentials = Credentials(
            url=self.url,
            host_id=answer.host.id,
            token=answer.token,
            token_received_at=self._wall(),
            token_lifetime=_lifetime(answer.token),
            refresh_token=answer.refresh_token,
            key_pem=key_pem,
            cert_pem=answer.cert_pem or (old.cert_pem if old else ""),
            ca_cert_pem=answer.ca_cert_pem or (old.ca_cert_pem if old else ""),
            address=old.address if old else "",
        )
        try:
            check_identity(credentials)
        except CredentialsInvalid as err:
            raise ControlPlaneUnreachable(f"{self.url} answered with unusable certificates: {err}") from err
        return credentials

    async def _post(self, path: str, body: dict[str, Any] | None, *, headers: dict[str, str] | None = None) -> bytes:
        """The body of a 2xx answer."""
        try:
            with trio.fail_after(CALL_TIMEOUT):
                async with self._http.stream("POST", self.url + path, json=body, headers=headers) as response:
                    content = await _bounded(response)
        except trio.TooSlowError as err:
            raise ControlPlaneUnreachable(f"no answer from {self.url} in {CALL_TIMEOUT:g} s") from err
        except (httpx.HTTPError, httpx.InvalidURL) as err:
            raise ControlPlaneUnreachable(f"cannot reach {self.url}: {str(err) or type(err).__name__}") from err
        if response.is_success:
            return content
        if response.is_client_error and response.status_code not in TRY_AGAIN:
            raise _refusal(response.status_code, content)
        raise ControlPlaneUnreachable(f"{self.url} answered HTTP {response.status_code}")


async def _bounded(response: httpx.Response) -> bytes:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ControlPlaneUnreachable(f"{response.url.host} sent a compressed answer, which nobody asked for")
    content = b""
    with trio.CancelScope() as too_long:  # leaving the loop instead would leave httpx's nested generators open
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > MAX_ANSWER_BYTES:
                too_long.cancel()
    if len(content) > MAX_ANSWER_BYTES:  # after its last chunk nobody saw the cancellation
        raise ControlPlaneUnreachable(f"{response.url.host} sent an answer that is no control plane's")
    return content


def _decoded(content: bytes) -> _Enrolled:
    try:
        return msgspec.json.decode(content, type=_Enrolled)
    except msgspec.MsgspecError as err:
        raise ControlPlaneUnreachable(f"the answer is no control plane's: {err}") from err


def _refusal(status: int, content: bytes) -> ControlPlaneRefused:
    try:
        error = msgspec.json.decode(content, type=_ErrorAnswer).error
    except msgspec.MsgspecError:
        error = _ErrorBody(message="no reason given; is this the URL of a control plane?")
    return ControlPlaneRefused(status, error.code, error.message)


def _lifetime(token: str) -> float:
    """Seconds from `iat` to `exp` of a JWT. Unverified: it is our own token, and only tells when to refresh it."""
    try:
        payload = token.split(".")[1]
        claims = msgspec.json.decode(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        seconds = float(claims["exp"]) - float(claims["iat"])
    except (ValueError, IndexError, KeyError, TypeError, msgspec.MsgspecError):
        return DEFAULT_LIFETIME
    return seconds if math.isfinite(seconds) and seconds > 0 else DEFAULT_LIFETIME
