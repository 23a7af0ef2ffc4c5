"""…/exec: run a command and wait for it, or start one and leave it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from capsule import errors
from capsule.http import ids
from capsule.http.answers import BackgroundExecution, Execution
from capsule.http.bodies import ExecBody
from capsule.http.mounts import under_both_names
from capsule.http.operations import Call, Operation, Success, json_response
from capsule.http.parsing import check_path
from capsule.http.sandboxes import ON_HOST
from capsule.model import ExecCall, ExecStarted

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.http.ports import SandboxService
    from capsule.http.unread import UnreadAnswers

EXEC_TIMEOUT = 30
"""Seconds a command may run unless told."""

DESCRIPTION = """\
Without `args`, `cmd` is a command line for `/bin/sh -c`: pipes, redirections and variables work. With `args` (even an
empty list), `cmd` is a program found through PATH and nothing is interpreted.

A command that cannot be started answers 200 with exit code 127 (not found) or 126 and the reason in `stderr`, as a
shell does. One that runs longer than `timeout_sec` is killed with its process group: 408 `exec_timeout`, with what it
printed so far inside `error`. One that prints more than an answer can hold is killed too: 413 `output_too_large`, with
the first 64 KiB of each stream.

With `background` the answer is 202 as soon as the process runs; see `processes` for what became of it."""


def operations(service: SandboxService, unread: UnreadAnswers) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    return under_both_names(
        [
            Operation(
                name="execInSandbox",
                method="POST",
                path="/v1/sandboxes/{sandbox_id}/exec",
                handler=ExecHandler(service, unread).exec,
                summary="Run a command",
                description=DESCRIPTION,
                tag="exec",
                body=ExecBody,
                successes=(
                    Success(status=200, description="It has ended.", body=Execution),
                    Success(status=202, description="It runs in the background.", body=BackgroundExecution),
                ),
                errors=(
                    *ON_HOST,
                    errors.Conflict,
                    errors.ExecTimeout,
                    errors.OutputTooLarge,
                    errors.TooManyExecs,
                ),
            )
        ]
    )


class ExecHandler:
    """Parse, ask the service, render."""

    def __init__(self, service: SandboxService, unread: UnreadAnswers) -> None:
        self._service = service
        self._unread = unread

    async def exec(self, call: Call[ExecBody, None]) -> TrioResponse:
        sandbox, body = call.sandbox, call.body
        outcome = await self._service.exec(call.principal, sandbox, _exec_call(body))
        name = ids.sandbox_id(sandbox)
        if isinstance(outcome, ExecStarted):
            started = BackgroundExecution(sandbox_id=name, cmd=body.cmd, pid=outcome.pid, tag=outcome.tag)
            return json_response(started, 202)
        return self._unread.admit(call.request, json_response(Execution.of(name, body.cmd, outcome)))


def _exec_call(body: ExecBody) -> ExecCall:
    unlimited = None if body.background else EXEC_TIMEOUT
    return ExecCall(
        cmd=body.cmd,
        args=None if body.args is UNSET else tuple(body.args),
        envs=body.envs,
        cwd=None if body.cwd is UNSET else check_path(body.cwd, "cwd"),
        user=None if body.user is UNSET else body.user,
        stdin=None if body.stdin is UNSET else body.stdin.encode(),
        timeout_sec=unlimited if body.timeout_sec is UNSET else body.timeout_sec,
        background=body.background,
        tag=None if body.tag is UNSET else body.tag,
    )
