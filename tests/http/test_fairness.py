"""No client can hold what others need: unread answers, places for uploads."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import SimpleNamespace

import pytest
import trio

from capsule import errors
from capsule.http import unread, uploads
from capsule.http.unread import UnreadAnswers

BOUNDARY = b"xB"
PATH = b'--xB\r\nContent-Disposition: form-data; name="path"\r\n\r\n/a\r\n'
FILE = b'--xB\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
END = b"\r\n--xB--\r\n"


async def test_large_answers_count_until_they_are_sent():
    """Up to the limit; the next is Busy and leaves nothing behind; what was sent makes room again."""
    answers = UnreadAnswers(limit=3 * unread.SMALL_BYTES)
    large = SimpleNamespace(content_length=2 * unread.SMALL_BYTES)
    async with AsyncExitStack() as first, AsyncExitStack() as second:
        answers.admit(SimpleNamespace(cleanup=first), large)
        with pytest.raises(errors.Busy):
            answers.admit(SimpleNamespace(cleanup=second), large)
        assert answers.held == 2 * unread.SMALL_BYTES
        await first.aclose()
        answers.admit(SimpleNamespace(cleanup=second), large)
    assert answers.held == 0


async def test_answers_of_guests_are_counted(api, monkeypatch):
    """Output of a command and a listing: what a guest can make large."""
    counted = []
    monkeypatch.setattr(UnreadAnswers, "admit", lambda _, request, answer: counted.append(request.path) or answer)
    path = f"/v1/sandboxes/sb-{api.sandboxes.add().id}"
    assert (await api.client.post(f"{path}/exec", json={"cmd": "true"})).status_code == 200
    assert (await api.client.post(f"{path}/files/list", json={"path": "/"})).status_code == 200
    assert counted == [f"{path}/exec", f"{path}/files/list"]


def body_of(chunks, pause):
    """A request whose chunks come one by one, `pause` seconds apart."""

    async def body():
        for chunk in chunks:
            await trio.sleep(pause)
            yield chunk

    return SimpleNamespace(body=body())


class Content:
    """A spooled file without threads: the test clock would run ahead of them."""

    def __init__(self):
        self.size = 0

    async def write(self, data):
        self.size += len(data)


async def receive(chunks, pause):
    form, content = uploads.Form(BOUNDARY), Content()
    await uploads._receive(body_of(chunks, pause), form, content)
    form.finish()
    return form.path, content.size


async def test_an_upload_must_keep_a_pace(autojump_clock):
    """A byte every ten seconds is 408 after the patience, not after hours; it held a place that others wait for."""
    with pytest.raises(errors.RequestTimeout):
        await receive([PATH, FILE, *[b"x"] * 1000, END], 10)
    assert trio.current_time() == pytest.approx(uploads.PATIENCE, abs=15)


async def test_a_slow_upload_that_keeps_the_pace_is_taken(autojump_clock):
    """Longer than the patience, but at twice the pace."""
    chunk = b"x" * uploads.MIN_BYTES_PER_SECOND
    assert await receive([PATH, FILE, *[chunk] * 300, END], 0.5) == ("/a", 300 * len(chunk))
    assert trio.current_time() > 2 * uploads.PATIENCE


async def test_nothing_is_received_for_a_sandbox_that_does_not_run(api, refused):
    """409 before the form is looked at: a stopped sandbox is no way to places in the spool."""
    stopped = api.sandboxes.add(status="stopped")
    body = PATH + b"this is no form" * 1000
    head = api.head(
        "POST",
        f"/v1/sandboxes/sb-{stopped.id}/files/write",
        "Content-Type: multipart/form-data; boundary=xB",
        f"Content-Length: {len(body)}",
    )
    answer = await api.raw(head + body)
    assert answer.startswith(b"HTTP/1.1 409")
    assert b'"invalid_state"' in answer


@pytest.mark.parametrize("coding", ["xchunked", "chunked, identity", "gzip"])
async def test_an_unknown_transfer_coding_is_the_clients_fault(api, coding):
    """400 in our form, never a 5xx."""
    answer = await api.raw(api.head("POST", "/v1/sandboxes", f"Transfer-Encoding: {coding}"))
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"invalid_request"' in answer
