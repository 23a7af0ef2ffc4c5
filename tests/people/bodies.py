"""The least that each operation takes as a request."""

from __future__ import annotations

import secrets
from uuid import uuid4

from tests.people.stage import CSR, PASSWORD


def minimal(row, stage):
    """Arguments of an httpx request for the operation. A body is well-formed and names what is on the stage."""
    name = row.alias_of or row.name
    if name in WITHOUT:
        return {}
    if name in BODIES:
        return BODIES[name](stage)
    assert row.body is None, f"tests/people/bodies.py does not say what the least request to {name} is"
    assert not row.form, f"tests/people/bodies.py does not say what the least form for {name} is"
    return {}


def _json(make):
    return lambda stage: {"json": make(stage)}


def _fresh_email(_stage):
    return f"{uuid4().hex}@example.com"


WITHOUT = frozenset({"forkSandbox", "resumeSandbox"})
"""A body is optional."""
BODIES = {
    "signUp": _json(lambda s: {"email": _fresh_email(s), "password": PASSWORD, "name": "Ada"}),
    "logIn": _json(lambda s: {"email": s.emails["owner"], "password": PASSWORD}),
    "exchangeLoginCode": _json(lambda _: {"code": secrets.token_urlsafe(32)}),
    "switchTeam": _json(lambda s: {"team_id": f"team-{s.team}"}),
    "updateMe": _json(lambda _: {"name": "Another"}),
    "changePassword": _json(lambda _: {"current_password": PASSWORD, "new_password": f"{PASSWORD}!"}),
    "createTeam": _json(lambda _: {"name": "Another"}),
    "renameTeam": _json(lambda _: {"name": "Renamed"}),
    "addMember": _json(lambda s: {"email": s.emails["invited"]}),
    "changeRole": _json(lambda _: {"role": "admin"}),
    "searchUsers": lambda _: {"params": {"email": "ada@example"}},
    "createApiKey": _json(lambda _: {"name": "ci"}),
    "setByoc": _json(lambda _: {"enabled": True}),
    "createSandbox": _json(lambda _: {}),
    "execInSandbox": _json(lambda _: {"cmd": "true"}),
    "writeFile": lambda _: {"files": {"path": (None, "/a"), "file": ("a", b"x")}},
    "readFile": _json(lambda _: {"path": "/a"}),
    "writeFileStream": lambda _: {"files": {"path": (None, "/a"), "file": ("a", b"x")}},
    "readFileStream": _json(lambda _: {"path": "/a"}),
    "listFiles": _json(lambda _: {"path": "/a"}),
    "makeDirectory": _json(lambda _: {"path": "/a"}),
    "removeFile": _json(lambda _: {"path": "/a"}),
    "createSnapshot": _json(lambda s: {"sandbox_id": s.sandbox}),
    "createHost": _json(lambda _: {"type": "regular"}),
    "addHostTag": _json(lambda _: {"tag": "gpu"}),
    "registerHost": _json(
        lambda s: {
            "token": s.registration_token,
            "address": f"192.0.2.7:{secrets.randbelow(60000) + 1024}",
            "arch": "x86_64",
            "cpu_cores": 1,
            "memory_mb": 1,
            "disk_gb": 1,
            "csr_pem": CSR,
        }
    ),
    "refreshHost": _json(lambda s: {"refresh_token": s.refresh_token}),
}
