"""Health, readiness, metrics, the documentation page, and the list of templates."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import trio

from capsule.http import system


async def test_health(api):
    """Answers without a credential."""
    answer = await api.client.get("/health", headers={"X-API-Key": "bad"})
    assert answer.json() == {"status": "ok", "version": "1.2.3"}


@pytest.mark.parametrize("trouble", ["says no", "fails", "hangs"])
async def test_ready_only_when_the_database_answers(api, refused, monkeypatch, trouble):
    """No, an error and silence are all 503."""
    assert (await api.client.get("/ready")).json() == {"status": "ready"}
    monkeypatch.setattr(system, "READY_TIMEOUT", 0.05)
    if trouble == "says no":
        api.ready.answer = False
    elif trouble == "fails":
        api.ready.failures["ready"] = RuntimeError("secret detail")
    else:
        api.ready.gates["ready"] = trio.Event()
    answer = await api.client.get("/ready")
    refused(answer, 503, "database_unavailable")
    assert "secret" not in answer.text
    assert answer.headers["retry-after"] == "1"


async def test_metrics_count_by_template(api):
    """Route templates and known methods only: no label is a client's text."""
    sandbox = api.sandboxes.add()
    await api.client.get(f"/v1/capsules/sb-{sandbox.id}")
    await api.client.get("/v1/capsules/nonsense-path/with/parts")
    await api.client.request("FROBNICATE", "/v1/sandboxes")
    text = (await api.client.get("/metrics")).text
    assert 'capsule_http_requests_total{method="GET",route="/v1/capsules/{sandbox_id}",status="200"} 1.0' in text
    assert 'capsule_http_requests_total{method="GET",route="unmatched",status="404"} 1.0' in text
    assert 'capsule_http_requests_total{method="other",route="unmatched",status="405"} 1.0' in text
    assert "capsule_http_request_duration_seconds_bucket" in text
    assert "nonsense" not in text
    assert "FROB" not in text
    assert str(sandbox.id) not in text


class _References(HTMLParser):
    """What a page loads, and whether it has anything inline."""

    def __init__(self):
        super().__init__()
        self.loaded = []
        self.inline = []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.loaded += [found[name] for name in ("src", "href") if name in found]
        self.inline += [name for name in found if name.startswith("on") or name == "style"]
        if tag == "style" or (tag == "script" and "src" not in found):
            self.inline.append(tag)


async def test_docs_are_ours_alone(api, refused):
    """Every reference of the page is served by us with its type; nothing is inline; the policy allows only that."""
    page = await api.client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    assert "http" not in policy
    references = _References()
    references.feed(page.text)
    assert not references.inline
    assert len(references.loaded) == 4
    for path in references.loaded:
        assert path.startswith("/docs/assets/")
        asset = await api.client.get(path)
        assert asset.status_code == 200
        assert asset.headers["x-content-type-options"] == "nosniff"
        assert asset.headers["content-type"].split(";")[0] in {"text/css", "text/javascript", "image/png"}
        if path.endswith(".css"):
            assert not re.search(r"url\((?!['\"]?data:)", asset.text)
            assert "@import" not in asset.text
    for name in ("index.html", "..%2f__init__.py", "swagger-ui.css.map"):
        refused(await api.client.get(f"/docs/assets/{name}"), 404, "not_found")


async def test_templates(api):
    """All, or those of one type."""
    both = (await api.client.get("/v1/snapshots")).json()
    assert [row["name"] for row in both] == ["minimal", "frozen"]
    base = (await api.client.get("/v1/snapshots?type=base")).json()
    assert base == [
        {
            "name": "minimal",
            "type": "base",
            "size_bytes": 5,
            "platform": True,
            "created_at": "2026-01-02T03:04:05.678901Z",
        }
    ]


async def test_a_bad_type_is_400(api, refused):
    """Only base and snapshot."""
    refused(await api.client.get("/v1/snapshots?type=x"), 400, "invalid_request")
