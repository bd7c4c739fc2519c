"""The command: flags that make no sense, files that cannot be read, and a cluster of its own."""

import os
import signal
import socket
from pathlib import Path

import pytest

from client import flags
from client.__main__ import main
from deploy.local import simulated_policy
from tests.client.gateway.stand import gateway
from tests.faults.fleet import until

Output = pytest.CaptureFixture[str]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(simulated_policy.text("ab" * 32, "ab" * 48, "secure-infer", []))
    return path


def connect(policy: Path, *words: str) -> int:
    return main(["gateway", "--connect", "127.0.0.1:1", "--policy", str(policy), *words])


@pytest.mark.parametrize(
    "words",
    [
        ["--connect", "127.0.0.1:1"],
        ["--policy", "x"],
        ["--connect", "127.0.0.1:1", "--policy", "x", "--memory-budget", "64MiB"],
        ["--connect", "127.0.0.1:1", "--policy", "x", "--insecure-unattested"],
        ["--credit", "0"],
    ],
)
def test_flags_that_make_no_sense_are_refused(words: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as left:
        flags.parse(["gateway", *words])
    assert left.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:8080", "example.org:80"])
def test_it_listens_on_loopback_only(policy: Path, address: str, capsys: Output) -> None:
    assert connect(policy, "--listen", address) == 1
    assert "--insecure-listen" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["8080", ":8080", "127.0.0.1:", "127.0.0.1:99999", "unix:/x", "127.0.0.1:-1"])
def test_an_address_that_is_none_is_refused(policy: Path, address: str, capsys: Output) -> None:
    assert connect(policy, f"--listen={address}") == 1
    assert "HOST:PORT" in capsys.readouterr().err


def test_an_address_in_use_is_said(policy: Path, capsys: Output) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert connect(policy, "--listen", f"127.0.0.1:{taken.getsockname()[1]}") == 1
    assert "in use" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", " \n", "two keys", "x" * 5000])
def test_a_key_file_holds_one_key(policy: Path, tmp_path: Path, content: str | None, capsys: Output) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
    assert connect(policy, "--api-key-file", str(path)) == 1
    said = capsys.readouterr().err
    assert "--api-key-file" in said
    assert "two keys" not in said


def test_a_policy_that_cannot_be_read_ends_it(tmp_path: Path, capsys: Output) -> None:
    assert connect(tmp_path / "none.toml", "--listen", "127.0.0.1:0") == 1
    assert "none.toml" in capsys.readouterr().err


@pytest.mark.parametrize("key", [True, False])
def test_it_says_when_other_machines_reach_it_and_who_may_use_it(policy: Path, tmp_path: Path, key: bool) -> None:
    (tmp_path / "key").write_text("a-key")
    words = ["--connect", "127.0.0.1:1", "--policy", str(policy), "--insecure-listen", "--listen", "0.0.0.0:0"]
    with gateway(tmp_path, *words, *(("--api-key-file", str(tmp_path / "key")) if key else ())) as running:
        (told,) = (line for line in running.log().splitlines() if "INSECURE" in line)
        assert ("--api-key-file" in told) != key


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pids: list[int]) -> bool:
    """Ended, or only not reaped yet, by whoever inherits them here."""
    states = [Path(f"/proc/{pid}/stat") for pid in pids]
    return all(not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z" for path in states)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_cluster_of_its_own_serves_and_ends_with_it(tmp_path: Path, number: signal.Signals) -> None:
    with gateway(tmp_path, "--scheme", "tee-only") as running:
        until(running.ready)
        started = children(running.process.pid)
        assert len(started) == 2  # trusted worker and simulated TEE
        if number == signal.SIGINT:
            answer = running.chat(max_tokens=3).json()
            assert (answer["cleave"]["scheme"], answer["usage"]["completion_tokens"]) == ("tee-only", 3)
        assert running.end(number) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        until(lambda: gone(started))


def test_a_worker_that_dies_ends_its_gateway_with_its_last_words(tmp_path: Path) -> None:
    with gateway(tmp_path, "--scheme", "tee-only") as running:
        until(running.ready)
        for pid in children(running.process.pid):
            if b"trusted_worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        assert running.process.wait(60) == 1
        assert "the trusted worker stopped" in running.log()
