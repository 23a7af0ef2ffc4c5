"""`capsule exec` in pipelines: what docker, kubectl and ssh users rely on."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
import trio

from tests.cli.platform import HEX, INFO, SANDBOX, Refused

SB = SANDBOX[:9]
BOUND = 90


async def test_arguments_output_and_exit_code_pass_through(capsule):
    """No shell in between: blanks and quotes stay where they are; stdout and stderr stay apart."""
    code, out, err = await capsule(
        "exec", SANDBOX, "--", "sh", "-c", 'echo "$1"; echo err >&2; exit 7', "x", "a  'b' $c"
    )
    assert (code, out, err) == (7, b"a  'b' $c\n", "err\n")
    code, out, _ = await capsule("exec", HEX, "printf", "%s,", "-n", "--json")
    assert (code, out) == (0, b"-n,--json,")


async def test_every_byte_goes_both_ways(capsule):
    """Binary input through a pipe, to its end."""
    everything = bytes(range(256)) * 4096
    code, out, err = await capsule("exec", SB, "cat", stdin=everything)
    assert (code, out == everything, err) == (0, True, "")


@pytest.mark.parametrize("options", [("-n",), ()])
async def test_no_input_is_an_end_of_input(capsule, options):
    """A process that reads gets the end at once."""
    assert await capsule("exec", *options, SB, "wc", "-c", stdin=b"" if not options else b"abc") == (0, b"0\n", "")


async def test_a_process_that_was_killed(capsule):
    """128 + signal, as a shell has it; a program that is not there is 127, in the sandbox's words."""
    assert (await capsule("exec", SB, "--", "sh", "-c", "kill -9 $$"))[0] == 137
    code, _, err = await capsule("exec", SB, "nosuchprogram")
    assert (code, "not found" in err) == (127, True)


async def test_signals_reach_the_process(started):
    """SIGINT and SIGTERM are the process's to act on; its exit code is ours."""
    script = "trap 'echo int' INT; trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    process = started("exec", SB, "--", "bash", "-c", script, stdout=subprocess.PIPE)
    for number, words in ((None, b"ready\n"), (signal.SIGINT, b"int\n"), (signal.SIGTERM, b"term\n")):
        if number:
            process.send_signal(number)
        assert await _line(process) == words
    assert await _code(process) == 3


async def test_one_that_ignores_us_is_left_at_the_third_time(started, until, platform):
    """As docker does; it is killed, because nobody detached it."""
    script = "trap 'echo no' INT; echo ready; while :; do sleep 0.05; done"
    process = started("exec", SB, "--", "bash", "-c", script, stdout=subprocess.PIPE)
    assert await _line(process) == b"ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        assert await _line(process) == b"no\n"
    process.send_signal(signal.SIGINT)
    assert await _code(process) == 130
    await until(lambda: platform.jobs[0].status == {"exit_code": 137, "signal": 9})


async def test_a_reader_that_has_enough_ends_it_quietly(started, platform, until):
    """`capsule exec … | head -1`: no word on stderr, and the process ends; also one that would print for ever."""
    process = started("exec", SB, "yes", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert await _line(process) == b"y\n"
    process.stdout.close()
    assert await _code(process) == 141
    assert process.stderr.read() == b""
    await until(lambda: platform.jobs[0].status is not None)


async def _line(process):
    with trio.fail_after(BOUND):
        return await trio.to_thread.run_sync(process.stdout.readline, abandon_on_cancel=True)


async def _code(process):
    with trio.fail_after(BOUND):
        return await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)


async def test_our_own_failures_are_125_in_one_line(capsule, platform, environ):
    """Server away, refusals, nonsense: never a traceback, never the process's own code."""
    platform.refusals[f"/v1/sandboxes/{SANDBOX}/exec/stream"] = Refused(
        409, "invalid_state", "It is paused: resume it."
    )
    assert await capsule("exec", SB, "true") == (125, b"", "capsule: It is paused: resume it. (invalid_state)\n")
    code, _, err = await capsule("exec", SB, "true", env={**environ, "CAPSULE_URL": "http://127.0.0.1:1"})
    assert (code, err.count("\n"), err.startswith("capsule: the server was not reached")) == (125, 1, True)
    code, _, err = await capsule("exec", SB, "true", env={**environ, "CAPSULE_API_KEY": "cap_wrong"})
    assert (code, err.count("\n"), "unknown or revoked" in err) == (125, 1, True)
    missing = {name: text for name, text in environ.items() if not name.startswith("CAPSULE_")}
    code, _, err = await capsule("exec", SB, "true", env=missing)
    assert (code, "capsule login" in err) == (125, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("exec", SB), "say what to run"),
        (("exec", SB, "-t", "--", "sh"), "stands before the sandbox"),
        (("exec", "-t", "--json", SB, "sh"), "--json does not go with -t"),
        (("exec", "-i", "-n", SB, "sh"), "contradict"),
        (("exec", "-e", "=x", SB, "sh"), "NAME=VALUE"),
        (("exec", "--escape", "ab", SB, "sh"), "one character"),
    ],
)
async def test_misuse_is_2(capsule, arguments, words):
    code, out, err = await capsule(*arguments)
    assert (code, out, words in err) == (2, b"", True), err


