"""Three machines with real VMs, two control planes on one database: what fails, heals; what is stolen, dies."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial

import asyncpg
import httpx
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.e2e.fleet_stage import AGENT_PORT, EMAIL, SILENCE, TOKEN_LIFETIME

ROUND = 5
"""Seconds between two looks of the monitor."""
SLOW = 60
"""Seconds more, for a machine that has other things to do."""
TICKING = "while :; do date +%s%N > /tmp/tick.new; mv /tmp/tick.new /tmp/tick; sleep 0.1; done"
LOST = "its control plane was lost"


@pytest.fixture(autouse=True)
def _reset(request, fleet):
    """All is connected for the next test; with a failure, what the programs said."""
    failed = request.session.testsfailed
    yield
    fleet.connect()
    if request.session.testsfailed > failed:
        print(fleet.complaints())  # noqa: T201 - shown by pytest


@pytest.fixture(scope="module")
def told(fleet):
    """`told(host)` → what the audit trail has of a host: actor, action, status, metadata; oldest first."""

    async def read(host):
        connection = await asyncpg.connect(fleet.dsn)
        try:
            return await connection.fetch(
                """select actor_name, action, status, metadata::text from audit_logs
                   where resource_type = 'host' and resource_id = $1 and scope = 'admin' order by created_at, id""",
                host,
            )
        finally:
            await connection.close()

    return lambda host: [(*list(row)[:3], json.loads(row[3])) for row in asyncio.run(read(host))]


def signing_request():
    """A key of one's own, and what a control plane needs to certify it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "host")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def start_ticking(fleet, sandbox):
    """A file, and a process that shows that it goes on."""
    fleet.exec(sandbox, f"echo {sandbox} > /root/name; sync")
    fleet.call(202, "POST", f"/sandboxes/{sandbox}/exec", json={"cmd": TICKING, "background": True, "tag": "clock"})


def ticks(fleet, sandbox):
    """The file is there, and the process goes on: it writes another time than it had written."""
    look = 'cat /root/name; t=$(cat /tmp/tick); [ "$t" ]; while [ "$(cat /tmp/tick)" = "$t" ]; do sleep 0.1; done'
    return fleet.exec(sandbox, f"set -e; {look}") == f"{sandbox}\n"


def has_expired(token):
    return jwt.decode(token, options={"verify_signature": False})["exp"] < time.time()


def populate(fleet):
    """A running sandbox on every host, where there was none; what is there, in the order of the machines."""
    for one in fleet.call(200, "GET", "/sandboxes"):
        if one["status"] != "running":
            fleet.call(204, "DELETE", f"/sandboxes/{one['id']}")
    for _ in range(3):
        empty = [machine for machine in fleet.machines if not fleet.on(machine)]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: fleet.create(), empty))
    there = [fleet.on(machine) for machine in fleet.machines]
    assert all(there)
    return there


