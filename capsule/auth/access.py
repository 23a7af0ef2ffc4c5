"""Who may do what: one row per operation of the API. The routes obey it, docs/roles.md and the tests are made from it.

A row says which credentials are taken, whose team is meant, and what the asker has to be there. Teams that a path
names are looked up by the use-case, in the transaction that acts (`require`); all the rest is decided before the
handler runs (`admit`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from capsule import errors
from capsule.principals import ROLES, Asker, Permission, Role, User


class Credential(Enum):
    """What a request can be sent with."""

    API_KEY = "api_key"
    SESSION = "session"
    HOST = "host"


Where = Literal["own", "path", "any", "host"]
"""Whose role counts: in the credential's team, in the team that the path names, in any team, in the team whose host the
path names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A row. `credentials` empty: anybody. `team` and `role`: the least role, and where. `permission`: of a platform
    admin. `others`: below it, one's own only. `barred`: who may not although the role reaches."""

    credentials: frozenset[Credential] = frozenset()
    team: Where | None = None
    role: Role | None = None
    permission: Permission | None = None
    others: Role | None = None
    """The least role for what somebody else of the team made, and for audit rows of scope admin; None: `role` does."""
    barred: Role | None = None
    """Said by the use-case, which knows what to do instead: the owner does not leave."""
    instead: frozenset[Permission] = frozenset()
    """One of these does in place of `role`: on hosts that are no team's, and for members' reading on all."""


_SESSION = frozenset({Credential.SESSION})

ANYBODY = Access()
HOST = Access(credentials=frozenset({Credential.HOST}))
TEAM = Access(credentials=frozenset({Credential.API_KEY, Credential.SESSION}), team="own", role="member")
"""An API key, or a session with a live team."""
PERSON = Access(credentials=_SESSION)
TEAM_PERSON = Access(credentials=_SESSION, team="own", role="member")
OWN_OR_ALL = Access(credentials=_SESSION, team="own", role="member", others="admin")
"""Members see and end what is theirs, admins all of it."""
ADMIN_SOMEWHERE = Access(credentials=_SESSION, team="any", role="admin")


def _of_path(role: Role, barred: Role | None = None) -> Access:
    return Access(credentials=_SESSION, team="path", role=role, barred=barred)


def _platform(permission: Permission) -> Access:
    return Access(credentials=_SESSION, permission=permission)


def _of_host(role: Role, *instead: Permission) -> Access:
    return Access(credentials=_SESSION, team="host", role=role, instead=frozenset(instead))


ACCESS: Mapping[str, Access] = {
    "health": ANYBODY,
    "ready": ANYBODY,
    "metrics": ANYBODY,
    "openapiJson": ANYBODY,
    "openapiYaml": ANYBODY,
    "docs": ANYBODY,
    "docsAsset": ANYBODY,
    "signUp": ANYBODY,
    "logIn": ANYBODY,
    "startOAuth": ANYBODY,
    "finishOAuth": ANYBODY,
    "exchangeLoginCode": ANYBODY,
    "logOut": PERSON,
    "switchTeam": PERSON,
    "getMe": PERSON,
    "updateMe": PERSON,
    "changePassword": PERSON,
    "listTeams": PERSON,
    "createTeam": PERSON,
    "getTeam": _of_path("member"),
    "renameTeam": _of_path("admin"),
    "deleteTeam": _of_path("owner"),
    "listMembers": _of_path("member"),
    "addMember": _of_path("admin"),
    "changeRole": _of_path("admin"),
    "removeMember": _of_path("admin"),
    "leaveTeam": _of_path("member", barred="owner"),
    "searchUsers": ADMIN_SOMEWHERE,
    "createApiKey": TEAM_PERSON,
    "listApiKeys": OWN_OR_ALL,
    "revokeApiKey": OWN_OR_ALL,
    "listAuditLogs": OWN_OR_ALL,
    "setByoc": _platform("byoc"),
    "listAllTeams": _platform("directory"),
    "listAllUsers": _platform("directory"),
    "listAllHosts": _platform("directory"),
    **dict.fromkeys(
        (
            "createSandbox",
            "listSandboxes",
            "getSandbox",
            "deleteSandbox",
            "pauseSandbox",
            "resumeSandbox",
            "forkSandbox",
            "pingSandbox",
            "execInSandbox",
            "listProcesses",
            "signalProcess",
            "writeFile",
            "readFile",
            "listFiles",
            "makeDirectory",
            "removeFile",
            "writeFileStream",
            "readFileStream",
            "execStream",
            "openTerminal",
            "attachProcess",
            "watchFiles",
            "createSnapshot",
            "listSnapshots",
            "deleteSnapshot",
        ),
        TEAM,
    ),
    "listHosts": _of_host("member", "hosts", "directory"),
    "getHost": _of_host("member", "hosts", "directory"),
    **dict.fromkeys(
        (
            "createHost",
            "deleteHost",
            "previewHostDeletion",
            "createHostToken",
            "listHostTags",
            "addHostTag",
            "removeHostTag",
            "cordonHost",
            "uncordonHost",
            "drainHost",
        ),
        _of_host("admin", "hosts"),
    ),
    "registerHost": ANYBODY,
    "refreshHost": ANYBODY,
    "heartbeat": HOST,
}
"""By name of the operation (its operationId)."""


def admit(access: Access, asker: Asker | None) -> None:
    """Refuse an asker whose credential was found good but does not do: NoTeam, Forbidden."""
    if access.permission is not None and not (isinstance(asker, User) and access.permission in asker.permissions):
        raise errors.Forbidden("this is for platform admins; `capsule admin` makes one")
    if access.team != "own":
        return
    principal = asker.principal() if isinstance(asker, User) else asker
    if principal is None:
        raise errors.NoTeam("your session has no live team; switch to one that you are a member of, or create one")
    if access.role is not None and not reaches(principal.role, access.role):
        raise errors.Forbidden(f"this needs the role {access.role}; you are {principal.role}")


def require(operation: str, role: Role | None) -> Role:
    """The role of the asker in the team that the path names, when it is enough: NotFound for somebody who is no member
    (as for a team that is not), Forbidden."""
    if role is None:
        raise errors.NotFound("there is no such team, or you are not a member of it")
    least = ACCESS[operation].role
    if least is not None and not reaches(role, least):
        raise errors.Forbidden(f"this needs the role {least}; you are {role}")
    return role


def require_on_host(operation: str, role: Role | None, permissions: frozenset[Permission], *, of_team: bool) -> None:
    """Whether somebody with this role in the host's team, and these permissions, may: else NotFound for who may not
    even look at it, Forbidden. `of_team` False: the host is a regular one, or its team was deleted."""
    access = ACCESS[operation]
    least = access.role
    if least is not None and role is not None and reaches(role, least):
        return
    if access.instead & permissions and (not of_team or least == "member"):
        return
    if role is None and not ACCESS["getHost"].instead & permissions:
        raise errors.NotFound("there is no such host, or it is not your team's")
    if of_team:
        raise errors.Forbidden(
            f"this needs the role {least} in the host's team" + (f"; you are {role}" if role else "")
        )
    raise errors.Forbidden("regular hosts are for platform admins with the permission `hosts`")


def reaches_all(operation: str, role: Role) -> bool:
    """Whether `role` is enough for what others made, not only for one's own (`Access.others`)."""
    least = ACCESS[operation].others
    return least is None or reaches(role, least)


def reaches(role: Role, least: Role) -> bool:
    """Whether `role` may do what needs `least`."""
    return ROLES.index(role) >= ROLES.index(least)