async def test_a_terminal_is_not_made_up(capsule):
    """-t without one here is an error, not a silent pipe."""
    code, _, err = await capsule("exec", "-t", SB, "sh")
    assert (code, "needs a terminal" in err) == (125, True)


async def test_ids_may_be_short(capsule, platform):
    """At least four digits, as long as they are one sandbox's; else the candidates are named."""
    assert (await capsule("exec", "0123", "true"))[0] == 0
    assert "too short" in (await capsule("exec", "sb-012", "true"))[2]
    assert "not the id" in (await capsule("exec", "web", "true"))[2]
    assert "no sandbox begins with" in (await capsule("exec", "ffff", "true"))[2]
    platform.others = [{**INFO, "id": SANDBOX.replace("cdef", "cdee")}]
    code, _, err = await capsule("exec", "0123", "true")
    assert (code, SANDBOX in err, SANDBOX.replace("cdef", "cdee") in err) == (125, True, True)


async def test_environment_directory_and_json(capsule, platform, environ):
    """-e NAME takes ours, -w is where it starts; --json is a line per piece, and how it ended."""
    code, out, _ = await capsule(
        "exec", "-e", "A=1=2", "-e", "MINE", "-w", "/tmp", SB, "--", "sh", "-c", "echo $A $MINE $PWD",
        env={**environ, "MINE": "here"},
    )  # fmt: skip
    assert (code, out) == (0, b"1=2 here /tmp\n")
    code, out, _ = await capsule("exec", "--json", SB, "--", "sh", "-c", r"printf 'a\377'; exit 4")
    assert code == 4
    assert out.splitlines() == [
        b'{"type":"stdout","data_b64":"Yf8="}',
        b'{"type":"exit","exit_code":4,"duration_ms":1,"timed_out":false}',
    ]


async def test_a_lost_connection_is_said(capsule, proxy, nursery, until, platform):
    """The process was tied to it: nothing is tried again, nothing is run twice."""

    async def cut():
        await until(lambda: b"once\n" in proxy.passed)
        proxy.cut()

    nursery.start_soon(cut)
    code, out, err = await capsule("exec", SB, "--", "sh", "-c", "echo once; sleep 60", url=proxy.url)
    assert (code, out, err) == (125, b"once\n", "capsule: the connection was lost\n")
    assert len(platform.jobs) == 1


async def test_detached_and_come_back_to(capsule, proxy, nursery, until, platform):
    """-d prints the tag; attach shows it from the start, through a lost connection, and has its exit code; logs show
    it without taking it over."""
    script = "seq 1 2000; while [ ! -e go ]; do sleep 0.02; done; seq 2001 4000; exit 9"
    code, out, _ = await capsule("exec", "-d", "--tag", "job", "-w", str(platform.root), SB, "--", "sh", "-c", script)
    assert (code, out) == (0, b"job\n")
    first = b"".join(b"%d\n" % number for number in range(1, 2001))
    await until(lambda: platform.jobs[0].end == len(first))
    assert (await capsule("logs", SB, "job"))[:2] == (0, first)
    proxy.budget = 6000

    async def let_it_go():
        await until(lambda: proxy.cuts)
        (platform.root / "go").touch()

    nursery.start_soon(let_it_go)
    code, out, _err = await capsule("attach", "-n", SB, "job", url=proxy.url)
    assert (code, out) == (9, b"".join(b"%d\n" % number for number in range(1, 4001)))
    assert proxy.cuts == 1
    code, out, _ = await capsule("logs", "-f", SB, str(platform.jobs[0].pid))
    assert (code, out.endswith(b"3999\n4000\n")) == (0, True)


async def test_input_of_a_lost_attachment_is_not_guessed(capsule, proxy, nursery, until, platform):
    """What of the input has arrived is not known: it ends there, and says so."""
    await capsule("exec", "-d", "-i", "--tag", "cat", SB, "cat")

    async def cut():
        await until(lambda: b"hello\n" in proxy.passed)
        proxy.cut()

    nursery.start_soon(cut)
    reading, writing = os.pipe()
    os.write(writing, b"hello\n")
    try:
        code, out, err = await capsule("attach", SB, "cat", url=proxy.url, stdin=reading)
    finally:
        os.close(reading)
        os.close(writing)
    assert (code, out) == (125, b"hello\n")
    assert "what of the input has arrived is not known" in err


async def test_processes_are_listed_and_signalled(capsule, platform, until):
    """By tag or pid; the command as a shell would take it."""
    await capsule("exec", "-d", "--tag", "job", SB, "true")
    await capsule("exec", "-d", "--tag", "job2", SB, "sleep", "100")
    [_, job] = platform.jobs
    _, out, _ = await capsule("ps", SB)
    [head, row] = out.decode().splitlines()
    assert head.split() == ["PID", "TAG", "USER", "AGE", "COMMAND"]
    assert (row.split()[:3], row.endswith("sleep 100")) == ([str(job.pid), "job2", "root"], True)
    assert await capsule("kill", "-s", "int", SB, "job2") == (0, b"", "")
    await until(lambda: job.status == {"exit_code": 130, "signal": 2})
    code, out, err = await capsule("kill", SB, str(job.pid))
    assert (code, err) == (125, "capsule: There is no such process. (not_found)\n")
    assert (await capsule("ps", "--json", SB))[1] == b"[]\n"
