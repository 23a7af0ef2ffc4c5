"""Which credential a request carries. Whether it is good is the authenticator's to say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from capsule.errors import Unauthorized

if TYPE_CHECKING:
    from werkzeug.datastructures import Headers

    from capsule.http.ports import Authenticator
    from capsule.model import Principal

API_KEY = re.compile(r"(?:cap|e2b)_([0-9a-f]{40})")
"""The same 40 digits behind `e2b_` are the same key."""


async def authenticate(headers: Headers, authenticator: Authenticator) -> Principal:
    """The principal of a request. A present but bad API key is Unauthorized, whatever else the request carries."""
    keys = headers.getlist("X-API-Key")
    if not keys:
        if "Authorization" in headers:
            raise Unauthorized("Bearer tokens are not accepted here yet; send an API key in X-API-Key.")
        raise Unauthorized("Send an API key in the X-API-Key header.")
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


MAX_TOKEN = 8192
"""Characters of a host's JWT."""
