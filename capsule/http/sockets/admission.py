"""Who may talk on a WebSocket: asked before the upgrade when a header says it, by the first message when not, and again
while the stream is open - who is removed from a team, logged out, or loses a key, loses the streams as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import trio
from werkzeug.datastructures import Headers

from capsule.auth.access import Access, admit
from capsule.errors import CapsuleError, DatabaseUnavailable, Forbidden, InvalidRequest, RequestTimeout, Unauthorized
from capsule.http import credentials
from capsule.http.sockets.ends import of_error
from capsule.http.sockets.messages import AUTH, Auth
from capsule.principals import Principal, User

if TYPE_CHECKING:
    from capsule.http.ports import Authenticator
    from capsule.http.sockets.websocket import WebSocket
    from capsule.principals import Asker

AUTH_TIMEOUT = 5.0
"""Seconds for the message that says who asks."""

RECHECK_INTERVAL = 30.0
"""Seconds after which who asks is asked again."""

BLIND_TIMEOUT = 300.0
"""Seconds that a stream goes on while the database cannot be asked: it may only be restarting."""

CREDENTIALS = ("X-API-Key", "Authorization")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Admitted:
    """Somebody who was let in, and the headers that prove it."""

    asker: Asker
    principal: Principal
    proof: Headers


@dataclass(frozen=True, slots=True)
class Admission:
    """To one operation."""

    access: Access
    authenticator: Authenticator

    async def by_headers(self, headers: Headers) -> Admitted | None:
        """None when they say nothing of who asks. Unauthorized, Forbidden, NoTeam."""
        if not any(name in headers for name in CREDENTIALS):
            return None
        return await self._ask(headers)

    async def by_message(self, socket: WebSocket) -> Admitted:
        """From the first message. RequestTimeout when it does not come in time."""
        with trio.move_on_after(AUTH_TIMEOUT) as waiting:
            message = await socket.receive()
        if waiting.cancelled_caught:
            raise RequestTimeout(f"Nothing said within {AUTH_TIMEOUT:.0f} seconds who asks. {FIRST}")
        if not message.text:
            raise Unauthorized(FIRST)
        return await self._ask(_proof(_token(message.data)))

    async def watch_over(self, socket: WebSocket, admitted: Admitted) -> None:
        """Ends the stream when who was let in would be refused now. Runs until cancelled."""
        known = trio.current_time()
        while True:
            await trio.sleep(RECHECK_INTERVAL)
            try:
                found = await self._ask(admitted.proof)
                if found.principal.team_id != admitted.principal.team_id:
                    raise Forbidden("This credential is for another team now.")  # noqa: TRY301 - handled as the others
                known = trio.current_time()
            except DatabaseUnavailable as err:
                if trio.current_time() - known > BLIND_TIMEOUT:
                    socket.finish(of_error(err))
            except CapsuleError as err:
                socket.finish(of_error(err))
            except Exception:
                log.exception("stream_recheck_failed")
                if trio.current_time() - known > BLIND_TIMEOUT:
                    raise

    async def _ask(self, proof: Headers) -> Admitted:
        asker = await credentials.authenticate(proof, self.access, self.authenticator)
        admit(self.access, asker)
        principal = asker.principal() if isinstance(asker, User) else asker
        if principal is None:
            raise Forbidden("This is done for a team only.")
        return Admitted(asker, principal, proof)


FIRST = 'Send {"type":"auth","token":…} first, or a credential in a header.'


def _token(data: bytes) -> str:
    try:
        parsed = AUTH.parse(data)
    except InvalidRequest as err:
        if err.extra.get("field") == "type":
            raise Unauthorized(FIRST) from None
        raise
    if not isinstance(parsed, Auth):
        raise Unauthorized(FIRST)
    return parsed.token


def _proof(token: str) -> Headers:
    """As the headers would have said it."""
    if credentials.API_KEY.fullmatch(token):
        return Headers({"X-API-Key": token})
    if not credentials.BEARER.fullmatch(f"Bearer {token}"):
        raise Unauthorized("The token is neither a session's nor an API key.")
    return Headers({"Authorization": f"Bearer {token}"})
