"""What a person sees in a browser, in a real one."""

from __future__ import annotations

import subprocess
import tempfile

CHROMIUM = [
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=10000",
]


def test_the_documentation_page_lists_every_operation(platform, api):
    """/docs draws itself from our own assets, on a host that reaches nobody, with every path of the document."""
    url = platform.ready["url"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [*CHROMIUM, f"--user-data-dir={profile}", "--dump-dom", f"{url}/docs"]
        page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    paths = api.get(f"{url}/openapi.json").json()["paths"]
    assert len(paths) > 20
    assert [path for path in paths if f'data-path="{path}"' not in page] == []
