"""`capsule-agent join` as it is typed."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

import agent.__main__ as program
from agent.doctor.report import Check
from agent.enrol.errors import AlreadyRegistered

URL = "https://capsule.example"
TOKEN = "htok-" + "a" * 64
GOOD = ["join", "--url", URL, "--token", TOKEN]


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """A machine that is fit; what would be run on it."""
    runs = []
    monkeypatch.chdir(tmp_path)  # no .env
    monkeypatch.setattr(program, "configure_logs", lambda **_: None)
    monkeypatch.setattr(program.os, "geteuid", lambda: 0)
    monkeypatch.setattr(program, "_checks", lambda _: [Check("clock", False, "slow", "wind it", essential=False)])
    monkeypatch.setattr(program.daemon, "run", lambda *arguments: runs.append(arguments))
    return runs


def typed(*arguments, **env):
    return CliRunner().invoke(program.main, arguments, env=env)


def test_url_and_token_are_all(runs):
    """And the rest are options."""
    assert typed(*GOOD).exit_code == 0
    ((settings, joining),) = runs
    assert (settings.url, settings.token, settings.address) == (URL, TOKEN, "")
    assert (joining.force, joining.serve) == (False, True)
    typed(*GOOD, "--address", "192.0.2.7:1", "--force", "--no-serve")
    settings, joining = runs[1]
    assert (settings.address, joining.force, joining.serve) == ("192.0.2.7:1", True, False)


def test_the_environment_is_good_enough(runs):
    """A token on a command line is seen by everybody on the machine."""
    assert typed("join", CAPSULE_AGENT_URL=URL, CAPSULE_AGENT_TOKEN=TOKEN).exit_code == 0
    assert (runs[0][0].url, runs[0][0].token) == (URL, TOKEN)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["join"], "URL"),
        (["join", "--url", "capsule.example", "--token", TOKEN], "URL"),
        (["join", "--url", URL], "token"),
        (["join", "--url", URL, "--token", TOKEN[:-1]], "copied whole"),
    ],
)
def test_what_cannot_be_right_is_refused_first(runs, arguments, says):
    outcome = typed(*arguments)
    assert (outcome.exit_code, runs) == (1, [])
    assert says in outcome.output
    assert TOKEN not in outcome.output


def test_not_root(runs, monkeypatch):
    monkeypatch.setattr(program.os, "geteuid", lambda: 1000)
    outcome = typed(*GOOD)
    assert (outcome.exit_code, runs) == (1, [])
    assert "root" in outcome.output


def test_a_machine_that_lacks_something_essential(runs, monkeypatch):
    """Only what fails is shown, with the way out; nothing was spent."""
    checks = [
        Check("root", True, "fine"),
        Check("nftables", False, "not there", "apt-get install nftables"),
        Check("clock", False, "slow", "wind it", essential=False),
    ]
    monkeypatch.setattr(program, "_checks", lambda _: checks)
    outcome = typed(*GOOD)
    assert (outcome.exit_code, runs) == (1, [])
    assert "apt-get install nftables" in outcome.output
    assert "fine" not in outcome.output
    assert "wind it" not in outcome.output


def test_a_refusal_is_one_line(runs, monkeypatch):
    def run(*_):
        raise ExceptionGroup("", [AlreadyRegistered("this machine is host-1 already")])

    monkeypatch.setattr(program.daemon, "run", run)
    outcome = typed(*GOOD)
    assert outcome.exit_code == 1
    assert outcome.output == "capsule-agent: this machine is host-1 already\n"
