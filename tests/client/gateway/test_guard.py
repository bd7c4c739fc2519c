"""Who gets through to the gateway, asked of the layer itself."""

import asyncio
from typing import Any

import pytest

from client.gateway.guard import Guard


def status(guard_key: bytes | None = None, any_host: bool = False, path: str = "/v1/models", **headers: str) -> int:
    """What a GET is answered; 200 is the application's."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": path, "headers": pairs}
    asyncio.run(Guard(app, guard_key, any_host)(scope, receive, send))
    return int(sent[0]["status"])


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
    host = "127.0.0.1:8080"
    assert status(host=host, origin="http://127.0.0.1:8080") == 200
    for origin in ("http://example.org", "null", "http://127.0.0.1:8081", "http://localhost:8080", ""):
        assert status(host=host, origin=origin) == 403
        assert status(any_host=True, host=host, origin=origin) == 403


def test_a_key_is_needed_where_there_is_one() -> None:
    for path in ("/v1/models", "/v1/attestation/report", "/metrics"):
        assert status(b"secret", path=path, host="localhost", authorization="Bearer secret") == 200
        assert status(b"secret", path=path, host="localhost", authorization="bearer secret") == 200
        for wrong in ("Bearer secre", "Bearer secret2", "Bearer", "secret", "Basic secret", "Bearer \xff"):
            assert status(b"secret", path=path, host="localhost", authorization=wrong) == 401
        assert status(b"secret", path=path, host="localhost") == 401
    for path in ("/health", "/ready"):
        assert status(b"secret", path=path, host="localhost") == 200
