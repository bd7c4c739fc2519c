"""Who gets through to the gateway, asked of the layer itself."""

import asyncio
from typing import Any

import pytest

from client.gateway.guard import Guard

HOST = "127.0.0.1:8080"


def status(guard_key: bytes | None = None, any_host: bool = False, path: str = "/v1/models", **headers: str) -> int:
    """What a GET is answered; 200 is the application's. `_` in the name of a header stands for a hyphen."""
    return int(start(guard_key, any_host, path, **headers)["status"])


def start(guard_key: bytes | None, any_host: bool, path: str, own: Any = (), **headers: str) -> Any:
    """How the answer begins. `own` are headers of the application."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200} | ({"headers": list(own)} if own else {}))

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    pairs = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": path, "headers": pairs}
    asyncio.run(Guard(app, guard_key, any_host)(scope, receive, send))
    return sent[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8080", "localhost:8080", "LOCALHOST", "[::1]:8080", "[::1]"])
def test_this_machine_s_names_are_served(host: str) -> None:
    assert status(host=host) == 200


@pytest.mark.parametrize(
    "host",
    ["example.org", "localhost.example.org:8080", "127.0.0.1.example.org", "", "[", ":8080", "[::1].example.org"],
)
def test_another_name_for_this_machine_is_refused(host: str) -> None:
    assert status(host=host) == 421
    assert status(host=host, path="/health") == 421
    assert status(any_host=True, host=host) == 200


def test_pages_of_other_origins_are_refused() -> None:
    assert status(host=HOST, origin="http://127.0.0.1:8080") == 200
    for origin in ("http://example.org", "null", "http://127.0.0.1:8081", "http://localhost:8080", ""):
        assert status(host=HOST, origin=origin) == 403
        assert status(any_host=True, host=HOST, origin=origin) == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_other_pages_load_without_an_origin_is_refused_but_a_link_to_here(site: str) -> None:
    for dest in ("image", "script", "iframe", "empty"):
        assert status(host=HOST, sec_fetch_site=site, sec_fetch_dest=dest) == 403
        assert status(any_host=True, host=HOST, sec_fetch_site=site, sec_fetch_dest=dest) == 403
    assert status(host=HOST, sec_fetch_site=site) == 403
    assert status(host=HOST, sec_fetch_site=site, sec_fetch_dest="document") == 200


def test_this_page_and_clients_that_are_no_browsers_are_served() -> None:
    for site in ("none", "same-origin"):
        assert status(host=HOST, sec_fetch_site=site, sec_fetch_dest="empty") == 200
    assert status(host=HOST, sec_fetch_mode="cors") == 200  # of JavaScript beyond browsers
    assert status(host=HOST, origin="http://127.0.0.1:8080", sec_fetch_site="same-origin") == 200


def test_browsers_keep_no_copy_and_hand_it_to_no_other_page() -> None:
    for host, origin in ((HOST, f"http://{HOST}"), ("example.org", "http://example.org"), (HOST, "null")):
        told = dict(start(None, False, "/v1/exposure", host=host, origin=origin)["headers"])
        assert told[b"cache-control"] == b"no-store"
        assert told[b"cross-origin-resource-policy"] == b"same-origin"
        assert told[b"x-content-type-options"] == b"nosniff"
    own = start(None, False, "/", [(b"cache-control", b"no-cache")], host=HOST)["headers"]
    assert [value for name, value in own if name == b"cache-control"] == [b"no-cache"]


def test_a_key_is_needed_where_there_is_one() -> None:
    for path in ("/v1/models", "/v1/attestation/report", "/metrics"):
        assert status(b"secret", path=path, host="localhost", authorization="Bearer secret") == 200
        assert status(b"secret", path=path, host="localhost", authorization="bearer secret") == 200
        for wrong in ("Bearer secre", "Bearer secret2", "Bearer", "secret", "Basic secret", "Bearer \xff"):
            assert status(b"secret", path=path, host="localhost", authorization=wrong) == 401
        assert status(b"secret", path=path, host="localhost") == 401
    for path in ("/health", "/ready"):
        assert status(b"secret", path=path, host="localhost") == 200
