"""Signing in through an identity provider, in three steps that a browser makes:

start     we send it to the provider, with a state that its cookie remembers
finish    it comes back with the provider's code; we ask the provider who that is, and send it to the dashboard with a
          one-time code of ours
exchange  the dashboard's page turns that code into a session, which so never stands in a URL

The one-time code is good for a minute, once, and only beside the cookie that the same answer set: a link with
somebody else's code signs nobody in.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlencode

import httpx
import structlog
import trio

from capsule import errors
from capsule.auth.rate_limits import subject_of
from capsule.auth.sessions import SessionTokens
from capsule.db.errors import ConstraintViolated
from capsule.db.queries import oauth as rows
from capsule.db.queries import users
from capsule.db.translated import TranslatedDatabase
from capsule.people.oauth_states import LIFETIME, OAuthStates
from capsule.people.providers.provider import ProviderFailed
from capsule.people.providers.registry import configured
from capsule.people.registration import Landing, email_address, land, register
from capsule.people.views import Authenticated, Cookie, Redirect

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from capsule.auth.rate_limits import RateLimits
    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.pool import Database
    from capsule.people.oauth_states import ReturnedState
    from capsule.people.providers.provider import Identity, Provider

log = structlog.get_logger()

Refusal = Literal["access_denied", "invalid_state", "missing_code", "exchange_failed", "email_taken", "internal_error"]
"""What the dashboard is told."""

STATE_COOKIE = "capsule_oauth_state"
LOGIN_COOKIE = "capsule_login"
PROVIDER_DEADLINE = 10.0
"""Seconds for all that is asked of a provider in one sign-in."""
PROVIDER_CALLS = 32
"""Sign-ins that ask a provider at the same time; others wait, within their deadline."""
LOGIN_CODE_SECONDS = 60
CODE_FORM = re.compile(r"[A-Za-z0-9_-]{43}")
"""32 random bytes in base64url: either part of a login code."""
MAX_CODE = 2048
"""Characters of a provider's code."""
ATTEMPTS = 3
RACES = frozenset({"users_email_key", "oauth_identities_pkey"})
"""Constraints that say: somebody registered beside us; look again."""
SPENT = "the login code is unknown, expired, spent, or another browser's; sign in again"


class _Refused(Exception):  # noqa: N818 - named for what happened
    """The sign-in ends here."""

    def __init__(self, code: Refusal, reason: str = "") -> None:
        super().__init__(reason or code)
        self.code = code


@dataclass(frozen=True, slots=True)
class LoginCode:
    """What goes to the page (`code`) and into its browser's cookie (`binding`)."""

    code: str
    binding: str

    def digest(self) -> bytes:
        """What is stored."""
        return hashlib.sha256(f"{self.code}.{self.binding}".encode()).digest()


