"""…/processes over HTTP."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture
def path(api):
    return f"/v1/sandboxes/sb-{api.sandboxes.add().id}/processes"


async def test_list_by_pid_in_pages(api, path):
    """Every process once, in order, whatever order the guest gave; the last page has no cursor."""
    for pid in (30, 7, 100, 2, 55):
        api.sandboxes.run(pid)
    seen, query = [], {"limit": 2}
    while True:
        answer = (await api.client.get(path, params=query)).json()
        seen += [item["pid"] for item in answer["items"]]
        if "next_cursor" not in answer:
            break
        query["cursor"] = answer["next_cursor"]
    assert seen == [2, 7, 30, 55, 100]


async def test_a_process(api, path):
    """Its fields; a shell command line has no args."""
    api.sandboxes.run(5)
    assert (await api.client.get(path)).json() == {
        "items": [
            {
                "pid": 5,
                "tag": "job",
                "cmd": "sleep 9",
                "user": "root",
                "cwd": "/",
                "background": True,
                "started_at": "2023-11-14T22:13:20.123456Z",
            }
        ]
    }


@pytest.mark.parametrize(
    ("name", "query", "process", "number"),
    [
        ("5", "", 5, signal.SIGKILL),
        ("job", "?signal=SIGTERM", "job", signal.SIGTERM),
        ("job", "?signal=2", "job", signal.SIGINT),
        ("5", "?signal=64", 5, 64),
    ],
)
async def test_signal_by_pid_or_tag(api, path, name, query, process, number):
    """Kills unless told otherwise; numbers and names."""
    api.sandboxes.run(5)
    answer = await api.client.delete(f"{path}/{name}{query}")
    assert answer.status_code == 204
    assert api.sandboxes.asked[-1][1][2:] == (process, number)


@pytest.mark.parametrize("query", ["signal=0", "signal=65", "signal=SIGNOPE", "signal=", "signal=-1", "sig=9"])
async def test_a_bad_signal_is_400(api, refused, path, query):
    """Nothing reaches the guest."""
    refused(await api.client.delete(f"{path}/5?{query}"), 400, "invalid_request")
    assert not api.sandboxes.asked


@pytest.mark.parametrize("name", ["0", "05", "-1", "a b", "a%0a", "99999999999", "a%00", "x" * 65])
async def test_a_name_that_is_neither_is_400(api, refused, path, name):
    """A pid has no leading zero; a tag is a short plain word."""
    refused(await api.client.delete(f"{path}/{name}"), 400, "invalid_request")


async def test_no_such_process_is_404(api, refused, path):
    """As the guest says."""
    refused(await api.client.delete(f"{path}/77"), 404, "not_found")
