"""`capsule login` and `logout`: an API key for this machine."""

from __future__ import annotations

import os
import socket
import sys

import click
import trio

from capsule.cli.failures import Failure, say
from capsule.cli.output import json_option, show
from capsule.cli.running import Command
from capsule.client import CapsuleError, ConfigurationError, TrioClient, credentials
from capsule.client.credentials import StoredCredentials

DEFAULT_URL = "http://127.0.0.1:8080"
KEY_NAME = "capsule login on"
LONGEST_NAME = 128
PREFIX = 12
"""Characters of a key that the server shows."""


@click.command(cls=Command)
@click.option("--url", help="The server's; else CAPSULE_URL, else that of the last login, else it is asked for.")
@click.option("--email", help="Else it is asked for.")
@click.option("--password-stdin", is_flag=True, help="Read the password from the first line of the input.")
@click.option("--api-key-stdin", is_flag=True, help="Store this key, from the first line of the input, instead.")
@json_option
def login(*, url: str | None, email: str | None, password_stdin: bool, api_key_stdin: bool, as_json: bool) -> None:
    """Make an API key with your password and store it for this machine and user."""
    if api_key_stdin and (email or password_stdin):
        raise click.UsageError("an API key is enough: leave out --email and --password-stdin")
    url = credentials.normal_url(url or _usual_url())
    if api_key_stdin:
        key = sys.stdin.readline().strip()
        if not key:
            raise Failure("there is no API key in the input")
        trio.run(_check, url, key)
        who = None
    else:
        email = email or _ask("E-mail")
        password = sys.stdin.readline().rstrip("\r\n") if password_stdin else _ask("Password", hidden=True)
        key = trio.run(_make_key, url, email, password, _stored_for(url))
        who = email
    path = credentials.save(StoredCredentials(url=url, api_key=key))
    done = f"Logged in to {url}" + (f" as {who}" if who else "") + f"; the key is in {path}."
    show({"url": url, "email": who, "file": str(path), "key_prefix": key[:PREFIX]}, as_json=as_json, text=done)


@click.command(cls=Command)
@json_option
def logout(*, as_json: bool) -> None:
    """Forget the stored key. It stays good until somebody revokes it: a key cannot end itself."""
    try:
        stored = credentials.load()
    except ConfigurationError:  # not one of ours: gone as well
        stored = None
    known = credentials.forget()
    prefix = stored.api_key[:PREFIX] if stored else None
    text = "Logged out." + (f" The key {prefix}… is good until you revoke it on the dashboard." if prefix else "")
    show({"logged_out": known, "key_prefix": prefix}, as_json=as_json, text=text if known else "Nobody was logged in.")


async def _make_key(url: str, email: str, password: str, replaced: str | None) -> str:
    async with TrioClient(url, token="none") as nobody:  # noqa: S106 - logging in sends none
        session = await nobody.login(email, password)
    if not session.team_id:
        raise Failure(f"{email} is in no team; an API key belongs to one")
    async with TrioClient(url, token=session.token) as user:
        made = await user.api_keys.create(f"{KEY_NAME} {socket.gethostname()}"[:LONGEST_NAME])
        if replaced is not None:
            await _end_replaced(user, replaced)
    return made.key


async def _check(url: str, key: str) -> None:
    """One question that only a good key is answered."""
    async with TrioClient(url, key) as capsule:
        async for _ in capsule.templates.list():
            return


async def _end_replaced(user: TrioClient, replaced: str) -> None:
    """The key that was stored before, if `capsule login` made it: nobody knows it any more. Best effort."""
    try:
        async for key in user.api_keys.list():
            if key.prefix == replaced[:PREFIX] and key.name.startswith(KEY_NAME):
                await user.api_keys.delete(key.id)
                return
    except CapsuleError as error:
        say(f"the key of the login before ({replaced[:PREFIX]}…) may still be good: {error}")


def _stored_for(url: str) -> str | None:
    """The key that this login replaces."""
    try:
        stored = credentials.load()
    except ConfigurationError:
        return None
    return stored.api_key if stored and credentials.normal_url(stored.url) == url else None


def _usual_url() -> str:
    known = os.environ.get(credentials.URL_VARIABLE)
    try:
        stored = None if known else credentials.load()
    except ConfigurationError:  # to be replaced
        stored = None
    return known or (stored.url if stored else _ask("Server", default=DEFAULT_URL))


def _ask(what: str, *, hidden: bool = False, default: str | None = None) -> str:
    if not sys.stdin.isatty():
        if default is not None:
            return default
        option = "--password-stdin" if hidden else "--email"
        raise click.UsageError(f"there is no terminal to ask for {what.lower()}: use {option}")
    answer: str = click.prompt(what, hide_input=hidden, default=default, err=True)
    return answer
