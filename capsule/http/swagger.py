"""/docs: Swagger UI over our own document. All of it comes from this server; the policy allows nothing else."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

PAGE = b"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Capsule API</title>
<link rel="stylesheet" href="/docs/assets/swagger-ui.css">
<link rel="icon" type="image/png" href="/docs/assets/favicon-32x32.png" sizes="32x32">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/assets/swagger-ui-bundle.js"></script>
<script src="/docs/assets/start.js"></script>
</body>
</html>
"""

START = b"""window.addEventListener("load", function () {
  SwaggerUIBundle({
    url: "/openapi.json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    validatorUrl: null,
    presets: [SwaggerUIBundle.presets.apis],
    layout: "BaseLayout"
  });
});
"""
"""A file of its own: the policy allows no script inside the page. No validator: it would be somebody else's server."""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

MEDIA_TYPES = {
    "swagger-ui.css": "text/css; charset=utf-8",
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "favicon-32x32.png": "image/png",
    "start.js": "text/javascript; charset=utf-8",
}
"""Every asset the page asks for; no other file of the package is served."""


@cache
def assets() -> dict[str, bytes]:
    """Name → content of every asset. Reads 1.7 MB from the package once: call it before serving."""
    vendor = next(child for child in (files("swagger_ui_bundle") / "vendor").iterdir() if child.is_dir())
    return {name: START if name == "start.js" else (vendor / name).read_bytes() for name in MEDIA_TYPES}
