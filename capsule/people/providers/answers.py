"""Answers of a provider, which may be anything: bounded in size, decoded strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import httpx
import msgspec
import trio

from capsule.people.providers.provider import ProviderFailed

MAX_ANSWER = 256 * 1024
"""Bytes. The longest answer that anybody waits for is a list of e-mail addresses."""

HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",  # compression lets a small answer grow large
    "User-Agent": "capsule",  # GitHub refuses requests without one
}

T = TypeVar("T")


async def ask(
    http: httpx.AsyncClient,
    method: str,
    url: str,
    kind: type[T],
    *,
    headers: Mapping[str, str] | None = None,
    form: Mapping[str, str] | None = None,
) -> T:
    """The JSON of a 200 as a `kind`. ProviderFailed for everything else; redirects are not followed."""
    sent = {**HEADERS, **(headers or {})}
    try:
        async with http.stream(method, url, headers=sent, data=form, follow_redirects=False) as response:
            content = await _bounded(response)
    except (httpx.HTTPError, httpx.InvalidURL) as err:
        raise ProviderFailed(f"{method} {url}: {type(err).__name__}") from err
    if response.status_code != 200:
        raise ProviderFailed(f"{method} {url}: HTTP {response.status_code}")
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise ProviderFailed(f"{method} {url}: {err}") from err


async def _bounded(response: httpx.Response) -> bytes:
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ProviderFailed(f"{response.url}: a compressed answer, which nobody asked for")
    content = bytearray()
    with trio.CancelScope() as too_long:  # leaving the loop instead would leave httpx's nested generators open
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > MAX_ANSWER:
                too_long.cancel()
    if len(content) > MAX_ANSWER:
        raise ProviderFailed(f"{response.url}: more than {MAX_ANSWER} bytes")
    return bytes(content)
