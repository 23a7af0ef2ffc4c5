"""…/pause, …/resume, …/fork: what a sandbox can go through besides its beginning and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from capsule import errors
from capsule.http.answers import ForkedSandboxes, Sandbox
from capsule.http.bodies import ForkBody
from capsule.http.mounts import under_both_names
from capsule.http.operations import Call, Operation, Success, json_response
from capsule.http.sandboxes import ON_HOST, TAG

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.http.ports import SandboxService

BASE = "/v1/sandboxes/{sandbox_id}"
ON_SNAPSHOT = (*ON_HOST, errors.DiskFull, errors.SnapshotDamaged, errors.Conflict)


def operations(service: SandboxService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = LifecycleHandlers(service)
    return under_both_names(
        [
            Operation(
                name="pauseSandbox",
                method="POST",
                path=f"{BASE}/pause",
                handler=handlers.pause,
                summary="Pause a sandbox",
                description="Its memory goes to its host's disk, with every process where it was; at rest it costs no "
                "memory and no CPU. Answers when it is paused; one that is paused already stays so.",
                tag=TAG,
                successes=(Success(status=200, description="It is paused.", body=Sandbox),),
                errors=ON_SNAPSHOT,
            ),
            Operation(
                name="resumeSandbox",
                method="POST",
                path=f"{BASE}/resume",
                handler=handlers.resume,
                summary="Resume a sandbox",
                description="Answers when it runs; one that runs already goes on.",
                tag=TAG,
                successes=(Success(status=200, description="It runs.", body=Sandbox),),
                errors=(*ON_SNAPSHOT, errors.NoHostsAvailable),
            ),
            Operation(
                name="forkSandbox",
                method="POST",
                path=f"{BASE}/fork",
                handler=handlers.fork,
                summary="Fork a running sandbox",
                description="Children start from its state of this moment, on the same host; it runs on. Answers when "
                "each of them runs or has failed: `items` has a sandbox or an `error` for each.",
                tag=TAG,
                body=ForkBody,
                body_optional=True,
                idempotent=True,
                successes=(Success(status=201, description="The children.", body=ForkedSandboxes),),
                errors=(*ON_SNAPSHOT, errors.QuotaExceeded, errors.IdempotencyKeyReused, errors.NoHostsAvailable),
            ),
        ]
    )


class LifecycleHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: SandboxService) -> None:
        self._service = service

    async def pause(self, call: Call[None, None]) -> TrioResponse:
        return json_response(Sandbox.of(await self._service.pause(call.principal, call.sandbox)))

    async def resume(self, call: Call[None, None]) -> TrioResponse:
        return json_response(Sandbox.of(await self._service.resume(call.principal, call.sandbox)))

    async def fork(self, call: Call[ForkBody, None]) -> TrioResponse:
        key = call.request.idempotency_key()
        items = await self._service.fork(call.principal, call.sandbox, call.body.count, key)
        return json_response(ForkedSandboxes.of(items), 201)
