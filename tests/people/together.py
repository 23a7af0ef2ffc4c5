"""Requests sent at once, and what refusals look like."""

from __future__ import annotations

import trio


async def at_once(requests):
    """The answers to requests sent together."""
    answers = []

    async def send(request):
        answers.append(await request())

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for request in requests:
                nursery.start_soon(send, request)
    return answers


def refusal(answer, status, code):
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code
    return answer.json()["error"]