class OAuth:
    """See `capsule.http.people_ports.OAuthService`."""

    def __init__(self, db: Database, settings: Settings, limits: RateLimits) -> None:
        self._db = TranslatedDatabase(db)
        self._limits = limits
        self._tokens = SessionTokens(settings)
        self._states = OAuthStates(settings)
        self._providers = configured(settings)
        self._url = settings.url
        self._secure = settings.url.startswith("https://")
        self._calls = trio.CapacityLimiter(PROVIDER_CALLS)
        self._tls: ssl.SSLContext | None = None

    async def start(self, provider: str, *, address: str) -> Redirect:
        """To the provider. ProviderNotFound, RateLimited."""
        chosen = self._providers.get(provider)
        if chosen is None:
            raise errors.ProviderNotFound("nobody signs in through that provider here; log in with a password")
        await self._limits.hit("oauth_address", subject_of(address))
        attempt, sealed = self._states.begin(chosen.name)
        return Redirect(chosen.authorization_url(attempt), (self._cookie(STATE_COOKIE, sealed, LIFETIME),))

    async def finish(
        self,
        provider: str,
        *,
        code: str | None,
        state: str | None,
        error: str | None,
        cookies: Mapping[str, str],
    ) -> Redirect:
        """Back to the dashboard, always: with a one-time code, or with an error. Never raises a CapsuleError."""
        try:
            login = await self._finish(provider, code=code, state=state, error=error, cookies=cookies)
        except _Refused as refused:
            log.info("oauth_refused", error=refused.code, reason=str(refused))
            return self._back({"error": refused.code})
        except Exception:
            log.exception("oauth_failed")
            return self._back({"error": "internal_error"})
        return self._back(
            {"code": login.code}, self._cookie(LOGIN_COOKIE, login.binding, LOGIN_CODE_SECONDS, strict=True)
        )

    async def _finish(
        self, name: str, *, code: str | None, state: str | None, error: str | None, cookies: Mapping[str, str]
    ) -> LoginCode:
        provider = self._providers.get(name)
        if provider is None:
            raise _Refused("invalid_state", "no such provider")
        if error is not None:
            raise _Refused("access_denied" if error == "access_denied" else "exchange_failed", ascii(error[:64]))
        returned = self._states.returned(name, state, cookies.get(STATE_COOKIE))
        if returned is None:
            raise _Refused("invalid_state")
        if not code:
            raise _Refused("missing_code")
        if not await self._db.transaction(rows.spend_state, returned.sha256, returned.expires_at):
            raise _Refused("invalid_state", "the state was spent")
        return await self._sign_in(name, await self._identity(provider, code, returned))

    async def _identity(self, provider: Provider, code: str, returned: ReturnedState) -> Identity:
        if len(code) > MAX_CODE:
            raise _Refused("exchange_failed", "the code is too long")
        if self._tls is None:  # reads the system's certificates
            self._tls = await trio.to_thread.run_sync(ssl.create_default_context)
        try:
            with trio.fail_after(PROVIDER_DEADLINE):
                async with (
                    self._calls,
                    httpx.AsyncClient(verify=self._tls, timeout=None, trust_env=False) as http,  # noqa: S113
                ):
                    return await provider.identify(http, code, returned.attempt)
        except trio.TooSlowError as err:
            raise _Refused("exchange_failed", f"no answer in {PROVIDER_DEADLINE:g} s") from err
        except ProviderFailed as err:
            raise _Refused("exchange_failed", str(err)) from err

    async def _sign_in(self, provider: str, identity: Identity) -> LoginCode:
        """Sign in whose identity this is, or register them."""
        email = _address_of(identity)
        login = LoginCode(secrets.token_urlsafe(32), secrets.token_urlsafe(32))
        for _ in range(ATTEMPTS):
            try:
                await self._db.transaction(_admit, provider, identity, email, login)
            except ConstraintViolated as err:
                if err.name not in RACES:
                    raise
            else:
                return login
        raise _Refused("internal_error", "others registered the same account each time")

    async def exchange(self, *, code: str, cookies: Mapping[str, str], address: str) -> Authenticated:
        """Spend the one-time code, in the browser that got it. Unauthorized, RateLimited."""
        await self._limits.hit("oauth_address", subject_of(address))
        login = LoginCode(code, cookies.get(LOGIN_COOKIE, ""))
        if not all(CODE_FORM.fullmatch(part) for part in (login.code, login.binding)):
            raise errors.Unauthorized(SPENT)
        return (await self._db.transaction(_land, login.digest())).session(self._tokens)

    def _back(self, parameters: Mapping[str, str], *cookies: Cookie) -> Redirect:
        """To the dashboard; the state's cookie has done its work."""
        location = f"{self._url}/login?{urlencode(parameters)}"
        return Redirect(location, (self._cookie(STATE_COOKIE, "", 0), *cookies))

    def _cookie(self, name: str, value: str, seconds: int, *, strict: bool = False) -> Cookie:
        return Cookie(name=name, value=value, seconds=seconds, secure=self._secure, strict=strict)


def _address_of(identity: Identity) -> str | None:
    """Verified, and in its one form; None without one."""
    try:
        return None if identity.email is None else email_address(identity.email)
    except errors.InvalidRequest:
        return None


async def _admit(tx: Connection, provider: str, identity: Identity, email: str | None, login: LoginCode) -> None:
    """A login code for whose identity this is, whatever became of its address; or for the account that is made for it,
    which takes one. An account that has the address is not theirs before its holder says so."""
    claimed = await rows.claimed(tx, provider=provider, subject=identity.subject, email=email)
    user_id: UUID
    if claimed.identity_of is not None:
        user_id = claimed.identity_of
    elif claimed.address_of is not None:
        raise _Refused("email_taken")
    elif email is None:
        raise _Refused("exchange_failed", "somebody new has no verified primary e-mail address, or one that is none")
    else:
        user_id = (await register(tx, email=email, name=identity.name, password_hash=None)).id
        await rows.insert_identity(tx, provider=provider, subject=identity.subject, user_id=user_id)
    await rows.insert_login_code(tx, login.digest(), user_id, LOGIN_CODE_SECONDS)


async def _land(tx: Connection, digest: bytes) -> Landing:
    user_id = await rows.take_login_code(tx, digest)
    user = None if user_id is None else await users.hold(tx, user_id)
    if user is None:
        raise errors.Unauthorized(SPENT)
    return await land(tx, user)
