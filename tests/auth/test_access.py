"""The table of access beside the contract's table of roles, and the decisions made from it."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from uuid import uuid4

import pytest

from capsule import errors
from capsule.auth.access import ACCESS, Credential, admit, reaches, reaches_all, require, require_on_host
from capsule.principals import PERMISSIONS, ROLES, Principal, Session, User

ROOT = Path(__file__).parents[2]

KEYS_MAY = {
    *("createSandbox", "listSandboxes", "getSandbox", "deleteSandbox", "pauseSandbox", "resumeSandbox", "forkSandbox"),
    *("pingSandbox", "execInSandbox", "listProcesses", "signalProcess", "writeFile", "readFile", "listFiles"),
    *("makeDirectory", "removeFile", "createSnapshot", "listSnapshots", "deleteSnapshot"),
    *("writeFileStream", "readFileStream", "execStream", "openTerminal", "attachProcess", "watchFiles"),
}
MEMBERS_MAY = KEYS_MAY | {"createApiKey", "listApiKeys", "revokeApiKey", "listAuditLogs"}
OF_THE_NAMED_TEAM = {
    "member": {"getTeam", "listMembers", "leaveTeam"},
    "admin": {"renameTeam", "addMember", "changeRole", "removeMember"},
    "owner": {"deleteTeam"},
}
OF_ADMINS_OF_THE_HOST = {
    *("createHost", "deleteHost", "previewHostDeletion", "createHostToken", "cordonHost", "uncordonHost", "drainHost"),
    *("listHostTags", "addHostTag", "removeHostTag"),
}
OF_PLATFORM_ADMINS = {
    "setByoc": "byoc",
    "listAllTeams": "directory",
    "listAllUsers": "directory",
    "listAllHosts": "directory",
}
OF_ANYBODY = {
    *("health", "ready", "metrics", "openapiJson", "openapiYaml", "docs", "docsAsset", "signUp", "logIn", "startOAuth"),
    *("finishOAuth", "exchangeLoginCode", "registerHost", "refreshHost"),
}
OF_PEOPLE = {
    *("logOut", "switchTeam", "getMe", "updateMe", "changePassword", "listTeams", "createTeam"),
}


def user(*permissions, role=None):
    return User(
        id=uuid4(),
        email="a@example.com",
        name="A",
        session=Session(id=uuid4(), issued_at=datetime.now(UTC), expires_at=datetime.now(UTC)),
        team_id=uuid4() if role else None,
        role=role,
        permissions=frozenset(permissions),
    )


KEY = Principal(team_id=uuid4(), actor_type="api_key", actor_id=uuid4(), actor_name="ci")


def names(condition):
    return {name for name, access in ACCESS.items() if condition(access)}


def test_the_table_says_what_the_contract_says():
    """Written down a second time, by hand, from the contract's lists of who may what."""
    keys, sessions = Credential.API_KEY, Credential.SESSION
    assert names(lambda access: not access.credentials) == OF_ANYBODY
    assert names(lambda access: keys in access.credentials) == KEYS_MAY
    assert names(lambda access: Credential.HOST in access.credentials) == {"heartbeat"}
    assert names(lambda access: access.team == "own") == MEMBERS_MAY
    assert {access.role for access in ACCESS.values() if access.team == "own"} == {"member"}
    for role, operations in OF_THE_NAMED_TEAM.items():
        assert names(lambda access, role=role: access.team == "path" and access.role == role) == operations
    assert names(lambda access: access.team == "any") == {"searchUsers"}
    assert ACCESS["searchUsers"].role == "admin"
    assert {name: access.permission for name, access in ACCESS.items() if access.permission} == OF_PLATFORM_ADMINS
    assert names(lambda access: access.others) == {"listApiKeys", "revokeApiKey", "listAuditLogs"}
    assert names(lambda access: access.barred) == {"leaveTeam"}
    assert ACCESS["leaveTeam"].barred == "owner"
    assert {name: (access.role, access.instead) for name, access in ACCESS.items() if access.team == "host"} == {
        **dict.fromkeys(("getHost", "listHosts"), ("member", {"hosts", "directory"})),
        **dict.fromkeys(OF_ADMINS_OF_THE_HOST, ("admin", {"hosts"})),
    }
    people = names(lambda access: access.credentials == {sessions} and access.team is None and not access.permission)
    assert people == OF_PEOPLE


