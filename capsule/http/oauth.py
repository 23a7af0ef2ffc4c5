"""/v1/auth/oauth: signing in through an identity provider. A browser goes through the first two, a page calls the
third."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qsl

from msgspec import UNSET, Meta, Struct, UnsetType
from quart_trio.wrappers import TrioResponse

from capsule import errors
from capsule.http import fields
from capsule.http.account_bodies import Auth
from capsule.http.operations import Call, Operation, Success, json_response
from capsule.http.parsing import MAX_PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from capsule.http.people_ports import OAuthService
    from capsule.people.views import Redirect

TAG = "accounts"
PATH = "/v1/auth/oauth"
LOCATION = {"Location": "Where the browser goes.", "Set-Cookie": "What ties the steps to this browser."}
RETURNED = frozenset({"code", "state", "error"})


class ReturnQuery(Struct, kw_only=True):
    """What a provider sends a browser back with."""

    code: Annotated[str, Meta(description="The provider's code.")] | UnsetType = UNSET
    state: Annotated[str, Meta(description="As we gave it to the provider.")] | UnsetType = UNSET
    error: Annotated[str, Meta(description="Instead of a code.")] | UnsetType = UNSET


class LoginCodeBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """A one-time code."""

    code: Annotated[
        str,
        Meta(min_length=1, max_length=128, pattern=fields.NO_NUL, description="`code` of the dashboard's address."),
    ]


def operations(service: OAuthService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = OAuthHandlers(service)
    return [
        Operation(
            name="startOAuth",
            method="GET",
            path=f"{PATH}/{{provider}}",
            handler=handlers.start,
            summary="Sign in through a provider",
            description="For a browser: it is sent to the provider, and comes back.",
            tag=TAG,
            successes=(Success(status=302, description="To the provider.", headers=LOCATION),),
            errors=(errors.ProviderNotFound, errors.RateLimited, errors.DatabaseUnavailable),
        ),
        Operation(
            name="finishOAuth",
            method="GET",
            path=f"{PATH}/{{provider}}/callback",
            handler=handlers.finish,
            summary="Come back from a provider",
            description="For a browser, which is sent on to the dashboard's `/login`, always: with a one-time `code` "
            "(`exchangeLoginCode` takes it), or with an `error`: `access_denied`, `invalid_state`, `missing_code`, "
            "`exchange_failed`, `email_taken` or `internal_error`.",
            tag=TAG,
            query=ReturnQuery,
            lenient_query=True,
            successes=(Success(status=302, description="To the dashboard.", headers=LOCATION),),
        ),
        Operation(
            name="exchangeLoginCode",
            method="POST",
            path=f"{PATH}/exchange",
            handler=handlers.exchange,
            summary="Turn a one-time code into a session",
            description="Once, within a minute, and in the browser that signed in.",
            tag=TAG,
            body=LoginCodeBody,
            successes=(Success(status=200, description="A session.", body=Auth),),
            errors=(errors.Unauthorized, errors.RateLimited, errors.DatabaseUnavailable),
        ),
    ]


class OAuthHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: OAuthService) -> None:
        self._service = service

    async def start(self, call: Call[None, None]) -> TrioResponse:
        return _redirect(await self._service.start(call.path["provider"], address=call.request.client_address))

    async def finish(self, call: Call[None, None]) -> TrioResponse:
        returned = _returned(call.request.query_string)
        return _redirect(
            await self._service.finish(
                call.path["provider"],
                code=returned.get("code"),
                state=returned.get("state"),
                error=returned.get("error"),
                cookies=call.request.cookies,
            )
        )

    async def exchange(self, call: Call[LoginCodeBody, None]) -> TrioResponse:
        request = call.request
        found = await self._service.exchange(
            code=call.body.code, cookies=request.cookies, address=request.client_address
        )
        return json_response(Auth.of(found))


def _returned(raw: bytes) -> Mapping[str, str]:
    """What we know of a query string that anybody may have written. Of a parameter that comes twice none counts."""
    try:
        pairs = parse_qsl(raw.decode("latin-1"), max_num_fields=MAX_PARAMETERS)
    except ValueError:
        return {}
    names = [name for name, _ in pairs]
    return {name: value for name, value in pairs if name in RETURNED and names.count(name) == 1}


def _redirect(found: Redirect) -> TrioResponse:
    """Nothing of it is kept, and the next page is not told where it came from: there is a code in it."""
    response = TrioResponse(b"", 302)
    response.headers.remove("Content-Type")
    response.headers["Location"] = found.location
    response.headers["Cache-Control"] = "no-store"
    response.headers["Referrer-Policy"] = "no-referrer"
    for cookie in found.cookies:
        response.set_cookie(
            cookie.name,
            cookie.value,
            max_age=cookie.seconds,
            path=PATH,
            secure=cookie.secure,
            httponly=True,
            samesite="Strict" if cookie.strict else "Lax",
        )
    return response
