"""/v1/auth and /v1/me: accounts and sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from capsule import errors
from capsule.http import ids
from capsule.http.account_bodies import (
    Auth,
    ChangePasswordBody,
    LogInBody,
    Me,
    SignUpBody,
    SwitchTeamBody,
    UpdateMeBody,
)
from capsule.http.operations import Call, Operation, Success, json_response, no_content
from capsule.http.sandboxes import optional

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.http.people_ports import AccountService

TAG = "accounts"
SESSION = "The session. Its token is shown to nobody else, and not stored."


def operations(service: AccountService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = AccountHandlers(service)
    return [*_sessions(handlers), *_profile(handlers)]


def _sessions(handlers: AccountHandlers) -> list[Operation[Any, Any]]:
    return [
        Operation(
            name="signUp",
            method="POST",
            path="/v1/auth/signup",
            handler=handlers.sign_up,
            summary="Make an account",
            description="With a team of its own. Sent again with the same Idempotency-Key and password it is another "
            "session of the same account; with another password, 409.",
            tag=TAG,
            body=SignUpBody,
            idempotent=True,
            successes=(Success(status=201, description=SESSION, body=Auth),),
            errors=(
                errors.EmailTaken,
                errors.IdempotencyKeyReused,
                errors.RateLimited,
                errors.Busy,
                errors.DatabaseUnavailable,
            ),
        ),
        Operation(
            name="logIn",
            method="POST",
            path="/v1/auth/login",
            handler=handlers.log_in,
            summary="Begin a session",
            description="For the default team if it lives, else for the first you joined that does, else for none.",
            tag=TAG,
            body=LogInBody,
            successes=(Success(status=200, description=SESSION, body=Auth),),
            errors=(errors.Unauthorized, errors.RateLimited, errors.Busy, errors.DatabaseUnavailable),
        ),
        Operation(
            name="switchTeam",
            method="POST",
            path="/v1/auth/switch-team",
            handler=handlers.switch_team,
            summary="Begin a session for another team",
            description="The one you ask with stays good.",
            tag=TAG,
            body=SwitchTeamBody,
            successes=(Success(status=200, description=SESSION, body=Auth),),
            errors=(errors.NotFound, errors.Forbidden, errors.DatabaseUnavailable),
        ),
        Operation(
            name="logOut",
            method="POST",
            path="/v1/auth/logout",
            handler=handlers.log_out,
            summary="End the session",
            tag=TAG,
            successes=(Success(status=204, description="The token is dead."),),
            errors=(errors.DatabaseUnavailable,),
        ),
    ]


def _profile(handlers: AccountHandlers) -> list[Operation[Any, Any]]:
    return [
        Operation(
            name="getMe",
            method="GET",
            path="/v1/me",
            handler=handlers.get,
            summary="Your account",
            tag=TAG,
            successes=(Success(status=200, description="The account, in the session's team.", body=Me),),
            errors=(errors.DatabaseUnavailable,),
        ),
        Operation(
            name="updateMe",
            method="PATCH",
            path="/v1/me",
            handler=handlers.update,
            summary="Change your account",
            tag=TAG,
            body=UpdateMeBody,
            successes=(Success(status=200, description="The account as it is now.", body=Me),),
            errors=(errors.DatabaseUnavailable,),
        ),
        Operation(
            name="changePassword",
            method="POST",
            path="/v1/me/password",
            handler=handlers.change_password,
            summary="Change your password",
            description="Ends all your other sessions.",
            tag=TAG,
            body=ChangePasswordBody,
            successes=(Success(status=204, description="It is changed; the session you asked with goes on."),),
            errors=(errors.Forbidden, errors.RateLimited, errors.Busy, errors.DatabaseUnavailable),
        ),
    ]


class AccountHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: AccountService) -> None:
        self._service = service

    async def sign_up(self, call: Call[SignUpBody, None]) -> TrioResponse:
        session = await self._service.sign_up(
            email=call.body.email,
            password=call.body.password,
            name=call.body.name,
            address=call.request.client_address,
            idempotency_key=call.request.idempotency_key(),
        )
        return json_response(Auth.of(session), 201)

    async def log_in(self, call: Call[LogInBody, None]) -> TrioResponse:
        session = await self._service.log_in(
            email=call.body.email, password=call.body.password, address=call.request.client_address
        )
        return json_response(Auth.of(session))

    async def switch_team(self, call: Call[SwitchTeamBody, None]) -> TrioResponse:
        session = await self._service.switch_team(call.user, ids.parse_team_id(call.body.team_id))
        return json_response(Auth.of(session))

    async def log_out(self, call: Call[None, None]) -> TrioResponse:
        await self._service.log_out(call.user)
        return no_content()

    async def get(self, call: Call[None, None]) -> TrioResponse:
        return json_response(Me.of(await self._service.me(call.user)))

    async def update(self, call: Call[UpdateMeBody, None]) -> TrioResponse:
        return json_response(Me.of(await self._service.update_me(call.user, name=optional(call.body.name))))

    async def change_password(self, call: Call[ChangePasswordBody, None]) -> TrioResponse:
        await self._service.change_password(
            call.user,
            current=optional(call.body.current_password),
            new=call.body.new_password,
            address=call.request.client_address,
        )
        return no_content()
