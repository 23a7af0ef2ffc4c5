"""Registration, refresh and heartbeat against a real PostgreSQL."""

from __future__ import annotations

from uuid import uuid4

import pytest
import trio

from agent.enrol.identity import certificate_request, new_key
from capsule.config import Settings
from capsule.db.pool import open_database
from capsule.db.queries import hosts as host_rows
from capsule.errors import Conflict, DatabaseUnavailable, Forbidden, InvalidRequest, NotFound, Unauthorized
from capsule.hosts.authority import load_authority
from capsule.hosts.ca import AuthorityLocked, CertificateAuthority, fingerprint
from capsule.hosts.directory import Directory, Endpoint
from capsule.hosts.registration import HostEnrolment
from capsule.hosts.tokens import HostTokens, new_refresh_token, new_registration_token
from capsule.model import HostRegistration
from tests.fixtures.fleet import proven

SETTINGS = Settings(database_url="x", secret_key="s" * 32)


@pytest.fixture
async def db(postgres_dsn):
    async with open_database(postgres_dsn) as database:
        yield database


@pytest.fixture
def forgotten():
    return []


@pytest.fixture
async def enrolment(db, forgotten):
    authority = await load_authority(db, SETTINGS)
    return HostEnrolment(db, authority, SETTINGS, forget=forgotten.append)


def asking(token, *, address="192.0.2.7:7443", key=None, **changes):
    request = {
        "token": token,
        "address": address,
        "arch": "x86_64",
        "cpu_cores": 4,
        "memory_mb": 8192,
        "disk_gb": 100,
        "csr_pem": certificate_request(key or new_key()),
    }
    return HostRegistration(**{**request, **changes})


async def joined(enrolment, **changes):
    new = await enrolment.create_host()
    return await enrolment.register(asking(new.registration_token, **changes))


async def reached(db, host):
    """What the monitor does when it has reached the host's agent."""
    await db.transaction(lambda tx: _reached(tx, host))


async def _reached(tx, host):
    await proven(tx, await host_rows.get(tx, host))


async def fetch(db, query, *parameters):
    async def run(connection):
        return [dict(record.items()) for record in await connection.fetch(query, *parameters)]

    return await db.run(run)


async def execute(db, statement, *parameters):
    async def run(connection):
        await connection.execute(statement, *parameters)

    await db.run(run)


async def test_a_host_registers_and_is_found_with_its_certificate(enrolment, db, forgotten):
    """Address and fingerprint are on the row, and the token gives access to its own heartbeat; it is pending for all
    that."""
    new = await enrolment.create_host(provider="hetzner", availability_zone="fsn1")
    assert new.host.status == "pending"
    got = await enrolment.register(asking(new.registration_token))
    assert (got.host.id, got.host.status, got.host.provider) == (new.host.id, "pending", "hetzner")
    assert forgotten == [new.host.id]
    endpoint = await Directory(db).find(new.host.id)
    assert endpoint == Endpoint("192.0.2.7:7443", fingerprint(got.cert_pem), 1)
    assert await Directory(db).find_all([new.host.id, uuid4()]) == {new.host.id: endpoint}
    await enrolment.heartbeat(new.host.id, got.token)
    assert (await db.run(host_rows.get, new.host.id)).status == "pending"


async def test_a_pending_host_has_no_endpoint(enrolment, db):
    new = await enrolment.create_host()
    assert await Directory(db).find(new.host.id) is None
    assert await Directory(db).find_all([new.host.id]) == {}


async def test_of_twenty_at_once_one_registers(enrolment):
    """A token is taken once, however many race for it."""
    new = await enrolment.create_host()
    outcomes = []

    async def take(number):
        try:
            got = await enrolment.register(asking(new.registration_token, address=f"192.0.2.7:{7000 + number}"))
            outcomes.append(got.host.address)
        except Unauthorized:
            outcomes.append(None)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(take, number)
    assert len(outcomes) == 20
    assert len([outcome for outcome in outcomes if outcome]) == 1


@pytest.mark.parametrize("token", ["", "htok-", new_registration_token(), new_refresh_token(), "x" * 5000])
async def test_a_token_that_was_never_made_is_refused(enrolment, token):
    with pytest.raises(Unauthorized):
        await enrolment.register(asking(token))


