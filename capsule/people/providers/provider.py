"""What an identity provider is to us (OAuth 2.0, RFC 6749 §4.1, with PKCE, RFC 7636)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    import httpx

    from capsule.config import Settings


class ProviderFailed(Exception):  # noqa: N818 - named for what happened
    """The provider cannot be reached, refuses, or answers what cannot be right. The message is for our log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """An account at a provider. `subject`: its id there, which never changes hands. `email`: verified there; None when
    it has none that is, which keeps it from registering, not from signing in."""

    subject: str
    email: str | None
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What ties the two halves of a sign-in together. `verifier` is PKCE's secret, `challenge` its S256."""

    state: str
    redirect_uri: str
    verifier: str
    challenge: str


class Provider(ABC):
    """A provider, configured. A new one is a subclass, and a row in `capsule.people.providers.registry`."""

    name: ClassVar[str]
    """In paths and in the database: lower-case letters and digits."""

    @classmethod
    @abstractmethod
    def configured(cls, settings: Settings) -> Self | None:
        """The provider as the settings have it; None when they do not mention it."""

    @abstractmethod
    def authorization_url(self, attempt: Attempt) -> str:
        """Where a browser is sent to ask its user."""

    @abstractmethod
    async def identify(self, http: httpx.AsyncClient, code: str, attempt: Attempt) -> Identity:
        """Who the code is for. ProviderFailed; its time is bounded by the caller."""
