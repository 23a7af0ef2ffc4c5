"""Two people and two teams, from the first sign-up to a team's end, by HTTP against a whole platform with real VMs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

import asyncpg
import httpx
import pytest

from capsule.db.embedded import dsn_of

PASSWORD = "correct horse battery staple"
ADA, GRACE = "ada@engines.example", "grace@navy.example"
ANY = httpx.Limits(max_connections=None)
README = Path(__file__).parents[2] / "README.md"


class Web:
    """Somebody with a session; `key` instead: the holder of an API key."""

    def __init__(self, client, *, token=None, key=None):
        self._client = client
        self._headers = {"X-API-Key": key} if key else {"Authorization": f"Bearer {token}"} if token else {}

    def __call__(self, status, method, path, **how):
        """The answer's JSON (None without), which has to have this status."""
        answer = self._client.request(method, path, headers=self._headers, **how)
        assert answer.status_code == status, f"{method} {path}: {answer.text}"
        return answer.json() if answer.content else None

    def status(self, method, path, **how):
        """Of the answer, whatever it is."""
        return self._client.request(method, path, headers=self._headers, **how).status_code

    def code(self, method, path, **how):
        """Status and code of a refusal."""
        answer = self._client.request(method, path, headers=self._headers, **how)
        return answer.status_code, answer.json()["error"]["code"]


@pytest.fixture
def web(platform):
    """`web(token=…)`, `web(key=…)`, `web()`."""
    with httpx.Client(base_url=f"{platform.ready['url']}/v1", timeout=150, trust_env=False, limits=ANY) as client:
        yield lambda **credential: Web(client, **credential)


@pytest.fixture
def trail(platform):
    """`trail(team id)` → its audit rows as the database has them, oldest first."""

    async def read(team):
        connection = await asyncpg.connect(dsn_of(platform.data / "run"))
        try:
            return await connection.fetch(
                """select actor_name, resource_type, action, status, metadata::text from audit_logs
                   where team_id = $1 order by created_at, id""",
                UUID(team.removeprefix("team-")),
            )
        finally:
            await connection.close()

    def rows(team):
        return [(*list(row)[:4], json.loads(row["metadata"])) for row in asyncio.run(read(team))]

    return rows


