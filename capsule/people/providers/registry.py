"""The identity providers there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capsule.people.providers.github import GitHub

if TYPE_CHECKING:
    from collections.abc import Mapping

    from capsule.config import Settings
    from capsule.people.providers.provider import Provider

PROVIDERS: tuple[type[Provider], ...] = (GitHub,)


def configured(settings: Settings) -> Mapping[str, Provider]:
    """Those that the settings mention, by name."""
    found = (kind.configured(settings) for kind in PROVIDERS)
    return {provider.name: provider for provider in found if provider is not None}
