"""The trusted worker as a service: health, reflection, metrics, settings from file and environment, draining."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.attestation.policy import Policy
from client.session import Request, connect
from client.turn import Pacing
from trusted_worker.config import parse
from trusted_worker.process_limit import ProcessLimit
from trusted_worker.service import Service
from wire.errors import ContextError, PreconditionError, UnavailableError
from wire.v1 import trusted_worker_pb2 as pb
from wire.v1 import trusted_worker_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
SERVICE = "wire.v1.TrustedWorkerService"
SERVING = health_pb2.HealthCheckResponse.SERVING


@contextmanager
def trusted_worker(folder: Path, *flags: str, **environment: str) -> Iterator[tuple[Any, str]]:
    """A tee-only worker that serves, and where it listens."""
    words = [
        "-m",
        "trusted_worker",
        "--model",
        str(folder),
        "--scheme",
        "tee-only",
        "--parent",
        str(os.getpid()),
        *flags,
    ]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        assert process.stdout.readline() == "serving\n"
        yield process, address
    finally:
        process.kill()
        process.communicate(timeout=20)


def _health(channel: grpc.Channel, service: str) -> int:
    status: int = (
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
    )
    return status


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_health_reflection_and_metrics_of_a_worker_set_up_by_file_and_environment(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    port = _free_port()
    config = tmp_path / "worker.toml"
    config.write_text(f'metrics = "127.0.0.1:{port}"\nreflection = true\nlog-format = "json"\nmax-context = 99\n')
    with (
        trusted_worker(model_folder("gpt2"), "--config", str(config), CLEAVE_TRUSTED_MAX_CONTEXT="32") as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        assert (_health(channel, ""), _health(channel, SERVICE)) == (SERVING, SERVING)
        with pytest.raises(grpc.RpcError) as caught:
            _health(channel, "wire.v1.Nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert SERVICE in _reflected(channel)
        with connect(address, Policy()) as worker:
            with pytest.raises(ContextError, match="32"):  # the environment goes before the file
                worker.open(Request("gpt2", "tee-only", "int8", max_context=33))
            session = worker.open(Request("gpt2", "tee-only", "int8"))
            list(session.turn([1, 2, 3], Pacing(max_new_tokens=5)))
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            session.close()
        assert 'gen_ai_server_time_to_first_token_seconds_count{scheme="tee-only"} 1\n' in page
        assert 'gen_ai_server_time_per_output_token_seconds_count{scheme="tee-only"} 4\n' in page
        assert 'cleave_pads_reused_total{scheme="tee-only"} 0\n' in page
        assert 'cleave_prompt_tokens_total{scheme="tee-only"} 3\n' in page
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/other", timeout=5)


def _reflected(channel: grpc.Channel) -> list[str]:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    answers = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5)
    return [service.name for service in next(answers).list_services_response.service]


def test_draining_lets_answers_end_and_takes_no_new_sessions(model_folder: Callable[[str], Path]) -> None:
    with trusted_worker(model_folder("llama"), "--drain-seconds", "60") as (process, address):
        with connect(address, Policy()) as worker, grpc.insecure_channel(address) as channel:
            session = worker.open(Request("llama", "tee-only", "int8", max_context=250))
            answer = iter(session.turn([1, 2, 3], Pacing(credit=1, max_new_tokens=200)))
            tokens = [next(answer) for _ in range(3)]
            process.send_signal(signal.SIGTERM)
            while _health(channel, SERVICE) == SERVING:
                pass
            with pytest.raises(grpc.RpcError):
                _reflected(channel)  # it is off unless asked for
            with pytest.raises(UnavailableError, match="draining"):
                worker.open(Request("llama", "tee-only", "int8"))
            tokens += list(answer)
            assert len(tokens) == 200 or tokens[-1].token_id == 300
        assert process.wait(timeout=30) == 0


def test_a_second_signal_ends_the_draining(model_folder: Callable[[str], Path]) -> None:
    with trusted_worker(model_folder("llama"), "--drain-seconds", "600") as (process, address):
        with connect(address, Policy()) as worker:
            answer = iter(
                worker.open(Request("llama", "tee-only", "int8")).turn([1], Pacing(credit=1, max_new_tokens=200))
            )
            next(answer)
            process.send_signal(signal.SIGTERM)
            with grpc.insecure_channel(address) as channel:
                while _health(channel, "") == SERVING:
                    pass
            process.send_signal(signal.SIGTERM)
            with pytest.raises(UnavailableError):
                list(answer)
        assert process.wait(timeout=30) == 0


def test_a_stream_that_says_nothing_is_ended_at_its_deadline(model_folder: Callable[[str], Path]) -> None:
    with (
        trusted_worker(model_folder("llama"), "--request-seconds", "0.3") as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        stub = trusted_worker_pb2_grpc.TrustedWorkerServiceStub(channel)
        release = threading.Event()

        def nothing() -> Iterator[pb.Sealed]:
            release.wait(30)
            yield from ()

        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Decode(nothing(), timeout=20))
        release.set()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "none came" in (caught.value.details() or "")


def test_a_worker_serves_within_the_limit_of_its_process(model_folder: Callable[[str], Path]) -> None:
    with trusted_worker(model_folder("llama"), "--tee-profile", "optee") as (process, address):
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        group = Path(f"/proc/{process.pid}/cgroup").read_text()
        unlimited = re.search(r"^Max data size +unlimited", limits, re.MULTILINE)
        assert not unlimited or f"/cleave-{process.pid}" in group
        with connect(address, Policy()) as worker:
            session = worker.open(Request("llama", "tee-only", "int8"))
            assert len(list(session.turn([1, 2, 3], Pacing(max_new_tokens=5)))) == 5
            assert worker.counters().memory_budget == 14 << 20
            session.close()


def test_a_process_limit_that_would_end_it_is_refused_at_once(model_folder: Callable[[str], Path]) -> None:
    words = ["--model", str(model_folder("llama")), "--scheme", "tee-only", "--process-memory", "64MiB"]
    command = [sys.executable, "-m", "trusted_worker", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert re.search(r"--process-memory is too small: .* at least \d+MiB$", done.stderr.strip())
    assert done.stdout == ""


def test_settings_are_printed_and_read_back(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    def printed(*flags: str) -> str:
        words = [sys.executable, "-m", "trusted_worker", *flags, "--print-config"]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout

    first = printed("--model", str(model_folder("llama")), "--scheme", "split", "--memory-budget", "14MiB")
    (tmp_path / "again.toml").write_text(first)
    assert 'scheme = "split"' in first
    assert printed("--config", str(tmp_path / "again.toml")) == first


def test_a_spill_folder_that_takes_no_files_is_said_at_the_start(model_folder: Callable[[str], Path]) -> None:
    flags = ["--model", str(model_folder("llama")), "--scheme", "tee-only", "--spill-dir", "/nowhere"]
    service = Service(parse(flags), ProcessLimit())
    service.engine.start()
    with pytest.raises(PreconditionError, match="/nowhere takes no files: give another --spill-dir"):
        service.engine.loaded.result(timeout=60)
    service.engine.join(timeout=60)
