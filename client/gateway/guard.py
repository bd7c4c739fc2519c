"""Who may call the gateway: an ASGI layer around the whole application.

What is seen: every prompt and every answer, in plaintext; so the gateway belongs on its user's machine. Who is kept
out: other machines (it listens on loopback), and web pages that this user's browser shows. What breaks it: another
user or program of this machine, unless there is an API key; and everybody on the way, with --insecure-listen.

 1. Host. A page may give its own name the address 127.0.0.1 (DNS rebinding); then the browser takes the gateway for a
    part of that page and lets it read answers. The name still stands in the Host header: only an IP address and
    `localhost` are accepted. With --insecure-listen any name is, and a key is what keeps such pages out.
 2. Origin. Other pages may send requests without reading the answers. Browsers say so in the Origin header: only pages
    of the gateway itself are served. There are no CORS headers, which would invite others. What a page loads as a
    picture or a script has no Origin; there Sec-Fetch-Site says so. A link that somebody follows is served.
 3. Key. With --api-key-file every path of LOCKED needs `Authorization: Bearer KEY`, compared in constant time.

Every answer carries HEADERS: browsers keep no copy on the disk, and hand it to no page of another origin.
"""

import hmac
import ipaddress
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.gateway.errors import INVALID, ApiError

LOCKED = ("/v1/", "/metrics")  # beginnings of paths; the others tell nothing that is worth a key
HEADERS = {
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
}
_DENIED = "permission_error"
_HOST = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::\d{1,5})?")


class Guard:
    """Lets a request through to `app`, or answers it. `key` None: none is needed."""

    def __init__(self, app: ASGIApp, key: bytes | None, any_host: bool) -> None:
        self._app, self._key, self._any_host = app, key, any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the start and end of the application."""
        app = self._app
        if scope["type"] == "http":
            error = self._error(Headers(scope=scope), scope["path"])
            app = JSONResponse(error.body, error.status, error.headers) if error else app
            send = _with_headers(send)
        await app(scope, receive, send)

    def _error(self, headers: Headers, path: str) -> ApiError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not (self._any_host or _is_address(host)):  # (1)
            return ApiError(421, "this gateway answers to 127.0.0.1 and localhost only", _DENIED, "host_not_allowed")
        elsewhere = _is_elsewhere(headers) if origin is None else origin not in (f"http://{host}", f"https://{host}")
        if elsewhere:  # (2)
            return ApiError(403, "pages of other origins may not use this gateway", _DENIED, "origin_not_allowed")
        if (
            self._key is not None and path.startswith(LOCKED) and not self._knows(headers.get("authorization", ""))
        ):  # (3)
            error = ApiError(401, "wrong or missing API key: Authorization: Bearer KEY", INVALID, "invalid_api_key")
            error.headers = {"www-authenticate": "Bearer"}
            return error
        return None

    def _knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self._key or b"")
        return right and scheme.lower() == "bearer"


def _with_headers(send: Send) -> Send:
    """`send`, with HEADERS where an answer has no others of their names."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending


def _is_elsewhere(headers: Headers) -> bool:
    """Whether a page of another origin asks by other means than a link. Only browsers have these headers."""
    site, dest = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-dest")
    return site not in ("none", "same-origin") and dest != "document"


def _is_address(host: str) -> bool:
    """Whether a Host header has an IP address or `localhost`, with or without a port."""
    found = _HOST.fullmatch(host)
    name = (found[1] or found[2]) if found else ""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower() == "localhost"
    return True
