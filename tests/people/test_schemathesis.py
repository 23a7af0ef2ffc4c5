"""Schemathesis against the whole application, real services over a real database: no 5xx but a 503 that says why, and
no answer that /openapi.yaml does not document - for nobody, the holder of a key, an owner, a keeper of hosts."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.fixtures.people import quick_settings

SEED = 1815
SECONDS = 300
PEOPLE = "^/v1/(auth|me|teams|users|api-keys|audit-logs|admin)"
RUNS = {
    "nobody": ("--phases=fuzzing", "--max-examples=1", "--exclude-path-regex=^/v1/capsules"),
    "key": ("--phases=fuzzing", "--max-examples=1", "--exclude-path-regex=^/v1/capsules"),
    "owner": (
        "--phases=coverage,fuzzing",
        "--max-examples=1",
        f"--include-path-regex={PEOPLE}",
        "--exclude-operation-id=logOut",  # everything after it would be refused
        "--exclude-operation-id=changePassword",
    ),
    "keeper": ("--phases=examples,coverage,fuzzing", "--max-examples=2", "--include-path-regex=^/v1/hosts"),
}
"""What each tries. tests/e2e/test_schemathesis.py goes through the sandboxes' operations at length."""
CONFIG = '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503"]\n'
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
UNLIMITED = (
    "sign_up",
    "login_address",
    "login_account",
    "login_anywhere",
    "password",
    "oauth_address",
    "user_search",
    "add_member",
    "create_team",
)


@pytest.fixture
def people_settings():
    return quick_settings(rate_limits=",".join(f"{rule}=100000/60" for rule in UNLIMITED))


@pytest.mark.parametrize("who", RUNS)
async def test_every_answer_is_documented(people, tmp_path, who):
    """Generated requests, good and bad, on every operation."""
    team = await people.team_of_three()
    agent, _ = await people.host()
    await people.sandbox(team.id, agent)
    await people.make_admin(team.owner, "byoc", "directory")
    keeper = await people.sign_up("Keeper")
    await people.make_admin(keeper, "hosts")
    headers = {
        "nobody": {},
        "key": (await people.key(team.owner)).headers,
        "owner": team.owner.headers,
        "keeper": keeper.headers,
    }[who]
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [
        Path(sys.executable).with_name("schemathesis"),
        f"--config-file={config}",
        "run",
        f"{people.url}/openapi.yaml",
        *(f"--header={name}: {value}" for name, value in headers.items()),
        f"--checks={CHECKS}",
        *RUNS[who],
        f"--seed={SEED}",
        "--request-timeout=20",
        "--suppress-health-check=all",
        "--no-color",
    ]
    run = partial(trio.run_process, command, cwd=tmp_path, capture_stdout=True, capture_stderr=True, check=False)
    with trio.fail_after(SECONDS):
        done = await run()
    assert done.returncode == 0, (done.stdout[-6000:] + done.stderr[-2000:]).decode()
