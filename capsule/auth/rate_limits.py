"""How often somebody may try: counters in PostgreSQL, so that they outlive us and hold for all control planes together.

An attempt is counted before it is made: however many are made at once, no more than the limit get through.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING

from agent.actor.settings import SettingsError
from capsule import errors
from capsule.db.queries import rate_limits as rows
from capsule.db.translated import TranslatedDatabase

if TYPE_CHECKING:
    from capsule.db.pool import Database

MAX_SECONDS = 86_400
"""Of a rule: counters of more than two days ago are forgotten."""

_RULE = re.compile(r"([a-z_]+)=([1-9][0-9]{0,8})/([1-9][0-9]{0,4})")


@dataclass(frozen=True, slots=True)
class Rule:
    """At most `limit` attempts in any `seconds` (nearly: what was a window ago is taken as spread evenly)."""

    limit: int
    seconds: int


RULES: Mapping[str, Rule] = {
    "sign_up": Rule(100, 3600),
    "login_address": Rule(100, 300),
    "login_account": Rule(20, 300),
    "login_anywhere": Rule(200, 300),
    "password": Rule(10, 3600),
    "oauth_address": Rule(100, 300),
    "user_search": Rule(60, 60),
    "add_member": Rule(60, 60),
    "create_team": Rule(30, 3600),
}
"""What is limited: sign-ups, passwords given and sign-ins through providers per address; logins per account, from one
address and from anywhere; changes of password, searches, members added (tried: it tells who has an account) and teams
made per person."""


class RateLimits:
    """Counts attempts by rule and subject."""

    def __init__(self, db: Database, rules: Mapping[str, Rule] = RULES) -> None:
        self._db = TranslatedDatabase(db)
        self._rules = rules

    async def hit(self, rule: str, subject: str) -> None:
        """Count an attempt of `subject` (an address by `subject_of`, an account). RateLimited says when to try again;
        refused attempts do not count."""
        chosen = self._rules[rule]
        found = await self._db.run(
            partial(rows.hit, bucket=f"{rule}:{subject}", limit=chosen.limit, seconds=chosen.seconds)
        )
        if not found.allowed:
            wait = retry_after(chosen, found.hits, found.before, found.elapsed)
            raise errors.RateLimited(f"too many attempts; try again in {wait} seconds", retry_after=wait)


def retry_after(rule: Rule, hits: int, before: int, elapsed: float) -> int:
    """Seconds until an attempt passes if none is made meanwhile: `hits` in this window, of which the share `elapsed` is
    over, and `before` in the last one."""
    room = rule.limit - 1 - hits
    if room >= 0 and before:  # as soon as the last window weighs no more than what is left
        share = 1 - room / before
        windows = share - elapsed
    else:  # when this window is the last one, and weighs one less than the limit
        windows = 1 - elapsed + (1 - (rule.limit - 1) / hits if hits else 0)
    return max(1, math.ceil(windows * rule.seconds))


def subject_of(address: str) -> str:
    """An address as a subject: of IPv6 the /64, which is what one customer of a provider has at least. Text that is no
    address is a subject of its own."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return f"{IPv6Address(int(parsed) >> 64 << 64)}/64"
    return str(parsed)


def rules_of(text: str) -> Mapping[str, Rule]:
    """RULES with those changed that the setting `rate_limits` names, as `login_account=20/300,…`; SettingsError."""
    changed = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _RULE.fullmatch(part)
        if match is None or match[1] not in RULES or int(match[3]) > MAX_SECONDS:
            raise SettingsError(
                f"CAPSULE_RATE_LIMITS: {part!r} is not rule=attempts/seconds with at most {MAX_SECONDS} seconds; "
                f"the rules are {', '.join(RULES)}"
            )
        changed[match[1]] = Rule(int(match[2]), int(match[3]))
    return {**RULES, **changed}
