"""…/processes: what exec started and still runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from capsule import errors
from capsule.http import cursors, fields
from capsule.http.answers import Process, Processes
from capsule.http.bodies import ListProcessesQuery, SignalQuery
from capsule.http.mounts import under_both_names
from capsule.http.operations import Call, Operation, Success, json_response, no_content
from capsule.http.sandboxes import ON_HOST

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.http.ports import SandboxService

TAG = "processes"


def operations(service: SandboxService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = ProcessHandlers(service)
    return under_both_names(
        [
            Operation(
                name="listProcesses",
                method="GET",
                path="/v1/sandboxes/{sandbox_id}/processes",
                handler=handlers.list,
                summary="List running processes",
                description="Those that exec started, by pid.",
                tag=TAG,
                query=ListProcessesQuery,
                successes=(Success(status=200, description="A page.", body=Processes),),
                errors=ON_HOST,
            ),
            Operation(
                name="signalProcess",
                method="DELETE",
                path="/v1/sandboxes/{sandbox_id}/processes/{process}",
                handler=handlers.signal,
                summary="Signal a process",
                description="By pid or tag, with its whole process group. Kills it unless `signal` says otherwise.",
                tag=TAG,
                query=SignalQuery,
                successes=(Success(status=204, description="The signal was delivered."),),
                errors=ON_HOST,
            ),
        ]
    )


class ProcessHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: SandboxService) -> None:
        self._service = service

    async def list(self, call: Call[None, ListProcessesQuery]) -> TrioResponse:
        query = call.query
        after = 0 if query.cursor is UNSET else cursors.parse_pid(query.cursor)
        found = await self._service.processes(call.principal, call.sandbox)
        later = sorted((view for view in found if view.pid > after), key=lambda view: view.pid)
        page = later[: query.limit]
        more = len(later) > len(page)
        return json_response(
            Processes(
                items=[Process.of(view) for view in page],
                next_cursor=cursors.encode_pid(page[-1].pid) if more else UNSET,
            )
        )

    async def signal(self, call: Call[None, SignalQuery]) -> TrioResponse:
        process = parse_process(call.path["process"])
        number = fields.SIGNAL_NUMBERS.get(call.query.signal) or int(call.query.signal)
        await self._service.signal_process(call.principal, call.sandbox, process, number)
        return no_content()


def parse_process(text: str) -> int | str:
    """A pid (digits) or a tag; InvalidRequest for what is neither."""
    if not re.search(fields.PROCESS, text):
        raise errors.InvalidRequest("A process is named by its pid or its tag.", field="process")
    return int(text) if text.isdigit() else text
