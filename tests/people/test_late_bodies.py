"""A credential that dies while its request's body is on the way lets nothing happen."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import h11
import pytest
import trio

from capsule import errors
from capsule.auth.authenticator import Authenticator
from capsule.people.platform import Platform
from capsule.principals import Session, User
from tests.fixtures.people import PASSWORD

FORM = (
    b'--x\r\nContent-Disposition: form-data; name="path"\r\n\r\n/a\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\ncontent\r\n--x--\r\n'
)


class Slow:
    """A request whose body has come but for its last byte."""

    def __init__(self, stream, rest):
        self._stream = stream
        self._rest = rest

    async def finish(self):
        """Send the rest: the status and the error's code, None for none."""
        await self._stream.send_all(self._rest)
        connection, body = h11.Connection(h11.CLIENT), b""
        connection.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
        connection.send(h11.EndOfMessage())
        status = None
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await self._stream.receive_some())
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                return status, json.loads(body)["error"]["code"] if status >= 400 else None


@pytest.fixture
def begin(people, monkeypatch):
    """Sends all of a request but the last byte of its body, and waits until the server has found out who asks."""

    @asynccontextmanager
    async def begun(caller, method, path, body, media_type="application/json"):
        asked = trio.Event()

        def watched(method):
            async def ask(authenticator, credential):
                found = await method(authenticator, credential)
                asked.set()
                return found

            return ask

        port = int(people.url.rpartition(":")[2])
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Host": "x", "Content-Type": media_type, "Content-Length": str(len(data)), **caller.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        with monkeypatch.context() as patch, trio.fail_after(60):
            for name in ("api_key", "session"):
                patch.setattr(Authenticator, name, watched(getattr(Authenticator, name)))
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data[:-1])
                await asked.wait()
                yield Slow(stream, data[-1:])

    return begun


async def test_a_body_that_comes_late_for_one_who_may(people, begin):
    """Nothing was taken away: it is done."""
    ada = await people.sign_up("Ada")
    async with begin(ada, "POST", "/v1/api-keys", {"name": "late"}) as request:
        assert await request.finish() == (201, None)


async def test_a_session_that_a_password_change_ended(people, begin):
    """Whoever changes the password because a session was stolen ends what the thief has begun, too."""
    ada = await people.sign_up("Ada")
    login = await people.nobody.post("/v1/auth/login", {"email": ada.email, "password": PASSWORD})
    elsewhere = people.person(login.json())
    async with begin(ada, "POST", "/v1/api-keys", {"name": "backdoor"}) as request:
        change = {"current_password": PASSWORD, "new_password": "another password"}
        assert (await elsewhere.post("/v1/me/password", change)).status_code == 204
        assert await request.finish() == (401, "unauthorized")
    assert await people.sql("select from api_keys") == []


async def test_a_session_that_was_logged_out(people, begin):
    """No team is made."""
    ada = await people.sign_up("Ada")
    async with begin(ada, "POST", "/v1/teams", {"name": "after"}) as request:
        assert (await ada.post("/v1/auth/logout")).status_code == 204
        assert await request.finish() == (401, "unauthorized")
    assert await people.sql("select from teams where name = 'after'") == []


@pytest.mark.parametrize("by", ["session", "key"])
async def test_a_member_who_was_removed(people, begin, by):
    """Neither their session nor a key that they made gets a sandbox; none was begun."""
    team = await people.team_of_three()
    await people.host()
    caller = team.member if by == "session" else await people.key(team.member)
    async with begin(caller, "POST", "/v1/sandboxes", {"template": "minimal"}) as request:
        path = f"/v1/teams/{team.wire_id}/members/{team.member.wire_id}"
        assert (await team.owner.delete(path)).status_code == 204
        assert await request.finish() == ((403, "no_team") if by == "session" else (401, "unauthorized"))
    assert await people.sql("select from sandboxes") == []
    assert "create" not in [row[2] for row in await people.audit(team.id) if row[1] == "sandbox"]


async def test_an_admin_who_is_none_any_more(people, begin):
    """The team stays as it was."""
    director = await people.sign_up("Director")
    await people.make_admin(director, "byoc")
    path = f"/v1/admin/teams/team-{director.team}/byoc"
    async with begin(director, "PUT", path, {"enabled": True}) as request:
        await people.sql("update users set is_admin = false where id = $1", director.id)
        assert await request.finish() == (403, "forbidden")
    assert await people.sql("select from teams where is_byoc") == []


async def test_a_file_that_comes_late(people, begin):
    """An upload by a key that is revoked meanwhile does not reach the sandbox."""
    ada = await people.sign_up("Ada")
    agent, _ = await people.host()
    sandbox, key = await people.sandbox(ada.team, agent), await people.key(ada)
    path = f"/v1/sandboxes/{sandbox}/files/write"
    async with begin(key, "POST", path, FORM, "multipart/form-data; boundary=x") as request:
        assert (await ada.delete(f"/v1/api-keys/key-{key.id}")).status_code == 204
        assert await request.finish() == (401, "unauthorized")
    assert not [method for method, _ in agent.asked if not method.startswith("host.")]


@pytest.mark.parametrize("statement", ["update users set is_admin = false", "delete from admin_permissions"])
async def test_byoc_asks_in_its_own_transaction(people, statement):
    """A permission that was taken away since the request was let in is no permission."""
    director = await people.sign_up("Director")
    await people.make_admin(director, "byoc")
    [row] = await people.sql("select now() as now")
    session = Session(id=director.id, issued_at=row["now"], expires_at=row["now"])
    user = User(id=director.id, email=director.email, name="", session=session, permissions=frozenset({"byoc"}))
    platform = Platform(people.world.db)
    await platform.set_byoc(user, director.team, enabled=True)
    await people.sql(statement)
    with pytest.raises(errors.Forbidden):
        await platform.set_byoc(user, director.team, enabled=False)
    assert len(await people.sql("select from teams where is_byoc")) == 1