async def test_an_expired_token_is_refused(enrolment, db):
    """An hour, by the database's clock."""
    new = await enrolment.create_host()
    (row,) = await fetch(db, "select expires_at - now() as left from host_registration_tokens")
    assert 3540 < row["left"].total_seconds() <= 3600
    await execute(db, "update host_registration_tokens set expires_at = now()")
    with pytest.raises(Unauthorized):
        await enrolment.register(asking(new.registration_token))


async def test_only_hashes_are_stored(enrolment, db):
    """Nobody who reads the database can register or refresh."""
    new = await enrolment.create_host()
    got = await enrolment.register(asking(new.registration_token))
    rows = await fetch(db, "select sha256 from host_registration_tokens union select sha256 from host_refresh_tokens")
    stored = {row["sha256"] for row in rows}
    assert all(len(digest) == 32 for digest in stored)
    assert not stored & {new.registration_token.encode(), got.refresh_token.encode()}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"csr_pem": "nonsense"}, InvalidRequest),
        ({"address": "nowhere"}, InvalidRequest),
        ({"disk_gb": 0}, InvalidRequest),
    ],
)
async def test_a_failed_registration_leaves_the_token_unspent(enrolment, changes, error):
    """Whoever mistyped something tries again with the same token."""
    new = await enrolment.create_host()
    with pytest.raises(error):
        await enrolment.register(asking(new.registration_token, **changes))
    await enrolment.register(asking(new.registration_token))


async def test_no_host_takes_the_address_of_another(enrolment, db):
    """In any spelling; the token survives, and works with an address of the host's own."""
    there = await joined(enrolment, address="agent.example:7443")
    await reached(db, there.host.id)
    new = await enrolment.create_host()
    with pytest.raises(Conflict, match="another host"):
        await enrolment.register(asking(new.registration_token, address="AGENT.example.:7443"))
    await enrolment.register(asking(new.registration_token, address="agent.example:7444"))


async def test_registering_anew_ends_the_old_credentials(enrolment, db):
    """A host that lost its credentials joins as itself; whoever has the old ones is out."""
    old = await joined(enrolment)
    token = await enrolment.new_token(old.host.id)
    new = await enrolment.register(asking(token))
    assert new.host.id == old.host.id
    with pytest.raises(Unauthorized, match="anew"):
        await enrolment.heartbeat(old.host.id, old.token)
    with pytest.raises(Unauthorized):
        await enrolment.refresh(old.refresh_token, None)
    await enrolment.heartbeat(old.host.id, new.token)
    endpoint = await Directory(db).find(old.host.id)
    assert (endpoint.epoch, endpoint.earlier) == (2, None)


async def test_a_fresh_token_voids_the_one_before(enrolment):
    new = await enrolment.create_host()
    second = await enrolment.new_token(new.host.id)
    with pytest.raises(Unauthorized):
        await enrolment.register(asking(new.registration_token))
    await enrolment.register(asking(second))
    with pytest.raises(NotFound):
        await enrolment.new_token(uuid4())


async def test_refresh_rotates_token_and_certificate(enrolment, db):
    """New JWT, new refresh token, new certificate pinned, same registration."""
    key = new_key()
    first = await joined(enrolment, key=key)
    second = await enrolment.refresh(first.refresh_token, certificate_request(key))
    assert second.refresh_token != first.refresh_token
    endpoint = await Directory(db).find(first.host.id)
    assert endpoint == Endpoint("192.0.2.7:7443", fingerprint(second.cert_pem), 1, fingerprint(first.cert_pem))
    await enrolment.heartbeat(first.host.id, second.token)
    third = await enrolment.refresh(second.refresh_token, None)
    assert third.cert_pem == ""
    assert await Directory(db).find(first.host.id) == endpoint