def test_two_people_two_teams(platform, web, trail, poll):
    """Sign-up, a second team, invitation, switch, role, rename, key, sandboxes by session and key, leaving, deletion:
    whoever loses a right has lost it with the next request; a deleted team's VMs end, another's goes on; the audit
    trail tells exactly this story."""
    ada, grace = [
        web()(201, "POST", "/auth/signup", json={"email": email, "password": PASSWORD, "name": name})
        for email, name in ((ADA, "Ada"), (GRACE, "Grace"))
    ]
    home = ada["team_id"]
    at_home = web(token=ada["token"])
    team = at_home(201, "POST", "/teams", json={"name": "Analytical Engines"})["id"]
    owner = web(token=at_home(200, "POST", "/auth/switch-team", json={"team_id": team})["token"])
    kept = at_home(201, "POST", "/sandboxes", json={"memory_mb": 128})

    # Grace is invited, and made an admin
    visitor = web(token=grace["token"])
    assert visitor.code("GET", f"/teams/{team}") == (404, "not_found")
    assert owner(201, "POST", f"/teams/{team}/members", json={"email": GRACE})["role"] == "member"
    admin = web(token=visitor(200, "POST", "/auth/switch-team", json={"team_id": team})["token"])
    assert admin.code("PATCH", f"/teams/{team}", json={"name": "Compilers"}) == (403, "forbidden")
    owner(204, "PATCH", f"/teams/{team}/members/{grace['user_id']}", json={"role": "admin"})
    admin(204, "PATCH", f"/teams/{team}", json={"name": "Compilers"})
    assert [(one["name"], one["role"]) for one in admin(200, "GET", "/teams")] == [
        ("Compilers", "admin"),
        ("Grace's Team", "owner"),
    ]

    # sandboxes of the team: one by a session, one by a key
    made = admin(201, "POST", "/api-keys", json={"name": "ci"})
    key = web(key=made["key"])
    by_session = owner(201, "POST", "/sandboxes", json={"memory_mb": 128})
    by_key = key(201, "POST", "/sandboxes", json={"memory_mb": 128})
    assert {one["id"] for one in key(200, "GET", "/sandboxes")} == {by_session["id"], by_key["id"]}
    run = {"json": {"cmd": "echo hello"}}
    assert admin(200, "POST", f"/sandboxes/{by_key['id']}/exec", **run)["stdout"] == "hello\n"
    assert key(200, "POST", f"/sandboxes/{by_session['id']}/exec", **run)["stdout"] == "hello\n"
    assert at_home.code("POST", f"/sandboxes/{by_key['id']}/exec", **run) == (404, "not_found")

    # Grace leaves: session and key are good for nothing here
    admin(204, "POST", f"/teams/{team}/leave")
    assert admin.code("GET", "/sandboxes") == (403, "no_team")
    assert key.code("GET", "/sandboxes") == (401, "unauthorized")
    assert [one["email"] for one in owner(200, "GET", f"/teams/{team}/members")] == [ADA]
    shown = owner(200, "GET", "/audit-logs")["items"]

    # the team ends, and with it what ran in it
    [vmm] = platform.vmm_pids(by_key)
    assert platform.vmm_pids(by_session)
    owner(204, "DELETE", f"/teams/{team}")
    assert owner.code("GET", "/sandboxes") == (403, "no_team")
    poll(lambda: not platform.vmm_pids(by_key) and not platform.vmm_pids(by_session), 30, "VMMs that are gone")
    assert at_home(200, "POST", f"/sandboxes/{kept['id']}/exec", **run)["stdout"] == "hello\n"
    back = web()(200, "POST", "/auth/login", json={"email": ADA, "password": PASSWORD})
    assert back["team_id"] == home
    at_home(204, "DELETE", f"/sandboxes/{kept['id']}")
    assert vmm not in platform.vmm_pids()

    story = [
        (ADA, "team", "create", "success", {}),
        (ADA, "member", "add", "success", {"email": GRACE, "role": "member"}),
        (ADA, "member", "role_update", "info", {"new_role": "admin"}),
        (GRACE, "team", "rename", "info", {"old_name": "Analytical Engines", "new_name": "Compilers"}),
        (GRACE, "api_key", "create", "success", {"name": "ci"}),
        (ADA, "sandbox", "create", "success", {"template": "minimal"}),
        ("ci", "sandbox", "create", "success", {"template": "minimal"}),
        (GRACE, "member", "leave", "info", {}),
        (GRACE, "api_key", "revoke", "warning", {"name": "ci", "reason": "member left"}),
    ]
    ended = [(ADA, "sandbox", "destroy", "warning", {})] * 2
    assert trail(team) == [*story, (ADA, "team", "delete", "warning", {}), *ended]
    assert [
        (one["actor_name"], one["resource_type"], one["action"], one["status"], one.get("metadata", {}))
        for one in reversed(shown)
    ] == story
    assert trail(home) == [
        (ADA, "team", "create", "success", {}),
        (ADA, "sandbox", "create", "success", {"template": "minimal"}),
        (ADA, "sandbox", "destroy", "warning", {}),
    ]


def test_the_readme(platform, web):
    """Its lines about people, as they stand there, pasted into a shell."""
    web()(201, "POST", "/auth/signup", json={"email": "grace@example.com", "password": PASSWORD, "name": "Grace"})
    [lines] = re.findall(r"## People and teams\n.*?```sh\n(.*?)```", README.read_text(), re.DOTALL)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'{lines}\necho "$CAPSULE_API_KEY"'],
        env={"PATH": os.environ["PATH"], "CAPSULE_URL": platform.ready["url"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    decoder, rest = json.JSONDecoder(), done.stdout
    member, end = decoder.raw_decode(rest)
    page, further = decoder.raw_decode(rest[end:].lstrip())
    assert (member["email"], member["role"]) == ("grace@example.com", "member")
    assert [(one["resource_type"], one["action"]) for one in page["items"]] == [
        ("api_key", "create"),
        ("member", "add"),
        ("team", "create"),
    ]
    assert web(key=rest[end:].lstrip()[further:].strip())(200, "GET", "/sandboxes") == []


def test_fifty_sign_ups_with_one_address(web):
    """Passwords of the usual cost, a few at a time: one account, and 49 are told that there is one."""
    body = {"email": "eve@example.com", "password": PASSWORD, "name": "Eve"}
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: web().status("POST", "/auth/signup", json=body), range(50)))
    assert sorted(answers) == [201] + [409] * 49
