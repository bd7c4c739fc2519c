"""The web page at /: its files as they are in the package, and the headers that keep everything else out of it.

What is seen: the conversation, in a tab of the user's own browser. What breaks it: an extension of that browser. The
page gets nothing from other hosts and sends nothing to them: the Content-Security-Policy allows this gateway only, no
inline script or style, no frame around the page, and (where browsers know trusted types) no text that becomes HTML.
The files are read once and served by name from a closed table, so no path of a request reaches the disk. They hold
nothing secret and need no key; what they ask the gateway for does.
"""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "connect", "img")),
        *(f"{name} 'none'" for name in ("base-uri", "form-action", "frame-ancestors", "trusted-types")),
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def routes() -> list[Route]:
    """/ and /page/NAME for every file of the page."""
    files = sorted(path for path in FOLDER.iterdir() if path.suffix in TYPES)
    return [_route("/" if path.name == "index.html" else f"/page/{path.name}", path) for path in files]


def _route(url: str, path: Path) -> Route:
    content, kind = path.read_bytes(), TYPES[path.suffix]

    async def serve(_: Request) -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return Route(url, serve)