async def test_a_lost_answer_is_asked_for_again(enrolment, db):
    """The same key with the same token gets the same refresh token, until that one is used. Until the answer arrives
    the agent has its old certificate, and is reached with it."""
    key = new_key()
    first = await joined(enrolment, key=key)
    second = await enrolment.refresh(first.refresh_token, certificate_request(key))
    again = await enrolment.refresh(first.refresh_token, certificate_request(key))
    assert again.refresh_token == second.refresh_token
    endpoint = await Directory(db).find(first.host.id)
    assert (endpoint.fingerprint, endpoint.earlier) == (fingerprint(again.cert_pem), fingerprint(first.cert_pem))
    rows = await fetch(db, "select action, scope, status from audit_logs")
    assert rows == [{"action": "credentials_repeated", "scope": "admin", "status": "info"}]
    third = await enrolment.refresh(again.refresh_token, certificate_request(key))
    with pytest.raises(Unauthorized):
        await enrolment.refresh(first.refresh_token, certificate_request(key))
    with pytest.raises(Unauthorized):
        await enrolment.refresh(third.refresh_token, certificate_request(key))


async def test_whichever_answer_arrived_is_pinned(enrolment, db):
    """A late copy of a request that was answered takes nothing from the agent; nor do a few. The next renewal ends
    them all but the one before it."""
    key = new_key()
    first = await joined(enrolment, key=key)
    pins = []
    for _ in range(12):
        got = await enrolment.refresh(first.refresh_token, certificate_request(key))
        pins.append(fingerprint(got.cert_pem))
        endpoint = await Directory(db).find(first.host.id)
        assert endpoint.pinned == (*reversed(pins[-9:]), fingerprint(first.cert_pem))
        assert await Directory(db).find_all([first.host.id]) == {first.host.id: endpoint}
    renewed = await enrolment.refresh(got.refresh_token, certificate_request(key))
    assert (await Directory(db).find(first.host.id)).pinned == (fingerprint(renewed.cert_pem), pins[-1])
    anew = await enrolment.register(asking(await enrolment.new_token(first.host.id)))
    assert (await Directory(db).find(first.host.id)).pinned == (fingerprint(anew.cert_pem),)


@pytest.mark.parametrize("thief_first", [True, False])
@pytest.mark.parametrize("with_key", [True, False])
async def test_a_stolen_refresh_token_used_twice_ends_both(enrolment, db, thief_first, with_key):
    """Whoever comes second finds both lines dead, and an audit row tells; one row, however often it is tried."""
    mine, thiefs = new_key(), new_key()
    first = await joined(enrolment, key=mine)
    await reached(db, first.host.id)
    owner = certificate_request(mine)
    thief = certificate_request(thiefs) if with_key else None
    one, two = (thief, owner) if thief_first else (owner, thief)
    got = await enrolment.refresh(first.refresh_token, one)
    for _ in range(3):
        with pytest.raises(Unauthorized):
            await enrolment.refresh(first.refresh_token, two)
    with pytest.raises(Unauthorized):
        await enrolment.refresh(got.refresh_token, one)
    rows = await fetch(db, "select * from audit_logs where resource_id = $1", f"host-{first.host.id}")
    assert [(row["action"], row["scope"], row["status"]) for row in rows] == [("credentials_revoked", "admin", "error")]
    for dead in (first, got):
        with pytest.raises(Unauthorized):
            await enrolment.heartbeat(first.host.id, dead.token)
    row = await db.run(host_rows.get, first.host.id)
    assert (row.status, row.proven) == ("unreachable", False)
    assert await Directory(db).find(first.host.id) is None


async def test_a_host_whose_credentials_were_stolen_joins_again(enrolment, db):
    """With a fresh token, as itself; what ended it ends nothing of the new registration."""
    first = await joined(enrolment)
    await reached(db, first.host.id)
    await enrolment.refresh(first.refresh_token, None)
    with pytest.raises(Unauthorized):
        await enrolment.refresh(first.refresh_token, None)
    again = await enrolment.register(asking(await enrolment.new_token(first.host.id)))
    with pytest.raises(Unauthorized):
        await enrolment.refresh(first.refresh_token, None)
    await reached(db, first.host.id)
    await enrolment.heartbeat(first.host.id, again.token)
    await enrolment.refresh(again.refresh_token, None)
    assert (await db.run(host_rows.get, first.host.id)).status == "online"


