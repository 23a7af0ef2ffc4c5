"""Which credential a request carries. Whether it is good is the authenticator's to say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from capsule.auth.access import Access, Credential
from capsule.errors import Forbidden, Unauthorized

if TYPE_CHECKING:
    from werkzeug.datastructures import Headers

    from capsule.http.ports import Authenticator
    from capsule.principals import Asker, Principal

API_KEY = re.compile(r"(?:cap|e2b)_([0-9a-f]{40})")
"""The same 40 digits behind `e2b_` are the same key."""
BEARER = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/=-]+)")
"""RFC 6750 §2.1; the scheme's name is case-insensitive."""
MAX_TOKEN = 8192
"""Characters of a JWT."""


async def authenticate(headers: Headers, access: Access, authenticator: Authenticator) -> Asker:
    """Who sent a request. A present but bad API key is Unauthorized, whatever else the request carries; a good key
    where only people may ask is Forbidden."""
    if keys := headers.getlist("X-API-Key"):
        holder = await _key_holder(keys, authenticator)
        if Credential.API_KEY not in access.credentials:
            raise Forbidden("This is for people: log in and send the session's token, not an API key.")
        return holder
    tokens = headers.getlist("Authorization")
    if not tokens:
        raise Unauthorized(
            "Send an API key in the X-API-Key header, or a session's token in `Authorization: Bearer …`."
            if Credential.API_KEY in access.credentials
            else "Log in, and send the session's token in `Authorization: Bearer …`."
        )
    match = BEARER.fullmatch(tokens[0]) if len(tokens) == 1 and len(tokens[0]) <= MAX_TOKEN else None
    if match is None:
        raise Unauthorized("Authorization must be given once, as `Bearer` and a session's token.")
    return await authenticator.session(match[1])


async def _key_holder(keys: list[str], authenticator: Authenticator) -> Principal:
    match = API_KEY.fullmatch(keys[0]) if len(keys) == 1 else None
    if match is None:
        raise Unauthorized("X-API-Key must be one key: `cap_` and 40 lower-case hex digits.")
    return await authenticator.api_key(f"cap_{match[1]}")


def host_token(headers: Headers) -> str:
    """The token in X-Host-Token; Unauthorized without exactly one."""
    tokens = headers.getlist("X-Host-Token")
    if len(tokens) != 1 or not tokens[0] or len(tokens[0]) > MAX_TOKEN:
        raise Unauthorized("Send the host's token in the X-Host-Token header.")
    return str(tokens[0])