def test_roles_reach_downwards():
    """A role may what the lesser ones may."""
    assert [(role, least) for role, least in product(ROLES, ROLES) if reaches(role, least)] == [
        ("member", "member"),
        ("admin", "member"),
        ("admin", "admin"),
        ("owner", "member"),
        ("owner", "admin"),
        ("owner", "owner"),
    ]
    assert [role for role in ROLES if reaches_all("listApiKeys", role)] == ["admin", "owner"]
    assert [role for role in ROLES if reaches_all("createSandbox", role)] == list(ROLES)


@pytest.mark.parametrize("operation", sorted(MEMBERS_MAY))
def test_the_own_team_must_live(operation):
    """A session without a team is refused as such, a member let through."""
    with pytest.raises(errors.NoTeam):
        admit(ACCESS[operation], user())
    admit(ACCESS[operation], user(role="member"))


@pytest.mark.parametrize("operation", sorted(OF_PLATFORM_ADMINS))
def test_one_permission_is_not_another(operation):
    """Only the permission of the row opens it: no role, no key, no other permission."""
    needed = OF_PLATFORM_ADMINS[operation]
    for asker in (user(*set(PERMISSIONS) - {needed}), user(role="owner"), KEY, None):
        with pytest.raises(errors.Forbidden):
            admit(ACCESS[operation], asker)
    admit(ACCESS[operation], user(needed))


def test_the_named_team():
    """No member: as if there were none. Too low: told which role is needed."""
    for operations in OF_THE_NAMED_TEAM.values():
        for operation in operations:
            with pytest.raises(errors.NotFound):
                require(operation, None)
    with pytest.raises(errors.Forbidden, match="owner"):
        require("deleteTeam", "admin")
    assert require("deleteTeam", "owner") == "owner"
    assert require("getTeam", "member") == "member"


NOBODY, READER, KEEPER = frozenset(), frozenset({"directory"}), frozenset({"hosts"})


@pytest.mark.parametrize(
    ("role", "permissions", "of_team", "looks", "changes"),
    [
        (None, NOBODY, True, errors.NotFound, errors.NotFound),
        (None, NOBODY, False, errors.NotFound, errors.NotFound),
        ("member", NOBODY, True, None, errors.Forbidden),
        ("admin", NOBODY, True, None, None),
        ("owner", KEEPER, True, None, None),
        (None, READER, True, None, errors.Forbidden),
        (None, READER, False, None, errors.Forbidden),
        (None, KEEPER, True, None, errors.Forbidden),
        (None, KEEPER, False, None, None),
        (None, frozenset({"byoc", "templates"}), False, errors.NotFound, errors.NotFound),
    ],
)
def test_a_host_is_its_teams_or_the_platforms(role, permissions, of_team, looks, changes):
    """A team's own is its admins', whatever the platform's people may; a regular one, and one whose team is gone, is
    theirs who have the permission. Who may not look is told of none."""
    for operation in {"getHost", *OF_ADMINS_OF_THE_HOST}:
        wanted = looks if operation == "getHost" else changes
        if wanted is None:
            require_on_host(operation, role, permissions, of_team=of_team)
        else:
            with pytest.raises(wanted):
                require_on_host(operation, role, permissions, of_team=of_team)


def test_the_docs_are_up_to_date():
    """docs/roles.md is what scripts/write-roles would write."""
    done = subprocess.run(
        [sys.executable, "scripts/write-roles", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