async def test_a_theft_that_two_see_at_once_is_told_once(enrolment, db):
    first = await joined(enrolment)
    await enrolment.refresh(first.refresh_token, None)

    async def reuse():
        with pytest.raises(Unauthorized):
            await enrolment.refresh(first.refresh_token, None)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(reuse)
    assert len(await fetch(db, "select from audit_logs where action = 'credentials_revoked'")) == 1
    assert (await db.run(host_rows.get, first.host.id)).credential_epoch == 2


async def test_of_many_refreshes_at_once_one_wins_or_all_agree(enrolment):
    """An agent that repeats itself while the first request is still under way gets one and the same token."""
    key = new_key()
    first = await joined(enrolment, key=key)
    answers = set()

    async def refresh():
        answers.add((await enrolment.refresh(first.refresh_token, certificate_request(key))).refresh_token)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(refresh)
    assert len(answers) == 1


async def test_an_expired_refresh_token_is_refused_and_is_no_theft(enrolment, db):
    got = await joined(enrolment)
    await execute(db, "update host_refresh_tokens set expires_at = now()")
    with pytest.raises(Unauthorized):
        await enrolment.refresh(got.refresh_token, None)
    assert await fetch(db, "select * from audit_logs") == []


async def test_a_heartbeat_brings_an_unreachable_host_back(enrolment, db):
    """The row says online at once, and the audit trail says so once."""
    got = await joined(enrolment)
    host = got.host.id
    await reached(db, host)

    async def lose(tx):
        row = await host_rows.get(tx, host)
        await host_rows.mark_status(
            tx, host, from_status=row.status, generation=row.generation, to_status="unreachable"
        )

    await db.transaction(lose)
    await enrolment.heartbeat(host, got.token)
    await enrolment.heartbeat(host, got.token)
    assert (await db.run(host_rows.get, host)).status == "online"
    rows = await fetch(db, "select action from audit_logs where resource_id = $1", f"host-{host}")
    assert rows == [{"action": "marked_up"}]


async def test_no_heartbeat_makes_a_host_online_that_is_not_proven(enrolment, db):
    """Registered anew it is unreachable until it was reached, however it beats."""
    old = await joined(enrolment)
    await reached(db, old.host.id)
    new = await enrolment.register(asking(await enrolment.new_token(old.host.id)))
    await enrolment.heartbeat(old.host.id, new.token)
    assert (await db.run(host_rows.get, old.host.id)).status == "unreachable"


async def test_heartbeats_are_for_ones_own_living_host(enrolment, db):
    """Another host's: Forbidden; deleted: NotFound; no token of ours: Unauthorized."""
    got = await joined(enrolment)
    other = await joined(enrolment, address="192.0.2.8:7443")
    with pytest.raises(Forbidden):
        await enrolment.heartbeat(other.host.id, got.token)
    with pytest.raises(Unauthorized):
        await enrolment.heartbeat(got.host.id, "nonsense")
    await execute(db, "update hosts set deleted_at = now() where id = $1", got.host.id)
    with pytest.raises(NotFound):
        await enrolment.heartbeat(got.host.id, got.token)
    with pytest.raises(Unauthorized):
        await enrolment.refresh(got.refresh_token, None)


async def test_the_authority_is_one_for_all_control_planes(db):
    """Several that start at once on an empty database, and any that comes later, issue under the same root."""
    made = []

    async def start():
        made.append((await load_authority(db, SETTINGS)).cert_pem)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(start)
    made.append((await load_authority(db, SETTINGS)).cert_pem)
    assert len(set(made)) == 1
    with pytest.raises(AuthorityLocked):
        await load_authority(db, Settings(database_url="x", secret_key="t" * 32))


async def test_without_a_database_the_answer_is_the_apis_own(tmp_path):
    """503 in the words of the API, from every use-case."""
    host = uuid4()
    async with open_database(f"postgresql:///none?host={tmp_path}") as nowhere:
        enrolment = HostEnrolment(nowhere, CertificateAuthority.create(), SETTINGS)
        for ask in (
            enrolment.create_host(),
            enrolment.new_token(host),
            enrolment.register(asking(new_registration_token())),
            enrolment.refresh(new_refresh_token(), None),
            enrolment.heartbeat(host, HostTokens(SETTINGS).issue(host, 1)),
        ):
            with pytest.raises(DatabaseUnavailable):
                await ask
