"""What `capsule dev` prints when a sandbox can be created."""

from __future__ import annotations


def banner(url: str, api_key: str) -> str:
    """URL, key, and lines to paste."""
    return f"""
  Capsule is up.

    API       {url}            docs: {url}/docs
    API key   {api_key}

  A first sandbox:

    export CAPSULE_URL={url} CAPSULE_API_KEY={api_key}
    curl -s -X POST "$CAPSULE_URL/v1/sandboxes" -H "X-API-Key: $CAPSULE_API_KEY" \\
         -H 'Content-Type: application/json' -d '{{"template": "minimal"}}'

  Ctrl-C ends the platform and every sandbox.
"""
