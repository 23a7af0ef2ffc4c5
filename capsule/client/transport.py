"""HTTP: one pool of connections, typed errors, and retries where they are safe."""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit
from uuid import uuid4

import httpx
import msgspec
import trio

from capsule.client.credentials import KEY_VARIABLE, Credentials
from capsule.client.errors import ApiError, CapsuleError, ConfigurationError, ConnectionLost, Unavailable, api_error

T = TypeVar("T")

CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 60.0
"""Seconds without a byte from the server, where it has no longer limit of its own."""
LONG_TIMEOUT = 150.0
"""For what moves a whole sandbox: the server gives up after 120."""
WRITE_TIMEOUT = 900.0
"""An upload waits as long as the sandbox's disk does."""

ATTEMPTS = 4
FIRST_DELAY = 0.25
MAX_DELAY = 8.0
MAX_RETRY_AFTER = 30.0
"""A server that asks for more patience is taken at its word: the error goes to the caller."""


class CredentialAuth(httpx.Auth):
    """Adds the credential to each request, so that no client or header object shows it."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def auth_flow(self, request: httpx.Request) -> Any:
        """What httpx asks for: the request, with who asks."""
        request.headers.update(self._credentials.headers)
        yield request


Content = Callable[[], AbstractAsyncContextManager[AsyncIterator[bytes]]]
"""Makes a body, anew for each attempt."""


class Upload(httpx.AsyncByteStream):
    """A body as it is made. Not through httpx's own generator, which nobody would close when the request is
    cancelled."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = source

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._source


class Transport:
    """Sends requests for one server and one credential. Paths begin with /v1.

    Owns: the pool. Owned by: TrioClient. Dies when: closed.
    """

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self.tls = _tls(credentials.url)
        self._client = httpx.AsyncClient(
            base_url=credentials.url,
            auth=CredentialAuth(credentials),
            verify=self.tls,
            timeout=_timeout(READ_TIMEOUT),
            trust_env=not is_loopback(credentials.url),
            limits=httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=20),
            headers={"User-Agent": "capsule-python", "Accept": "application/json", "Accept-Encoding": "identity"},
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def call(
        self,
        answer: type[T],
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        read_timeout: float = READ_TIMEOUT,
        again: bool = False,
    ) -> T:
        """One request; its JSON as `answer`. `again`: it may be sent again, for it changes nothing the second time."""
        response = await self.send(method, path, body=body, params=params, read_timeout=read_timeout, again=again)
        return decode(response.content, answer)

    async def create(
        self,
        answer: type[T],
        path: str,
        body: Mapping[str, Any],
        key: str | None,
        *,
        read_timeout: float = LONG_TIMEOUT,
    ) -> T:
        """A POST that makes something, once however often it is sent: with `key`, or one of its own."""
        response = await self.send(
            "POST",
            path,
            body=body,
            headers={"Idempotency-Key": key or str(uuid4())},
            read_timeout=read_timeout,
            again=True,
            patience=read_timeout,
        )
        return decode(response.content, answer)

    async def send(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        read_timeout: float = READ_TIMEOUT,
        again: bool = False,
        patience: float = 0,
        content: Content | None = None,
    ) -> httpx.Response:
        """The whole answer, which is a success. ApiError for another, ConnectionLost.

        Sent again, if it may be: after a lost connection, and after a 503 that says when. `patience`: seconds in
        which any number of `busy` is taken, for what a lost request has begun is being made."""
        attempt, began = 0, trio.current_time()
        while True:
            attempt += 1
            try:
                async with self.stream(
                    method, path, body=body, params=params, headers=headers, read_timeout=read_timeout, content=content
                ) as response:
                    await _read(response)
                    return response
            except (ConnectionLost, Unavailable) as exc:
                delay = backoff(attempt)
                if isinstance(exc, Unavailable):
                    delay = max(delay, exc.retry_after or 0)
                    again = again and exc.retry_after is not None and delay <= MAX_RETRY_AFTER
                    if exc.code == "busy" and trio.current_time() + delay < began + patience:
                        attempt = min(attempt, ATTEMPTS - 1)
                if not again or attempt >= ATTEMPTS:
                    raise
            await trio.sleep(delay)

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        read_timeout: float = READ_TIMEOUT,
        content: Content | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """An answer whose body is still on its way; a success. Sent once."""
        self.check_credentials()
        sent = dict(headers or {})
        if body is not None:
            sent["Content-Type"] = "application/json"
        request = self._client.build_request(
            method,
            path,
            params=params,
            headers=sent,
            content=None if body is None else msgspec.json.encode(body),
            timeout=_timeout(read_timeout),
        )
        async with AsyncExitStack() as stack:
            if content is not None:
                request.stream = Upload(await stack.enter_async_context(content()))
            response = await _lost_if_broken(lambda: self._client.send(request, stream=True))
        try:
            if not response.is_success:
                await _read(response)
                raise api_error(response.status_code, response.headers, response.content)
            _check_plain(response)
            yield response
        finally:
            with trio.move_on_after(2, shield=True):
                await response.aclose()

    async def anonymous(self, answer: type[T], path: str, body: Mapping[str, Any]) -> T:
        """A POST without a credential, sent once."""
        response = await _lost_if_broken(
            lambda: self._client.post(
                path, content=msgspec.json.encode(body), headers={"Content-Type": "application/json"}, auth=httpx.Auth()
            )
        )
        if not response.is_success:
            raise api_error(response.status_code, response.headers, response.content)
        return decode(response.content, answer)

    def check_credentials(self) -> None:
        """ConfigurationError for somebody without any."""
        if not self.credentials.headers:
            raise ConfigurationError(
                f"no credential is known: give `api_key`, set {KEY_VARIABLE}, or run `capsule login`"
            )