def test_a_host_is_cut_off_and_comes_back(fleet, told):
    """Sandboxes go to all three. One host's packets are dropped: it is unreachable and its sandboxes are missing after
    the time-out, the others work on, and it pauses what it has. Healed after its token has expired: it takes a new one
    and is online, its sandboxes rest as it says, resume works, files and processes are there. The audit trail tells
    exactly that."""
    fleet.clear()
    with ThreadPoolExecutor(3) as pool:
        made = set(pool.map(lambda _: fleet.create(), range(4)))
    places = [set(fleet.on(machine)) for machine in fleet.machines]
    assert sorted(map(len, places)) == [1, 1, 2]
    assert set.union(*places) == made
    lost = fleet.machines[[len(place) for place in places].index(2)]
    cut_off = fleet.on(lost)
    others = made - set(cut_off)
    for sandbox in cut_off:
        start_ticking(fleet, sandbox)
    assert len(lost.vmms()) == 2

    fleet.cut(lost)
    fleet.until(lambda: fleet.status(lost) == "unreachable", SILENCE + ROUND + SLOW, "a host marked down")
    token = lost.credentials()["token"]
    heard = datetime.fromisoformat(fleet.call(200, "GET", f"/hosts/{lost.host}")["last_heartbeat_at"])
    assert datetime.now(UTC) - heard >= timedelta(seconds=SILENCE)
    assert {fleet.sandbox(sandbox) for sandbox in cut_off} == {"missing"}
    assert fleet.ask("POST", f"/sandboxes/{cut_off[0]}/exec", json={"cmd": "true"}).status_code in {409, 503}
    assert {fleet.sandbox(sandbox) for sandbox in others} == {"running"}
    assert fleet.exec(min(others), "echo on") == "on\n"
    fleet.until(lambda: not lost.vmms(), SILENCE + SLOW, "a host that has paused everything")
    fleet.until(lambda: has_expired(token), TOKEN_LIFETIME + SLOW, "a token that is good no more")
    assert lost.credentials()["token"] == token

    fleet.connect()
    fleet.until(lambda: fleet.status(lost) == "online", SLOW, "a host marked up")
    assert lost.credentials()["token"] != token
    fleet.until(lambda: {fleet.sandbox(sandbox) for sandbox in cut_off} == {"paused"}, 2 * ROUND + SLOW, "paused rows")
    for sandbox in cut_off:
        assert fleet.call(200, "POST", f"/sandboxes/{sandbox}/resume")["status"] == "running"
        assert ticks(fleet, sandbox)

    story = [(who, action, status) for who, action, status, _ in told(lost.host)]
    assert story[0] == (EMAIL, "create", "success")
    assert [action for _, action, _ in story].count("marked_down") == 1
    assert [row[1:] for row in story if row[1].startswith("marked_")] == [
        ("marked_down", "error"),
        ("marked_up", "success"),
    ]
    for other in fleet.machines:
        assert other is lost or "marked_down" not in {action for _, action, _, _ in told(other.host)}
    shown = fleet.call(200, "GET", "/audit-logs", params={"action": "pause", "resource_type": "sandbox"})["items"]
    assert {(one["resource_id"], one["actor_name"], one["metadata"]["reason"]) for one in shown} == {
        (sandbox, "monitor", LOST) for sandbox in cut_off
    }


def test_a_control_plane_is_killed_in_the_middle(fleet):
    """kill -9 with creates and pauses under way: the same requests at the other one finish each of them, one sandbox
    for each key, on one host; no VM is there that no row knows; the other's monitor leads within 15 s."""
    first, second = fleet.planes
    second.start()
    fleet.until(second.answers, 60, "a second control plane")
    fleet.fence()
    fleet.clear()
    earlier = {action: len(audited(fleet, action)) for action in ("create", "pause")}
    assert first.leads()
    assert not second.leads()
    with ThreadPoolExecutor(2) as pool:
        running = list(pool.map(lambda _: fleet.create(), range(2)))
    keys = [str(uuid.uuid4()) for _ in range(3)]

    def create(key, plane):
        return fleet.ask("POST", "/sandboxes", json={"memory_mb": 128}, key=key, plane=plane)

    def pause(sandbox, key, plane):
        return fleet.ask("POST", f"/sandboxes/{sandbox}/pause", key=key, plane=plane)

    work = [*(partial(create, key) for key in keys), *(partial(pause, one, str(uuid.uuid4())) for one in running)]

    def attempt(one):
        try:
            return one(first)
        except httpx.TransportError:
            return None

    with ThreadPoolExecutor(len(work)) as pool:
        under_way = [pool.submit(attempt, one) for one in work]
        fleet.until(lambda: len(listed(fleet, "starting")) + len(listed(fleet, "pausing")) >= 3, 20, "work under way")
        first.kill()
        died = time.monotonic()
        fleet.plane = second
        fleet.fence()
        answers = [one.result() for one in under_way]
        assert answers.count(None) >= 3
        done = list(pool.map(partial(finish, second), work))
    fleet.until(second.leads, 15 - (time.monotonic() - died), "the lead of the other control plane")
    assert [one["status"] for one in done] == ["running"] * 3 + ["paused"] * 2
    assert [one["id"] for one in done[3:]] == running
    made = {one["id"] for one in done[:3]}
    assert len(made) == 3
    for before, after in zip(answers, done, strict=True):
        assert before is None or before.json()["id"] == after["id"]
    assert {create(key, second).json()["id"] for key in keys} == made
    assert {one["id"] for one in fleet.call(200, "GET", "/sandboxes")} == {*made, *running}
    fleet.until(lambda: len(vmms(fleet)) == len(made), 60, "as many VMs as rows that run")
    assert sorted(one for machine in fleet.machines for one in fleet.on(machine)) == sorted({*made, *running})
    assert sorted(audited(fleet, "create")[earlier["create"] :]) == sorted({*made, *running})
    assert sorted(audited(fleet, "pause")[earlier["pause"] :]) == sorted(running)
    fleet.until(fleet.is_online, SLOW, "three hosts online")
    for sandbox in running:
        assert fleet.call(200, "POST", f"/sandboxes/{sandbox}/resume")["status"] == "running"


