"""…/exec over HTTP."""

from __future__ import annotations

from base64 import b64decode

import pytest

from capsule import errors
from capsule.model import ExecCall, ExecResult


@pytest.fixture
def path(api):
    return f"/v1/sandboxes/sb-{api.sandboxes.add().id}/exec"


async def test_a_command_line_and_its_answer(api, path):
    """Defaults of the call, and every field of the answer."""
    answer = await api.client.post(path, json={"cmd": "echo hi"})
    assert answer.status_code == 200
    assert answer.json() == {
        "sandbox_id": path.split("/")[3],
        "cmd": "echo hi",
        "stdout": "hi\n",
        "stderr": "",
        "exit_code": 0,
        "duration_ms": 3,
        "encoding": "utf-8",
    }
    assert api.sandboxes.asked[-1][1][2] == ExecCall(cmd="echo hi", envs={}, timeout_sec=30)


async def test_every_field_reaches_the_use_case(api, path):
    """Arguments, environment, directory, user, input, time-out, tag."""
    body = {
        "cmd": "cat",
        "args": ["-", ""],
        "envs": {"A": "1"},
        "cwd": "/tmp",
        "user": "1000",
        "stdin": "ä\n",
        "timeout_sec": 86_400,
        "tag": "job-1",
    }
    assert (await api.client.post(path, json=body)).status_code == 200
    expected = ExecCall(**{**body, "args": ("-", ""), "stdin": "ä\n".encode()})
    assert api.sandboxes.asked[-1][1][2] == expected


async def test_empty_args_are_not_absent_args(api, path):
    """[] says that cmd is a program; absence that it is a command line. Empty input is not absent input."""
    await api.client.post(path, json={"cmd": "ls", "args": [], "stdin": ""})
    call = api.sandboxes.asked[-1][1][2]
    assert (call.args, call.stdin) == ((), b"")


async def test_background_answers_202(api, path):
    """With pid and tag, and no time-out unless given."""
    answer = await api.client.post(path, json={"cmd": "sleep 9", "background": True, "tag": "t"})
    assert answer.status_code == 202
    assert answer.json() == {"sandbox_id": path.split("/")[3], "cmd": "sleep 9", "pid": 42, "tag": "t"}
    assert api.sandboxes.asked[-1][1][2].timeout_sec is None
    await api.client.post(path, json={"cmd": "sleep 9", "background": True, "timeout_sec": 5})
    assert api.sandboxes.asked[-1][1][2].timeout_sec == 5


async def test_output_that_is_not_text_is_base64_for_both(api, path):
    """One bad byte in either stream decides for both."""
    api.sandboxes.result = ExecResult(stdout=b"\xff\0", stderr=b"text", exit_code=137, duration_ms=1)
    answer = (await api.client.post(path, json={"cmd": "x"})).json()
    assert answer["encoding"] == "base64"
    assert (b64decode(answer["stdout"]), b64decode(answer["stderr"])) == (b"\xff\0", b"text")
    assert answer["exit_code"] == 137


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [(errors.ExecTimeout, 408, "exec_timeout"), (errors.OutputTooLarge, 413, "output_too_large")],
)
@pytest.mark.parametrize(("stdout", "encoding"), [(b"so far", "utf-8"), (b"\xc3", "base64")])
async def test_failures_bring_the_output_along(api, refused, path, kind, status, code, stdout, encoding):
    """What was printed stands inside `error`, encoded like a success."""
    api.sandboxes.failures["exec"] = kind("Killed.", stdout=stdout, stderr=b"e", duration_ms=1000)
    error = refused(await api.client.post(path, json={"cmd": "x"}), status, code)
    assert error["encoding"] == encoding
    assert error["duration_ms"] == 1000
    assert (error["stdout"] == "so far") == (encoding == "utf-8")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidState("It is paused; resume it."), 409),
        (errors.TooManyExecs("At most 64 at once.", retry_after=1), 429),
        (errors.HostUnavailable("Its host is away.", retry_after=1), 503),
    ],
)
async def test_refusals(api, refused, path, error, status):
    """As the use-case says."""
    api.sandboxes.failures["exec"] = error
    refused(await api.client.post(path, json={"cmd": "x"}), status, error.code)
