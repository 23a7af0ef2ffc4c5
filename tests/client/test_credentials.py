"""Where credentials come from, where they are kept, and whom they are shown to: nobody."""

from __future__ import annotations

import stat

import pytest

from capsule.client import ConfigurationError, TrioClient, credentials
from capsule.client.credentials import StoredCredentials, resolve

KEY = "cap_" + "ab" * 20
OTHER = "cap_" + "cd" * 20


def test_the_file_is_its_owners_alone():
    """Written in one step with 0600, read back, forgotten."""
    path = credentials.save(StoredCredentials(url="https://a.example", api_key=KEY))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert credentials.load() == StoredCredentials(url="https://a.example", api_key=KEY)
    assert [one.name for one in path.parent.iterdir()] == ["credentials.json"]
    assert credentials.forget()
    assert not credentials.forget()
    assert credentials.load() is None


def test_arguments_then_environment_then_file(monkeypatch):
    """Each alone, and mixed."""
    credentials.save(StoredCredentials(url="https://file.example", api_key=KEY))
    assert (resolve().url, resolve().api_key) == ("https://file.example", KEY)
    monkeypatch.setenv("CAPSULE_API_KEY", OTHER)
    assert (resolve().url, resolve().api_key) == ("https://file.example", OTHER)
    monkeypatch.setenv("CAPSULE_URL", "https://env.example/")
    assert (resolve().url, resolve().api_key) == ("https://env.example", OTHER)
    assert resolve("http://arg.example:1/x/", KEY).headers == {"X-API-Key": KEY}
    assert resolve("http://arg.example:1/x/", KEY).url == "http://arg.example:1/x"
    assert resolve(token="t.o.k").headers == {"Authorization": "Bearer t.o.k"}


def test_the_files_key_goes_to_its_server_only(monkeypatch):
    """A URL from elsewhere does not get it."""
    credentials.save(StoredCredentials(url="https://file.example", api_key=KEY))
    assert resolve("https://evil.example").api_key is None
    assert resolve("https://FILE.example/").api_key == KEY
    monkeypatch.setenv("CAPSULE_URL", "http://file.example")
    assert resolve().api_key is None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "file.example",
        "ftp://x",
        "https://",
        "https://u:p@x",
        "https://x?q",
        "https://x:0",
        "https://x:99999",
        "http://[::1",
        "https://@x",
    ],
)
def test_bad_urls_are_refused(url, monkeypatch):
    """With a message, before anything is sent."""
    with pytest.raises(ConfigurationError):
        resolve(url, KEY)


def test_bad_files_and_keys_are_named_but_not_quoted():
    """The message has the file's name, and nothing out of it."""
    path = credentials.save(StoredCredentials(url="https://a.example", api_key=KEY))
    path.write_text('{"url": "https://a.example", "api_key": ["' + KEY + '"]}')
    with pytest.raises(ConfigurationError, match=r"credentials\.json") as caught:
        resolve()
    assert KEY not in repr(caught.value)
    assert caught.value.__context__ is None
    with pytest.raises(ConfigurationError) as caught:
        resolve("https://a.example", KEY + "\r\nX-Evil: 1")
    assert KEY not in repr(caught.value)


def test_nobody_has_no_home(monkeypatch):
    """A user without a home directory is told so, unless all is given."""
    monkeypatch.delenv("CAPSULE_CONFIG")

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", nowhere)
    with pytest.raises(ConfigurationError, match="CAPSULE_CONFIG"):
        resolve()
    assert resolve("https://a.example", KEY).api_key == KEY


async def test_nothing_shows_them():
    """Reprs of what holds a key."""
    stored, known = StoredCredentials(url="https://a.example", api_key=KEY), resolve("https://a.example", KEY)
    async with TrioClient("https://a.example", KEY) as client:
        for thing in (stored, known, client, vars(client), vars(client._transport)):
            assert KEY not in repr(thing)
            assert KEY not in str(thing)
