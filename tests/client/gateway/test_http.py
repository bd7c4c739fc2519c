"""What a stock client does not look at: status codes, headers, limits, report, metrics; and who stops listening."""

import json
import socket
from pathlib import Path

import pytest

from client.__main__ import main
from client.gateway.app import MAX_BODY_BYTES
from client.report import NO_TEE
from tests.client.gateway.stand import LONG, Running, Stand, asked, gateway
from tests.faults.fleet import until
from tests.faults.puppet import PATIENCE

SAID = "Yesterday I told my doctor"


def metric(running: Running, name: str) -> float:
    lines = running.http.get("/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name}{{")))


def test_alive_and_ready(running: Running) -> None:
    assert running.get("/health") == {"status": "ok"}
    until(running.ready)
    assert running.get("/ready") == {"ready": True}


def test_the_greeting_has_lines_that_work(running: Running) -> None:
    assert running.greeting[0].startswith(f"listening on {running.base};")
    body = running.greeting[1].split(" -d ", 1)[1].strip().strip("'")
    assert running.http.post("/v1/chat/completions", content=body).status_code == 200  # and no Content-Type
    program = running.greeting[2].split('"', 1)[1].rstrip()[:-1].replace("print(", "(", 1)
    exec(compile(program, "greeting", "exec"), {})  # noqa: S102


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405), ("POST", "/v1/models", 405), ("GET", "/v1/embeddings", 404),
        ("GET", "/page/none.js", 404), ("GET", "/docs", 404), ("POST", "/v1/responses", 404),
    ],
)  # fmt: skip
def test_what_is_not_there_is_an_error_object(running: Running, method: str, path: str, status: int) -> None:
    answer = running.http.request(method, path)
    assert answer.status_code == status
    assert ("allow" in answer.headers) == (status == 405)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"messages": 7}', b"7"])
def test_a_body_that_makes_no_sense_is_400(running: Running, body: bytes) -> None:
    answer = running.http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_long_is_413(running: Running) -> None:
    body = json.dumps({"messages": asked("x" * MAX_BODY_BYTES)}).encode()
    answer = running.http.post("/v1/chat/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert running.chat(max_tokens=1).status_code == 200


def test_no_other_name_and_no_other_page_is_served(running: Running) -> None:
    body = {"model": "demo", "messages": asked(SAID)}
    for headers, status in (({"host": "rebound.example.org"}, 421), ({"origin": "http://example.org"}, 403)):
        answer = running.http.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "permission_error"
    answer = running.http.options("/v1/chat/completions", headers={"origin": running.url})
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_the_report_can_be_judged_again_without_the_gateway(running: Running, stand: Stand, tmp_path: Path) -> None:
    until(running.ready)
    report = running.get("/v1/attestation/report")
    assert (report["verdict"], report["provider"], report["verified"]) == ("accepted", "simulated", False)
    assert {"chain", "report data", "measurement"} <= {step["field"] for step in report["steps"]}
    assert report["evidence"] == report["bundle"]["evidence"]
    assert len(report["policy_sha256"]) == 64
    saved = tmp_path / "bundle.json"
    saved.write_text(json.dumps(report["bundle"]))
    assert main(["attest", "verify", "--evidence", str(saved), "--policy", str(stand.policy)]) == 0


def test_metrics_count_answers_and_errors(running: Running) -> None:
    names = ("requests", "errors", "generation_tokens")
    before = {name: metric(running, f"cleave_gateway_{name}_total") for name in names}
    running.chat(max_tokens=4)
    running.chat(tools=[{}])
    after = {name: metric(running, f"cleave_gateway_{name}_total") for name in names}
    assert [after[name] - before[name] for name in names] == [2, 1, 4]
    assert metric(running, "cleave_gateway_ready") == 1
    assert metric(running, "gen_ai_server_time_to_first_token_seconds_count") > 0
    assert running.http.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer_and_its_session(running: Running, stand: Stand, stream: bool) -> None:
    stand.idle()
    cancelled, tokens = metric(running, "cleave_gateway_cancelled_total"), stand.stats().tokens
    body = {"model": "demo", "messages": asked(LONG), "stream": stream, "temperature": 100, "seed": 3}
    with running.http.stream("POST", "/v1/chat/completions", json=body) if stream else _posted(running, body):
        until(lambda: stand.stats().tokens > tokens + 10)
        assert stand.stats().sessions == 1
    stand.idle()
    until(lambda: metric(running, "cleave_gateway_cancelled_total") == cancelled + 1)
    assert metric(running, "cleave_gateway_num_requests_running") == 0
    assert stand.stats().tokens < tokens + 900  # the context holds more, and at this temperature nothing else ends it


def test_a_client_that_leaves_within_its_request_counts_as_one_that_left(running: Running) -> None:
    cancelled, errors = (metric(running, f"cleave_gateway_{name}_total") for name in ("cancelled", "errors"))
    with _Socket(running, {"model": "demo", "messages": asked(LONG)}, whole=False):
        pass
    until(lambda: metric(running, "cleave_gateway_cancelled_total") == cancelled + 1)
    assert metric(running, "cleave_gateway_errors_total") == errors


def _posted(running: Running, body: dict[str, object]) -> "_Socket":
    return _Socket(running, body)


class _Socket:
    """A request on a socket of its own, which the block's end closes without reading an answer."""

    def __init__(self, running: Running, body: dict[str, object], whole: bool = True) -> None:
        content = json.dumps(body).encode()
        host, port = running.url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)), PATIENCE)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
        self._socket.sendall(head.encode() + content[: None if whole else -1])

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def test_nothing_of_a_conversation_is_written(running: Running) -> None:
    running.chat(messages=asked(SAID), max_tokens=4)
    running.chat(messages=asked(SAID), stop="", user=SAID)
    running.http.get(f"/v1/{SAID}")
    assert "doctor" not in running.log()
    assert "doctor" not in "".join(running.greeting)
    assert running.log().splitlines() == [NO_TEE]


def test_a_key_opens_what_it_locks(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a-key\n")
    words = ("--connect", stand.target, "--policy", str(stand.policy), "--api-key-file", str(tmp_path / "key"))
    with gateway(tmp_path, *words, "--insecure-listen", "--listen", "0.0.0.0:0") as locked:
        until(locked.ready)
        assert locked.http.get("/health", headers={"host": "gateway.example.org"}).status_code == 200
        assert locked.http.get("/v1/models").status_code == 401
        assert locked.http.get("/v1/models", headers={"authorization": "Bearer a-key"}).status_code == 200
        assert locked.end() == 130