def finish(plane, request):
    """Sent again and again, as long as the answer is that it is not done; what it gets in the end."""
    deadline = time.monotonic() + 60
    while not (answer := request(plane)).is_success:
        assert answer.status_code == 503, answer.text
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.5)
    return answer.json()


def listed(fleet, status):
    return fleet.call(200, "GET", "/sandboxes", params={"status": status})


def audited(fleet, action):
    """Ids of sandboxes that the team's trail says this of, oldest first."""
    query = {"action": action, "resource_type": "sandbox", "limit": 200}
    return [one["resource_id"] for one in reversed(fleet.call(200, "GET", "/audit-logs", params=query)["items"])]


def vmms(fleet):
    return [pid for machine in fleet.machines for pid in machine.vmms()]


def test_an_address_is_proven(fleet, told):
    """Who registers with the address of a host gets nothing. Who registers with an address from where everything is
    passed on to that host is never online. That host loses nothing."""
    victim = fleet.machines[0]
    before = fleet.call(200, "GET", f"/hosts/{victim.host}")
    thief = fleet.call(201, "POST", "/hosts", json={"type": "regular"})
    claim = {
        "token": thief["registration_token"],
        "arch": "x86_64",
        "cpu_cores": 64,
        "memory_mb": 2**20,
        "disk_gb": 1000,
        "csr_pem": signing_request(),
    }
    for spelling in (victim.address, f"[::ffff:{victim.address}]"):
        refused = fleet.ask("POST", "/hosts/register", json={**claim, "address": f"{spelling}:{AGENT_PORT}"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert fleet.call(200, "GET", f"/hosts/{thief['host']['id']}")["status"] == "pending"

    beside = "10.77.0.66"
    fleet.relay(beside, victim)
    token = fleet.call(201, "POST", f"/hosts/{thief['host']['id']}/token")["registration_token"]
    body = {**claim, "token": token, "address": f"{beside}:{AGENT_PORT}"}
    credentials = fleet.call(201, "POST", "/hosts/register", json=body)
    refusals = f"address_not_proven.*{thief['host']['id'].removeprefix('host-')}"
    fleet.until(lambda: fleet.plane.said(refusals) >= 3, 2 * ROUND + SLOW, "three attempts to prove the address")
    with fleet.http() as client:
        beat = client.post(
            f"{fleet.plane.url}/v1/hosts/{thief['host']['id']}/heartbeat",
            headers={"X-Host-Token": credentials["token"]},
        )
    assert beat.status_code == 204
    assert fleet.call(200, "GET", f"/hosts/{thief['host']['id']}")["status"] == "pending"
    there = populate(fleet)  # in turn, to hosts that are proven
    assert {one["id"] for one in fleet.call(200, "GET", "/sandboxes")} == {one for ones in there for one in ones}
    after = fleet.call(200, "GET", f"/hosts/{victim.host}")
    assert {**after, "last_heartbeat_at": ""} == {**before, "last_heartbeat_at": ""}
    fleet.call(204, "DELETE", f"/hosts/{thief['host']['id']}")


def test_a_refresh_token_is_stolen(fleet, told):
    """Thief and host use the same refresh token: neither has credentials any more, and the audit trail says so. The
    host pauses what it has, and goes on as the same host when an operator joins it again with a fresh token."""
    victim = fleet.machines[1]
    [_, [sandbox, *_], _] = populate(fleet)
    start_ticking(fleet, sandbox)
    stolen = victim.credentials()

    def refresh(token):
        return fleet.ask("POST", "/hosts/auth/refresh", json={"refresh_token": token, "csr_pem": signing_request()})

    thiefs = refresh(stolen["refresh_token"])
    assert thiefs.status_code == 200
    assert refresh(stolen["refresh_token"]).status_code == 401  # the second use, by whomever
    assert refresh(thiefs.json()["refresh_token"]).status_code == 401
    for token in (thiefs.json()["token"], stolen["token"]):
        with fleet.http() as client:
            beat = client.post(f"{fleet.plane.url}/v1/hosts/{victim.host}/heartbeat", headers={"X-Host-Token": token})
        assert beat.status_code == 401
    [revoked] = [row for row in told(victim.host) if row[1] == "credentials_revoked"]
    assert revoked[2] == "error"
    fleet.until(lambda: not victim.vmms(), SILENCE + SLOW, "a host that has paused everything")
    assert fleet.status(victim) == "unreachable"

    victim.stop_agent()
    line = fleet.call(201, "POST", f"/hosts/{victim.host}/token")["join_command"]
    victim.type(f"{line} --force")
    fleet.until(lambda: fleet.status(victim) == "online", 2 * SLOW, "a host that is back")
    fleet.until(lambda: fleet.sandbox(sandbox) == "paused", 2 * ROUND + SLOW, "a paused row")
    assert fleet.call(200, "POST", f"/sandboxes/{sandbox}/resume")["status"] == "running"
    assert ticks(fleet, sandbox)


def test_a_host_is_drained_and_deleted(fleet, told):
    """Drained: what runs there is paused and nothing new comes. Deleting is refused while something rests there, and
    the preview says what; forced, it ends with the host, whose agent has nothing left and no credentials."""
    leaving = fleet.machines[2]
    there = populate(fleet)[2]
    assert fleet.call(202, "POST", f"/hosts/{leaving.host}/drain")["status"] == "draining"
    at_rest = lambda: {fleet.sandbox(one) for one in there} == {"paused"}  # noqa: E731
    fleet.until(at_rest, 2 * ROUND + SLOW, "sandboxes put to rest")
    assert not leaving.vmms()
    with ThreadPoolExecutor(2) as pool:
        elsewhere = list(pool.map(lambda _: fleet.create(), range(2)))
    assert fleet.on(leaving) == there
    assert fleet.ask("POST", f"/sandboxes/{there[0]}/resume").status_code in {409, 503}

    path = f"/hosts/{leaving.host}"
    assert fleet.call(200, "GET", f"{path}/delete-preview")["sandbox_ids"] == there
    refused = fleet.call(409, "DELETE", path)["error"]
    assert (refused["code"], refused["sandbox_ids"]) == ("host_has_sandboxes", there)
    fleet.call(204, "DELETE", path, params={"force": "true"})
    assert fleet.ask("GET", path).status_code == 404
    assert {fleet.sandbox(one) for one in there} == {"stopped"}
    fleet.until(lambda: not any((leaving.state / "sandboxes").iterdir()), SLOW, "a host that has nothing left")
    story = [(who, action, status) for who, action, status, _ in told(leaving.host)]
    assert story[-2:] == [(EMAIL, "drain", "info"), (EMAIL, "delete", "warning")]
    assert {fleet.sandbox(one) for one in elsewhere} == {"running"}
