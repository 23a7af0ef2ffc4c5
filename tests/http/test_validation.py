"""Bad input is 400 naming the field, and never a 5xx."""

from __future__ import annotations

import json
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsule.errors import InvalidRequest
from capsule.http.bodies import CreateSandboxBody, ExecBody, ListSandboxesQuery, SignalQuery
from capsule.http.parsing import parse_json, parse_query

EXEC = f"/v1/sandboxes/sb-{UUID(int=1)}/exec"

CREATE_REFUSED = [
    ({"template": "../etc"}, "template"),
    ({"template": "a\n"}, "template"),
    ({"template": ""}, "template"),
    ({"template": None}, "template"),
    ({"vcpus": 0}, "vcpus"),
    ({"vcpus": 65}, "vcpus"),
    ({"vcpus": 1.5}, "vcpus"),
    ({"vcpus": "1"}, "vcpus"),
    ({"vcpus": True}, "vcpus"),
    ({"vcpus": 10**30}, "vcpus"),
    ({"memory_mb": 127}, "memory_mb"),
    ({"memory_mb": 1_048_577}, "memory_mb"),
    ({"timeout_sec": -1}, "timeout_sec"),
    ({"timeout_sec": 31_536_001}, "timeout_sec"),
    ({"metadata": {"": "v"}}, "metadata"),
    ({"metadata": {"k" * 65: "v"}}, "metadata"),
    ({"metadata": {"k": "v" * 1025}}, "metadata[...]"),
    ({"metadata": {"k": 1}}, "metadata[...]"),
    ({"metadata": {str(n): "" for n in range(65)}}, "metadata"),
    ({"metadata": {"k": "a\0"}}, "metadata.k"),
    ({"metadata": {"k": "\ud800"}}, "metadata.k"),
    ({"envs": {"1A": ""}}, "envs"),
    ({"envs": {"A=B": ""}}, "envs"),
    ({"envs": {"A\n": ""}}, "envs"),
    ({"envs": {f"A{n}": "" for n in range(257)}}, "envs"),
    ({"envs": {"A": "\0"}}, "envs.A"),
    ({"nonsense": 1}, "nonsense"),
    ({"\ud83d": 1}, "body"),
]


@pytest.mark.parametrize(("body", "field"), CREATE_REFUSED)
async def test_create_refuses(api, refused, body, field):
    """Each limit of POST /v1/sandboxes."""
    content = json.dumps(body).encode()
    answer = await api.client.post("/v1/sandboxes", content=content, headers={"Content-Type": "application/json"})
    assert refused(answer, 400, "invalid_request")["field"] == field
    assert not api.sandboxes.asked


EXEC_REFUSED = [
    ({}, "cmd"),
    ({"cmd": ""}, "cmd"),
    ({"cmd": "x" * 32_769}, "cmd"),
    ({"cmd": "a\0"}, "cmd"),
    ({"cmd": "x", "args": ["a"] * 1025}, "args"),
    ({"cmd": "x", "args": ["a\0"]}, "args"),
    ({"cmd": "x", "args": "a"}, "args"),
    ({"cmd": "x", "timeout_sec": 0}, "timeout_sec"),
    ({"cmd": "x", "timeout_sec": 86_401}, "timeout_sec"),
    ({"cmd": "x", "cwd": "relative"}, "cwd"),
    ({"cmd": "x", "cwd": "/a/../b"}, "cwd"),
    ({"cmd": "x", "user": "a b"}, "user"),
    ({"cmd": "x", "user": "-rf"}, "user"),
    ({"cmd": "x", "tag": "1"}, "tag"),
    ({"cmd": "x", "tag": "a/b"}, "tag"),
    ({"cmd": "x", "background": "yes"}, "background"),
    ({"cmd": "x", "stdin": 1}, "stdin"),
]


@pytest.mark.parametrize(("body", "field"), EXEC_REFUSED)
async def test_exec_refuses(api, refused, body, field):
    """Each limit of …/exec."""
    answer = await api.client.post(EXEC, json=body)
    assert refused(answer, 400, "invalid_request")["field"] == field
    assert not api.sandboxes.asked


