"""The trusted worker is refused, exchanged, killed, restarted: what clients are told, and that nothing was sent."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import openai as package
import pytest
from openai import OpenAI

from tests.client.gateway.stand import LONG, Running, Stand, asked, gateway
from tests.faults.fleet import until
from tests.simulators.in_the_middle import InTheMiddle, in_the_middle
from wire.v1 import trusted_worker_pb2 as pb

CLIENTS = 8


@pytest.fixture
def middle(stand: Stand) -> Iterator[InTheMiddle]:
    with in_the_middle(stand.target) as one:
        yield one


def refused(running: Running) -> dict[str, Any]:
    """What every call is told."""
    told = []
    for answer in (
        running.chat(), running.chat(stream=True), running.chat(made_up=1), running.http.get("/v1/models"),
        running.http.post("/v1/completions", json={"prompt": "x"}), running.http.get("/v1/models/demo"),
    ):  # fmt: skip
        assert answer.status_code == 503
        told.append(answer.json()["error"])
    assert running.http.get("/ready").status_code == 503
    assert all(error == told[0] for error in told)
    return dict(told[0])


def test_a_refused_worker_gets_nothing_and_calls_name_the_step(
    middle: InTheMiddle, stand: Stand, tmp_path: Path
) -> None:
    text = stand.policy.read_text()
    policy = tmp_path / "policy.toml"
    policy.write_text(re.sub(r"measurements = .*", f'measurements = ["{"ab" * 48}"]', text))
    with gateway(tmp_path, "--connect", middle.target, "--policy", str(policy)) as running:
        error = refused(running)
        assert (error["code"], error["step"]["field"]) == ("trusted_worker_not_verified", "measurement")
        assert "measurement" in error["message"]
        assert running.get("/ready")["step"] == error["step"]
        report = running.get("/v1/attestation/report")
        assert (report["verdict"], report["evidence"]) == ("refused", None)
        assert (report["steps"][-1]["field"], report["steps"][-1]["verdict"]) == ("measurement", "refused")
        assert len(middle.nonces) > 0
        assert middle.sent == []
        policy.write_text(text)  # as `cleave up` does when it starts anew
        until(running.ready)
        assert running.chat(max_tokens=1).status_code == 200


def test_a_worker_that_is_exchanged_gets_nothing(middle: InTheMiddle, stand: Stand, tmp_path: Path) -> None:
    """The connection is lost, and who answers next shows another key under the old evidence."""

    def another(answer: pb.AttestResponse) -> pb.AttestResponse:
        answer.hpke_key = bytes(31) + b"\x09"
        return answer

    with gateway(tmp_path, "--connect", middle.target, "--policy", str(stand.policy)) as running:
        until(running.ready)
        assert running.chat(max_tokens=1).status_code == 200
        middle.attest, before = another, len(middle.nonces)
        middle.down = lambda method, number, frame: []  # cuts the next call before its first answer
        assert running.chat(max_tokens=1).status_code == 503
        until(lambda: not running.ready())
        sent = len(middle.sent)
        assert refused(running)["step"]["field"] == "report data"
        assert len(middle.nonces) > before
        assert len(middle.sent) == sent
        middle.attest, middle.down = lambda answer: answer, lambda method, number, frame: [frame]
        until(running.ready)
        assert running.chat(max_tokens=1).status_code == 200


def test_nobody_there_at_the_start_is_said_and_waited_for(stand: Stand, tmp_path: Path) -> None:
    nowhere = f"unix:{tmp_path}/nobody"
    with gateway(tmp_path, "--connect", nowhere, "--policy", str(stand.policy)) as running:
        error = refused(running)
        assert "evidence_age" not in running.http.get("/metrics").text  # there is none
        assert error["step"] == {"number": None, "field": "connect"}
        assert running.get("/v1/attestation/report")["verdict"] == "none"


def test_a_killed_worker_is_a_clear_error_for_everybody_and_recovery_needs_no_restart(
    stand: Stand, tmp_path: Path
) -> None:
    with gateway(tmp_path, "--connect", stand.target, "--policy", str(stand.policy)) as running:
        until(running.ready)
        expected = running.chat(max_tokens=8).json()["choices"]
        barrier = Barrier(CLIENTS + 1)

        def ask(number: int) -> str | None:
            """The error's code: in a stream that has begun, or of the whole call."""
            client: Any
            with OpenAI(base_url=running.base, api_key="none", max_retries=0) as client:
                fields: dict[str, Any] = {"temperature": 100, "seed": number}
                try:
                    if number % 2:
                        chunks = iter(
                            client.chat.completions.create(model="demo", messages=asked(LONG), stream=True, **fields)
                        )
                        next(chunks)
                        barrier.wait()
                        list(chunks)
                    else:
                        barrier.wait()
                        client.chat.completions.create(model="demo", messages=asked(LONG), **fields)
                except package.APIError as error:
                    return error.code
            return "it had no error"

        with ThreadPoolExecutor(CLIENTS) as pool:
            calls = [pool.submit(ask, number) for number in range(CLIENTS)]
            barrier.wait()
            until(lambda: stand.stats().sessions == CLIENTS)
            stand.stop()
            codes = {call.result() for call in calls}
        assert codes == {"trusted_worker_lost"}
        until(lambda: not running.ready())
        assert refused(running)["step"]["field"] == "connect"
        stand.start()
        until(running.ready)
        assert running.chat(max_tokens=8).json()["choices"] == expected
        assert running.end() == 130


def test_a_stream_that_fails_ends_with_its_error_and_without_done(
    middle: InTheMiddle, stand: Stand, tmp_path: Path
) -> None:
    """A frame of the answer is changed on the way: no retry, and the connection is verified again."""

    def change(method: str, number: int, frame: pb.Sealed) -> list[pb.Sealed]:
        body = bytes([frame.body[0] ^ 1]) + frame.body[1:] if method == "Decode" and number == 6 else frame.body
        return [pb.Sealed(body=body, nonce=frame.nonce)]

    with gateway(tmp_path, "--connect", middle.target, "--policy", str(stand.policy)) as running:
        until(running.ready)
        middle.down, before = change, len(middle.nonces)
        lines = [line for line in running.chat(stream=True).text.splitlines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "verification_failed"
        assert len(lines) > 3
        until(lambda: len(middle.nonces) > before)
        answer = running.chat()
        assert (answer.status_code, answer.headers["x-should-retry"]) == (502, "false")