async def chunks(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The answer's body as it comes; ConnectionLost when it breaks off."""
    source = response.aiter_raw()
    while True:
        piece = await _lost_if_broken(lambda: anext(source, None))
        if piece is None:
            return
        yield piece


def decode(content: bytes, answer: type[T]) -> T:
    """JSON as `answer`."""
    try:
        return msgspec.json.decode(content, type=answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise CapsuleError(f"the server's answer is not one that this version understands: {exc}") from exc


def backoff(attempt: int) -> float:
    """Seconds before attempt number `attempt` + 1: doubling, with jitter so that many clients do not come at once."""
    ceiling: float = min(MAX_DELAY, FIRST_DELAY * 2.0 ** min(attempt - 1, 16))
    return ceiling * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret


def segment(text: str | int) -> str:
    """A part of a path: whatever it is, it stays one part."""
    quoted = quote(str(text), safe="")
    return quoted.replace(".", "%2E") if not quoted.strip(".") else quoted


def given(**fields: Any) -> dict[str, Any]:
    """A body of those fields that are not None: the others have the server's defaults."""
    return {name: value for name, value in fields.items() if value is not None}


def is_loopback(url: str) -> bool:
    """Whether the URL's host is this machine: no proxy is asked for that."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


async def _lost_if_broken(ask: Callable[[], Any]) -> Any:
    """Failures of httpx in our words. Not chained to them: they hold the request, and that holds the credential."""
    try:
        return await ask()
    except httpx.ConnectError as exc:
        problem = f"the server was not reached: {exc}"
    except httpx.ConnectTimeout:
        problem = f"the server was not reached within {CONNECT_TIMEOUT:g} seconds"
    except httpx.TimeoutException:
        problem = "the server was silent for too long"
    except (httpx.TransportError, httpx.DecodingError) as exc:
        problem = f"the connection was lost: {str(exc) or type(exc).__name__}"
    raise ConnectionLost(problem)


def _tls(url: str) -> ssl.SSLContext:
    """For requests and streams alike: certifi's certificates, or those that SSL_CERT_FILE and SSL_CERT_DIR name.

    Reading them takes a tenth of a second. Without TLS none are read, and nobody is trusted."""
    return httpx.create_ssl_context() if urlsplit(url).scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _check_plain(response: httpx.Response) -> None:
    """We ask for bytes as they are: of packed ones neither ranges nor digests would be right."""
    packed = response.headers.get("Content-Encoding", "identity").lower()
    if packed != "identity":
        raise CapsuleError(f"a proxy on the way packs the server's answers ({packed}), which it was asked not to")


async def _read(response: httpx.Response) -> None:
    await _lost_if_broken(response.aread)


def _timeout(read: float) -> httpx.Timeout:
    return httpx.Timeout(connect=CONNECT_TIMEOUT, read=read, write=WRITE_TIMEOUT, pool=None)


__all__ = ["ApiError", "Transport", "backoff", "chunks", "decode", "given", "is_loopback", "segment"]
