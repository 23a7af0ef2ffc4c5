"""No secret ever reaches a log: a story in which every kind of one is made, used and refused, and then a search."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from hashlib import sha256
from urllib.parse import parse_qs, urlsplit

import pytest
import structlog

from capsule.auth.passwords import Passwords
from capsule.hosts.tokens import new_registration_token
from tests.fixtures.github import CLIENT_ID, CLIENT_SECRET
from tests.fixtures.people import SECRET, quick_settings
from tests.people.browsers import Browser
from tests.people.stage import CSR

PASSWORDS = {
    "first": "Tr0ub4dor&3-first",
    "second": "Tr0ub4dor&3-second",
    "wrong": "Tr0ub4dor&3-wrong",
    "refused": "Tr0ub4dor&3-refused",
}


@dataclass
class Secrets:
    """What must not be found, by what it is."""

    values: set[tuple[str, str]] = field(default_factory=set)

    def add(self, what, text):
        """Also its parts, where parts are as good as all of it."""
        assert len(text) >= 8, what
        self.values.add((what, text))
        if text.count(".") == 2:  # a JWT: its signature is the secret
            self.values.add((f"{what}'s signature", text.rpartition(".")[2]))
        if text.startswith(("cap_", "htok-", "hrt-")):
            self.values.add((f"{what}'s digits", text[5:]))
        return text

    def found_in(self, text):
        return sorted(what for what, value in self.values if value in text)


@pytest.fixture
async def people_settings(github):
    return quick_settings(
        public_url="https://capsule.example/",
        github_client_id=CLIENT_ID,
        github_client_secret=CLIENT_SECRET,
        github_url=github.url,
        github_api_url=f"{github.url}/",
    )


@pytest.fixture
def written(caplog, capfd):
    """All that is logged at any level, before anything is masked, and all that is printed."""
    caplog.set_level(logging.WARNING)  # what a daemon without a configuration of its own would print
    processors = [structlog.contextvars.merge_contextvars, structlog.processors.format_exc_info]
    with structlog.testing.capture_logs(processors=processors) as events:

        def text():
            printed = "".join(capfd.readouterr())
            return "\n".join([*(str(sorted(event.items(), key=str)) for event in events), caplog.text, printed])

        yield events, text


async def test_no_secret_is_logged(people, github, written, monkeypatch):
    """Passwords, hashes, session and host tokens, keys, cookies, states, codes and our own secrets, in requests that
    succeed, are refused, and break."""
    events, text = written
    secrets = Secrets()
    for what in ("secret_key", "github_client_secret"):
        secrets.add(what, getattr(people.settings, what))
    assert people.settings.secret_key == SECRET
    for what, password in PASSWORDS.items():
        secrets.add(f"{what} password", password)
    ada = await _accounts(people, secrets)
    await _keys(people, ada, secrets)
    await _provider(people, github, secrets)
    await _hosts(people, secrets)
    await _bugs(people, ada, secrets, monkeypatch)
    await _hashes(people, secrets)
    assert secrets.found_in(await _database(people)) == ["a hash", "a hash's end", "a key's hash"]
    requests = [event for event in events if event["event"] == "http_request"]
    assert len(requests) > 25
    assert [event for event in events if event["event"] == "request_failed"]
    logged = text()
    assert "/v1/auth/login" in logged
    assert ada.email in str(await people.sql("select actor_name from audit_logs"))
    assert len(secrets.values) > 30
    assert secrets.found_in(logged) == []


async def _database(people):
    """Every row of every table as text; a password has no place there, neither has its fast hash."""
    tables = await people.sql("select tablename from pg_tables where schemaname = current_schema")
    rows = []
    for table in tables:
        rows += [row["row"] for row in await people.sql(f"select t::text as row from {table['tablename']} t")]  # noqa: S608
    text = "\n".join(rows)
    assert "argon2id" in text
    for password in PASSWORDS.values():
        assert sha256(password.encode()).hexdigest() not in text
    return text


async def _hashes(people, secrets):
    for row in await people.sql("select password_hash from users where password_hash is not null"):
        secrets.add("a hash", row["password_hash"])
        secrets.add("a hash's end", row["password_hash"].rpartition("$")[2])


async def _accounts(people, secrets):
    ada = await people.sign_up("Ada", password=PASSWORDS["first"])
    await _hashes(people, secrets)
    secrets.add("the first session", ada.token)
    for password in (PASSWORDS["wrong"], PASSWORDS["first"]):
        answer = await people.nobody.post("/v1/auth/login", {"email": ada.email, "password": password})
    secrets.add("the second session", answer.json()["token"])
    await people.nobody.post("/v1/auth/login", {"email": "nobody@example.com", "password": PASSWORDS["wrong"]})
    taken = {"email": ada.email, "password": PASSWORDS["refused"], "name": "Eve"}
    assert (await people.nobody.post("/v1/auth/signup", taken)).status_code == 409
    malformed = {**taken, "unknown": PASSWORDS["refused"]}
    assert (await people.nobody.post("/v1/auth/signup", malformed)).status_code == 400
    for current, new, status in (("wrong", "second", 403), ("first", "second", 204)):
        body = {"current_password": PASSWORDS[current], "new_password": PASSWORDS[new]}
        assert (await ada.post("/v1/me/password", body)).status_code == status
    for bad in (people.expired(ada), people.forged(ada), ada.token + "x"):
        answer = await people.nobody.get("/v1/me", headers={"Authorization": f"Bearer {secrets.add(bad[-9:], bad)}"})
        assert answer.status_code == 401
    answer = await people.nobody.post("/v1/auth/login", {"email": ada.email, "password": PASSWORDS["second"]})
    other = people.person(answer.json())
    secrets.add("the session that was ended", other.token)
    assert (await other.post("/v1/auth/logout")).status_code == 204
    assert (await other.get("/v1/me")).status_code == 401
    switched = await ada.post("/v1/auth/switch-team", {"team_id": f"team-{ada.team}"})
    secrets.add("the session of a switch", switched.json()["token"])
    return ada


async def _keys(people, ada, secrets):
    made = await ada.post("/v1/api-keys", {"name": "ci"}, headers={"Idempotency-Key": "once-and-only-once"})
    assert made.status_code == 201, made.text
    key = secrets.add("a key", made.json()["key"])
    [row] = await people.sql("select encode(sha256, 'hex') as hash from api_keys")
    secrets.add("a key's hash", row["hash"])
    headers = {"X-API-Key": key}
    assert (await people.nobody.get("/v1/sandboxes", headers=headers)).status_code == 200
    assert (await people.nobody.get("/v1/teams", headers=headers)).status_code == 403
    assert (await ada.delete(f"/v1/api-keys/{made.json()['id']}")).status_code == 204
    assert (await people.nobody.get("/v1/sandboxes", headers=headers)).status_code == 401
    malformed = secrets.add("a key with a slip", key + "0")
    assert (await people.nobody.get("/v1/sandboxes", headers={"X-API-Key": malformed})).status_code == 401
    in_query = await people.nobody.get("/v1/sandboxes", params={"api_key": key})
    assert in_query.status_code in {400, 401}


async def _provider(people, github, secrets):
    browser, grace = Browser(people), github.account(1906, "grace", name="Grace", email="grace@example.com")
    location = await browser.leave()
    state = secrets.add("a state", parse_qs(urlsplit(location).query)["state"][0])
    for name, value in browser.cookies.items():
        secrets.add(f"the cookie {name}", value)
    code, _ = github.authorize(location, grace)
    secrets.add("GitHub's code", code)
    said = await browser.come_back(code=code, state=state)
    for name, value in browser.cookies.items():
        secrets.add(f"the cookie {name}", value)
    answer = await browser.exchange(secrets.add("the one-time code", said["code"]))
    assert answer.status_code == 200, answer.text
    secrets.add("the session of a provider", answer.json()["token"])
    assert (await browser.exchange(said["code"])).status_code == 401
    assert "error" in await browser.come_back(code=code, state=state)
    for authorization in {seen[1].get("authorization") for seen in github.seen} - {None}:
        secrets.add("GitHub's token", authorization.partition(" ")[2])
    for _, _, form in github.seen:
        if verifier := form.get("code_verifier"):
            secrets.add("the verifier", verifier)


async def _hosts(people, secrets):
    new = await people.enrolment.create_host()
    body = {
        "token": secrets.add("a registration token", new.registration_token),
        "address": "192.0.2.7:7001",
        "arch": "x86_64",
        "cpu_cores": 1,
        "memory_mb": 1,
        "disk_gb": 1,
        "csr_pem": CSR,
    }
    answer = await people.nobody.post("/v1/hosts/register", body)
    assert answer.status_code == 201, answer.text
    host = answer.json()
    refresh = secrets.add("a refresh token", host["refresh_token"])
    headers = {"X-Host-Token": secrets.add("a host's token", host["token"])}
    beat = f"/v1/hosts/{host['host']['id']}/heartbeat"
    assert (await people.nobody.post(beat, headers=headers)).status_code == 204
    again = await people.nobody.post("/v1/hosts/register", body)
    unknown = secrets.add("an unknown token", new_registration_token())
    assert (await people.nobody.post("/v1/hosts/register", {**body, "token": unknown})).status_code == 401
    for _ in range(2):  # the second time it is stolen, and the log says so
        renewed = await people.nobody.post("/v1/hosts/auth/refresh", {"refresh_token": refresh})
    assert (again.status_code, renewed.status_code) == (401, 401)


async def _bugs(people, ada, secrets, monkeypatch):
    """A failure of ours is logged with its traceback."""

    async def broken(_self, stored, password):
        raise RuntimeError("the verifier broke" if stored and password else "it broke")

    monkeypatch.setattr(Passwords, "matches", broken)
    answer = await people.nobody.post("/v1/auth/login", {"email": ada.email, "password": PASSWORDS["second"]})
    assert answer.status_code == 500
    assert secrets.found_in(answer.text) == []
