"""Browsers as far as a sign-in needs them: they keep cookies, and follow a redirect when the test says so."""

from __future__ import annotations

from http.cookies import SimpleCookie
from urllib.parse import parse_qs, urlsplit

START = "/v1/auth/oauth/github"
CALLBACK = "/v1/auth/oauth/github/callback"
EXCHANGE = "/v1/auth/oauth/exchange"
DASHBOARD = "https://capsule.example/login"


class Browser:
    """`cookies`: name → value; `attributes`: name → how its last answer set it."""

    def __init__(self, people):
        self._people = people
        self._client = people.client
        self.cookies = {}
        self.attributes = {}

    async def get(self, path, **parameters):
        """One request with this browser's cookies."""
        return self._keep(await self._client.get(path, params=parameters, headers=self._headers()))

    async def post(self, path, body):
        return self._keep(await self._client.post(path, json=body, headers=self._headers()))

    async def leave(self):
        """Click on the button; where the provider is."""
        answer = await self.get(START)
        assert answer.status_code == 302, answer.text
        return answer.headers["Location"]

    async def come_back(self, **parameters):
        """The provider's redirect; what the dashboard's address says."""
        answer = await self.get(CALLBACK, **parameters)
        assert answer.status_code == 302, answer.text
        assert answer.headers["Location"].startswith(f"{DASHBOARD}?")
        return {name: values[0] for name, values in parse_qs(urlsplit(answer.headers["Location"]).query).items()}

    async def agree(self, github, account):
        """Leave, agree there, come back."""
        code, state = github.authorize(await self.leave(), account)
        return await self.come_back(code=code, state=state)

    async def exchange(self, code):
        return await self.post(EXCHANGE, {"code": code})

    async def sign_in(self, github, account):
        """All of it; the answer to the exchange."""
        said = await self.agree(github, account)
        assert "code" in said, said
        answer = await self.exchange(said["code"])
        assert answer.status_code == 200, answer.text
        return answer.json()

    def twin(self):
        """Another browser with this one's cookies."""
        other = Browser(self._people)
        other.cookies = dict(self.cookies)
        return other

    def _headers(self):
        sent = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        return {"Cookie": sent} if sent else {}

    def _keep(self, answer):
        self._client.cookies.clear()  # its own jar is everybody's here
        for line in answer.headers.get_list("Set-Cookie"):
            for name, morsel in SimpleCookie(line).items():
                self.attributes[name] = morsel
                self.cookies[name] = morsel.value
                if morsel["max-age"] == "0":
                    del self.cookies[name]
        return answer
