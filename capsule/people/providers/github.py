"""GitHub: the web application flow of its OAuth apps (docs.github.com, "Authorizing OAuth apps")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self
from urllib.parse import urlencode

from msgspec import Meta, Struct

from capsule.people.names import MAX_NAME, is_name
from capsule.people.providers.answers import ask
from capsule.people.providers.provider import Attempt, Identity, Provider, ProviderFailed

if TYPE_CHECKING:
    import httpx

    from capsule.config import Settings

SCOPE = "user:email"
API_VERSION = "2022-11-28"

Text = Annotated[str, Meta(min_length=1, max_length=1024)]


class _Token(Struct, frozen=True, kw_only=True):
    """A refusal, too, is sent with status 200."""

    access_token: Annotated[str, Meta(pattern=r"^[!-~]{1,1024}$")] = ""
    error: str = ""


class _User(Struct, frozen=True, kw_only=True):
    id: Annotated[int, Meta(ge=1)]
    login: Text
    name: str | None = None
    email: str | None = None


class _Email(Struct, frozen=True, kw_only=True):
    email: Text
    primary: bool
    verified: bool


class GitHub(Provider):
    """github.com, or an Enterprise server."""

    name = "github"

    def __init__(self, *, client_id: str, client_secret: str, url: str, api_url: str) -> None:
        self._client_id = client_id
        self._client_secret = client_secret
        self._url = url.rstrip("/")
        self._api_url = api_url.rstrip("/")

    @classmethod
    def configured(cls, settings: Settings) -> Self | None:
        if not settings.github_client_id:
            return None
        return cls(
            client_id=settings.github_client_id,
            client_secret=settings.github_client_secret,
            url=settings.github_url,
            api_url=settings.github_api_url,
        )

    def authorization_url(self, attempt: Attempt) -> str:
        parameters = {
            "client_id": self._client_id,
            "redirect_uri": attempt.redirect_uri,
            "scope": SCOPE,
            "state": attempt.state,
            "code_challenge": attempt.challenge,
            "code_challenge_method": "S256",
        }
        return f"{self._url}/login/oauth/authorize?{urlencode(parameters)}"

    async def identify(self, http: httpx.AsyncClient, code: str, attempt: Attempt) -> Identity:
        token = await self._token(http, code, attempt)
        headers = {"Authorization": f"Bearer {token}", "X-GitHub-Api-Version": API_VERSION}
        user = await ask(http, "GET", f"{self._api_url}/user", _User, headers=headers)
        emails = await ask(http, "GET", f"{self._api_url}/user/emails", list[_Email], headers=headers)
        return Identity(subject=str(user.id), email=_verified(user, emails), name=_name(user))

    async def _token(self, http: httpx.AsyncClient, code: str, attempt: Attempt) -> str:
        form = {
            "client_id": self._client_id,
            "client_secret": self._client_secret,
            "code": code,
            "redirect_uri": attempt.redirect_uri,
            "code_verifier": attempt.verifier,
        }
        answer = await ask(http, "POST", f"{self._url}/login/oauth/access_token", _Token, form=form)
        if answer.error or not answer.access_token:
            raise ProviderFailed(f"no token: {answer.error[:64]!r}")
        return answer.access_token


def _verified(user: _User, emails: list[_Email]) -> str | None:
    """The profile's address when it is verified, else the primary one if that is, else None. An address that is not
    verified may be anybody's."""
    verified = [one for one in emails if one.verified]
    for one in verified:
        if user.email is not None and one.email.lower() == user.email.lower():
            return one.email
    for one in verified:
        if one.primary:
            return one.email
    return None


def _name(user: _User) -> str:
    """What they call themselves, without characters that nobody sees; else their login."""
    for text in (user.name or "", user.login):
        shown = "".join(c for c in text if c.isprintable()).strip()[:MAX_NAME]
        if is_name(shown):
            return shown
    raise ProviderFailed("the account has no name")
