"""`capsule login`, `sandbox`, `template` against the whole control plane, with simulated hosts."""

from __future__ import annotations

import json
import socket
import stat

import pytest

from tests.fixtures.people import PASSWORD


@pytest.fixture
def as_user(capsule_without_key, people):
    """`capsule …` of somebody who has no environment variables but the server's address."""

    async def run(*arguments, stdin=b""):
        return await capsule_without_key(*arguments, stdin=stdin, url=people.url)

    return run


@pytest.fixture
async def user(as_user, people, tmp_path):
    """Logged in, with a host to run on."""
    person = await people.sign_up("Ada")
    await people.host()
    code, _, err = await as_user("login", "--email", person.email, "--password-stdin", stdin=PASSWORD.encode() + b"\n")
    assert code == 0, err
    return person


async def test_logging_in_and_out(as_user, user, people, tmp_path):
    """A key of this machine, for its owner's eyes; a second login ends the first one's key."""
    path = tmp_path / ".config/capsule/credentials.json"
    stored = json.loads(path.read_text())
    assert (stored["url"], stat.S_IMODE(path.stat().st_mode)) == (people.url, 0o600)
    [key] = (await user.get("/v1/api-keys")).json()
    assert (key["name"], key["prefix"]) == (f"capsule login on {socket.gethostname()}", stored["api_key"][:12])
    code, out, _ = await as_user("login", "--email", user.email, "--password-stdin", stdin=PASSWORD.encode() + b"\n")
    assert (code, user.email in out.decode()) == (0, True)
    again = json.loads(path.read_text())
    assert [key["prefix"] for key in (await user.get("/v1/api-keys")).json()] == [again["api_key"][:12]]
    assert again["api_key"].encode() not in out
    code, out, _ = await as_user("logout")
    assert (code, path.exists(), again["api_key"][:12] in out.decode()) == (0, False, True)
    assert (await as_user("logout"))[:2] == (0, b"Nobody was logged in.\n")
    code, _, err = await as_user("sandbox", "ls")
    assert (code, "capsule login" in err) == (125, True)


async def test_a_wrong_password_and_a_wrong_key(as_user, people, tmp_path):
    """Said in a line; nothing is stored."""
    person = await people.sign_up("Ada")
    code, _, err = await as_user("login", "--email", person.email, "--password-stdin", stdin=b"wrong\n")
    assert (code, err.count("\n"), "unauthorized" in err) == (125, 1, True)
    code, _, err = await as_user("login", "--api-key-stdin", stdin=b"cap_" + b"0" * 40)
    assert (code, "unauthorized" in err) == (125, True)
    assert (await as_user("login", "--email", person.email))[0] == 2
    assert not (tmp_path / ".config/capsule/credentials.json").exists()


async def test_a_key_of_ones_own(as_user, people):
    key = await people.key(await people.sign_up("Ada"))
    code, out, _ = await as_user("login", "--api-key-stdin", "--json", stdin=key.text.encode() + b"\n")
    assert (code, json.loads(out)["key_prefix"]) == (0, key.text[:12])
    assert (await as_user("sandbox", "ls", "--json"))[:2] == (0, b"[]\n")


async def test_a_sandbox_from_its_making_to_its_end(as_user, user):
    """Prints what the next command takes."""
    code, out, err = await as_user("sandbox", "create", "-m", "who=me", "--timeout-sec", "60")
    assert (code, err) == (0, "")
    name = out.decode().strip()
    short = name[:11]
    _, out, _ = await as_user("sandbox", "ls")
    assert out.splitlines()[0].split() == [b"ID", b"STATUS", b"TEMPLATE", b"VCPUS", b"MEMORY", b"AGE"]
    assert out.splitlines()[1].split()[:4] == [name.encode(), b"running", b"minimal", b"1"]
    assert (await as_user("sandbox", "pause", short))[:2] == (0, f"{name}\n".encode())
    assert (await as_user("sandbox", "ls", "-q", "--status", "paused"))[1] == f"{name}\n".encode()
    assert (await as_user("sandbox", "ls", "-q", "--status", "running"))[1] == b""
    code, out, _ = await as_user("sandbox", "resume", "--json", short)
    assert (code, json.loads(out)) == (0, [{"id": name}])
    _, out, _ = await as_user("sandbox", "show", short)
    assert b"metadata:  who=me\n" in out
    code, out, _ = await as_user("sandbox", "fork", "-n", "2", short, "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    code, out, err = await as_user("sandbox", "rm", name, "sb-ffff")
    assert (code, out, err.startswith("capsule: sb-ffff: no sandbox begins")) == (125, f"{name}\n".encode(), True)
    _, out, _ = await as_user("sandbox", "show", "--json", name)
    assert json.loads(out)["status"] == "stopped"


async def test_templates(as_user, user):
    name = (await as_user("sandbox", "create"))[1].decode().strip()
    code, out, err = await as_user("template", "create", name, "mine")
    assert (code, out, err) == (0, b"mine\n", "")
    rows = (await as_user("template", "ls"))[1].decode().splitlines()
    assert [row.split()[0] for row in rows] == ["NAME", "mine", "minimal"]
    assert (await as_user("template", "rm", "mine"))[0] == 0
    assert [one["name"] for one in json.loads((await as_user("template", "ls", "--json"))[1])] == ["minimal"]


async def test_completion_knows_the_sandboxes(as_user, user, environment, people, complete):
    """Ids in every shell; nothing, in time, when the server is away."""
    name = (await as_user("sandbox", "create"))[1].decode().strip()
    assert name in await complete("capsule exec sb-", people.url)
    assert f"{name}:" in await complete("capsule cp f ", people.url)
    assert await complete("capsule exec sb-", "http://127.0.0.1:1") == "\n"
