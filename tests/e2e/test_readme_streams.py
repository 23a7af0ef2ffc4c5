"""The README's "Consoles, terminals, files", as it stands there, with real VMs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
[SECTION] = re.findall(r"## Consoles, terminals, files\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)
SECONDS = 180


def _run(platform, tmp_path, *words):
    """In the tree, as somebody who has only what the README names."""
    environ = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "CAPSULE_URL": platform.ready["url"],
        "CAPSULE_API_KEY": platform.ready["api_key"],
    }
    ran = subprocess.run(
        words, env=environ, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.splitlines()


def test_the_command_line(platform, api, tmp_path):
    """Each line does what it says; nothing is left."""
    [lines] = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
    assert "capsule sandbox rm $SB\n" in lines
    seen = _run(platform, tmp_path, "bash", "-euo", "pipefail", "-c", lines)
    ticked = [line for line in seen if " UTC " in line]
    [sandbox] = {line for line in seen if line.startswith("sb-")}
    assert seen[:3] == ["2", "HELLO", "ticker"]
    assert ticked
    [listed] = [line.split() for line in seen if " ticker " in line]
    assert listed[1] == "ticker"
    assert seen[-1] == sandbox
    assert api.get(f"/sandboxes/{sandbox}").json()["status"] == "stopped"


def test_the_python_example(platform, api, tmp_path):
    """Its output is the sandbox's, line by line as it comes."""
    [code] = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    seen = _run(platform, tmp_path, sys.executable, "-c", code)
    assert seen[0].startswith("Linux sb-")
    pieces = [line for line in seen if line.startswith("stdout ")]
    assert b"".join(eval(line.removeprefix("stdout ")) for line in pieces) == b"1\n2\n3\n"  # noqa: S307
    assert api.get("/sandboxes").json() == []