BROKEN = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"\xff",
    b'{"cmd": "\xed\xa0\x80"}',
    b'{"cmd": "x", "cmd": "y"}',
    b'{"cmd": "x", "envs": {"A": "1", "A": "2"}}',
    b'{"cmd": NaN}',
    b'{"cmd": -Infinity}',
    b'{"cmd": "x", "timeout_sec": 1e999}',
    b'{"cmd": "x"} x',
    b'{"cmd": "a\nb"}',
    b'{"cmd": 1' + b"0" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
async def test_what_is_not_a_json_object_is_400(api, refused, content):
    """Bad UTF-8, bad JSON, NaN, repeated keys, deep nesting, numbers without end."""
    answer = await api.client.post(EXEC, content=content, headers={"Content-Type": "application/json"})
    refused(answer, 400, "invalid_request")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
async def test_another_content_type_is_415(api, refused, headers):
    """A body is JSON in UTF-8, said so and not compressed."""
    answer = await api.client.post(EXEC, content=b'{"cmd":"x"}', headers=headers)
    refused(answer, 415, "unsupported_media_type")


async def test_a_whole_number_may_be_written_with_a_point(api):
    """JSON knows one kind of number: 2.0 is 2."""
    answer = await api.client.post("/v1/sandboxes", json={"vcpus": 2.0})
    assert answer.status_code == 201
    assert api.sandboxes.asked[-1][1][1].vcpus == 2


@pytest.mark.parametrize("content_type", ["Application/JSON", 'application/json; charset="UTF-8"'])
async def test_spellings_of_the_content_type(api, content_type):
    """Case and the harmless parameter do not matter."""
    sandbox = api.sandboxes.add()
    path = f"/v1/sandboxes/sb-{sandbox.id}/exec"
    answer = await api.client.post(path, content=b'{"cmd":"x"}', headers={"Content-Type": content_type})
    assert answer.status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_1_mib_is_413(api, refused, chunked):
    """Counted while reading, so a body without a length is refused too."""
    limit = 1024 * 1024
    sandbox = api.sandboxes.add()
    path = f"/v1/sandboxes/sb-{sandbox.id}/exec"

    async def send(size):
        whole = b'{"cmd":"cat","stdin":"' + b"x" * (size - 24) + b'"}'
        assert len(whole) == size

        async def pieces():
            for start in range(0, size, 60_000):
                yield whole[start : start + 60_000]

        content = pieces() if chunked else whole
        return await api.client.post(path, content=content, headers={"Content-Type": "application/json"})

    assert (await send(limit)).status_code == 200
    assert refused(await send(limit + 1), 413, "too_large")["limit"] == limit


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=x", "limit"),
        ("limit=", "limit"),
        ("limit=1&limit=2", "limit"),
        ("status=alive", "status[0]"),
        ("status=paused,", "status[1]"),
        ("cursor=", "cursor"),
        ("cursor=x", "cursor"),
        ("cursor=" + "_" * 32, "cursor"),
        ("unknown=1", "unknown"),
    ],
)
async def test_a_bad_query_is_400(api, refused, query, field):
    """Strict for parameters as for bodies."""
    answer = await api.client.get(f"/v1/sandboxes?{query}")
    assert refused(answer, 400, "invalid_request")["field"] == field


@pytest.mark.parametrize("query", ["limit=%ff", "a=%00", "&".join(f"p{n}=1" for n in range(100))])
async def test_an_unreadable_query_is_400(api, refused, query):
    """Bad UTF-8, NUL, too many parameters."""
    refused(await api.client.get(f"/v1/sandboxes?{query}"), 400, "invalid_request")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    max_leaves=8,
)


@given(st.one_of(JSON, st.fixed_dictionaries({}, optional=dict.fromkeys(ExecBody.__struct_fields__, JSON))))
def test_any_json_is_taken_or_refused(value):
    """No JSON value makes the parser fail in another way, and what it takes can be encoded and has no NUL."""
    for kind in (ExecBody, CreateSandboxBody):
        try:
            taken = parse_json(json.dumps(value).encode(), kind)
        except InvalidRequest as err:
            err.message.encode()
        else:
            assert "\0" not in repr(taken)


@given(st.binary() | st.text(st.characters()).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_taken_or_refused(raw):
    """The same for bodies and query strings that are no JSON at all."""
    for parse, kind in (
        (parse_json, CreateSandboxBody),
        (parse_query, ListSandboxesQuery),
        (parse_query, SignalQuery),
    ):
        try:
            parse(raw, kind)
        except InvalidRequest as err:
            err.message.encode()
