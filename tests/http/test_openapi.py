"""The generated document: valid, complete, and true of what the server does."""

from __future__ import annotations

import threading
from functools import partial
from uuid import UUID

import pytest
import schemathesis
import trio
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from capsule.http.server import serve

KEY = "cap_0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
async def document(api):
    return (await api.client.get("/openapi.json")).json()


async def test_the_document_is_valid_openapi_3_1(api, document):
    """By an independent validator; the YAML says the same."""
    assert document["openapi"] == "3.1.0"
    assert document["info"]["version"] == "1.2.3"
    assert not list(OpenAPIV31SpecValidator(document).iter_errors())
    answer = await api.client.get("/openapi.yaml")
    assert answer.headers["content-type"] == "application/yaml"
    assert yaml.safe_load(answer.text) == document


async def test_every_route_is_described_and_no_other(api, document):
    """The documentation page alone is not part of the API."""
    served = {
        (method, rule.rule.replace("<", "{").replace(">", "}"))
        for rule in api.app.url_map.iter_rules()
        for method in rule.methods - {"HEAD"}
    }
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert served - described == {("GET", "/docs"), ("GET", "/docs/assets/{asset}")}
    assert not described - served


async def test_both_names_are_described_alike(document):
    """/v1/capsules has all of /v1/sandboxes, under operation ids of its own."""
    paths = document["paths"]
    names = [path for path in paths if path.startswith("/v1/sandboxes")]
    assert len(names) == 20
    for path in names:
        other = paths[path.replace("/v1/sandboxes", "/v1/capsules")]
        assert other.keys() == paths[path].keys()
        for method, operation in paths[path].items():
            assert other[method]["responses"] == operation["responses"]
            assert other[method]["operationId"] != operation["operationId"]


async def test_websockets_are_described(document):
    """OpenAPI has no word for them: a GET that answers 101, with the messages in its description."""
    marked = {path for path, methods in document["paths"].items() if methods.get("get", {}).get("x-websocket")}
    routes = ("exec/stream", "pty", "processes/{process}/stream", "files/watch")
    assert marked == {f"/v1/{name}/{{sandbox_id}}/{route}" for name in ("sandboxes", "capsules") for route in routes}
    for path in marked:
        described = document["paths"][path]["get"]
        assert {"101", "401", "403", "404", "409", "426"} <= described["responses"].keys()
        assert '"type":"start' in described["description"]


async def test_types_have_names_and_limits(document):
    """Generated clients get named types; the limits are those that are checked."""
    schemas = document["components"]["schemas"]
    assert {"Sandbox", "CreateSandboxBody", "Execution", "File", "Error", "Refusal"} <= schemas.keys()
    create = schemas["CreateSandboxBody"]
    assert create["additionalProperties"] is False
    assert create["properties"]["vcpus"]["maximum"] == 64
    exec_body = document["paths"]["/v1/sandboxes/{sandbox_id}/exec"]["post"]
    assert exec_body["requestBody"]["required"] is True
    assert exec_body["responses"].keys() >= {"200", "202", "400", "401", "404", "408", "409", "413", "415", "429"}
    assert "`exec_timeout`" in exec_body["responses"]["408"]["description"]
    assert exec_body["security"] == [{"api_key": []}, {"session": []}]
    parameters = document["paths"]["/v1/sandboxes"]["post"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == ["Idempotency-Key"]


@pytest.fixture
def base_url(world):
    """The application on loopback in a thread of its own: Schemathesis is synchronous."""
    world.sandboxes.add(id=UUID(int=1))
    world.sandboxes.run(5)
    world.sandboxes.files["/a"] = b"content"
    world.sandboxes.directories.clear()  # 400 is_a_directory is the contract's, for a path that looks valid
    started, token, port, shutdown = threading.Event(), None, 0, None

    async def main():
        nonlocal token, port, shutdown
        token, shutdown = trio.lowlevel.current_trio_token(), trio.Event()
        async with trio.open_nursery() as nursery:
            port = await nursery.start(partial(serve, world.app, ("127.0.0.1", 0), shutdown=shutdown, grace=1))
            started.set()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    assert started.wait(30)
    yield f"http://127.0.0.1:{port}"
    token.run_sync_soon(shutdown.set)
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_schemathesis_finds_nothing(base_url, mode):
    """No 5xx, no undocumented status, body or header, nothing valid refused and nothing invalid taken - for
    sandboxes that exist and for those that do not."""
    schema = schemathesis.openapi.from_url(f"{base_url}/openapi.json")
    headers = {"X-API-Key": KEY, "X-Host-Token": "good"}
    for found in schema.get_all_operations():
        operation = found.ok()
        if "/v1/capsules" in operation.path:
            continue  # the same handlers
        if "/v1/auth/" in operation.path:
            continue  # nobody signs in here; where people do, over a real database, they are asked
        if mode is GenerationMode.NEGATIVE and not (operation.body or list(operation.iter_parameters())):
            continue  # nothing that could be wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=8,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case):
            if mode is GenerationMode.POSITIVE and "sandbox_id" in case.path_parameters and len(repr(case.body)) % 2:
                case.path_parameters["sandbox_id"] = f"sb-{UUID(int=1)}"
            # A plain GET of a WebSocket is valid, and refused.
            excluded = [positive_data_acceptance] if case.operation.definition.raw.get("x-websocket") else []
            case.call_and_validate(headers=headers, timeout=60, excluded_checks=excluded)

        check()
