import json
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from client import doctor, flags, talk, terminal
from client.__main__ import main
from client.tokenizer import Tokenizer
from deploy.local import simulated_policy
from deploy.local.cluster import Settings
from tests.client.fake_worker import EOS, FakeWorker, Script

Serve = Callable[[Script], FakeWorker]
Output = pytest.CaptureFixture[str]

KEYS = {
    "text", "token_ids", "finish_reason", "scheme", "precision", "prompt_tokens", "completion_tokens", "seconds",
    "tokens_per_second", "time_to_first_token", "exchanges", "wire_bytes_up", "wire_bytes_down", "pads_issued",
    "pads_reused", "products_verified", "products_inside", "secure_memory", "attestation",
}  # fmt: skip


def spell(folder: Path, text: str) -> list[int]:
    return Tokenizer(folder).chat([{"role": "user", "content": text}])[1:-2]


def chat(worker: FakeWorker, folder: Path, *flags: str) -> int:
    return main(["chat", "--connect", worker.target, "--model", str(folder), *flags])


def test_json_is_the_last_line_with_every_key(serve: Serve, folder: Path, capsys: Output) -> None:
    answer = [*spell(folder, "hi ü"), EOS]
    worker = serve(Script(answers=[answer]))
    assert chat(worker, folder, "--prompt", "hello", "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert set(result) == KEYS
    assert (result["text"], result["finish_reason"], result["completion_tokens"]) == ("hi ü", "eos", 6)
    assert result["token_ids"] == answer
    assert (result["exchanges"], result["wire_bytes_up"], result["pads_issued"]) == (30, 600, 6)
    assert result["secure_memory"].items() >= {"budget": 64 << 20, "used": 1 << 20, "peak": 2 << 20}.items()
    assert result["attestation"] == {"provider": "none", "verified": False}
    assert captured.err == ""


def test_json_says_where_the_memory_is(serve: Serve, folder: Path, capsys: Output) -> None:
    stats = {
        "tee_profile": "optee", "memory_locked": True, "memory_wiped_on_fork": True, "memory_not_dumped": True,
        "kv_pages_used": 3, "kv_pages_capacity": 4, "pages_sealed": 5, "pages_restored": 6, "spill_bytes": 7,
        "embedding": "lookup", "table_scans": 8, "weights_resident": True, "tiles_read": 9, "tiles_unchecked": True,
        "switch_us": 10, "rss": 11, "process_limit": "cgroup", "process_limit_bytes": 12,
    }  # fmt: skip
    worker = serve(Script(answers=[[EOS]], stats=stats))
    assert chat(worker, folder, "--prompt", "hello", "--json") == 0
    memory = json.loads(capsys.readouterr().out)["secure_memory"]
    renamed = {"profile": "optee", "locked": True, "wiped_on_fork": True, "not_dumped": True}
    rest = {name: value for name, value in stats.items() if name not in ("tee_profile", "memory_locked")}
    expected = {name: value for name, value in rest.items() if not name.startswith("memory_")} | renamed
    assert memory == expected | {"budget": 64 << 20, "used": 1 << 20, "peak": 2 << 20}


def test_what_makes_a_speed_cheaper_stands_beside_it(serve: Serve, folder: Path, capsys: Output) -> None:
    worker = serve(Script(answers=[[EOS], [EOS]], stats={"switch_us": 10, "tiles_unchecked": True}))
    assert chat(worker, folder, "--prompt", "hello") == 0
    status = capsys.readouterr().err
    assert "10 us charged for each exchange" in status
    assert "DIGESTS ARE NOT CHECKED" in status


def test_one_token_has_no_decode_rate(serve: Serve, folder: Path, capsys: Output) -> None:
    worker = serve(Script(answers=[[EOS]]))
    assert chat(worker, folder, "--prompt", "hello", "--json", "--logprobs", "1") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens_per_second"] is None
    assert result["logprobs"] == [{"token_id": EOS, "logprob": -0.5, "top": [{"token_id": EOS, "logprob": -0.5}]}]


def test_token_ids_need_no_tokenizer(serve: Serve, folder: Path, capsys: Output) -> None:
    (folder / "tokenizer.json").unlink()
    worker = serve(Script(answers=[[5, 6, EOS]]))
    assert chat(worker, folder, "--token-ids", "1,2,3", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["text"], result["token_ids"], result["prompt_tokens"]) == (None, [5, 6, EOS], 3)


def test_text_goes_to_stdout_and_the_status_to_stderr(serve: Serve, folder: Path, capsys: Output) -> None:
    worker = serve(Script(answers=[[*spell(folder, "one\x1b[2Jtwo STOP three")]]))
    assert chat(worker, folder, "--prompt", "hello", "--stop", "STOP", "--stop", "never") == 0
    captured = capsys.readouterr()
    assert captured.out == "one[2Jtwo \n"
    assert "attestation: none (emulation)" in captured.err
    assert "40 pads in stock" in captured.err
    assert "\x1b" not in captured.err


def test_flags_reach_open(serve: Serve, folder: Path) -> None:
    worker = serve(Script(answers=[[EOS]]))
    flags = ["--scheme", "split", "--precision", "float32", "--temperature", "0.5", "--seed", "7", "--top-k", "3"]
    assert chat(worker, folder, "--prompt", "hello", *flags) == 0
    asked = worker.opened[0]
    assert (asked.model, asked.scheme, asked.sampling.seed, asked.sampling.top_k) == ("tiny", "split", 7, 3)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--token-ids", "1,300"], "out of range"),
        (["--model", "some/hub-name", "--prompt", "secret"], "model names of a hub are not downloaded"),
        (["--connect", "203.0.113.1:9", "--model", "nowhere", "--prompt", "secret"], "not a folder"),
    ],
)
def test_known_errors_are_one_line(serve: Serve, folder: Path, capsys: Output, flags: list[str], says: str) -> None:
    assert chat(serve(Script()), folder, "--json", *flags) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert says in captured.err
    assert "secret" not in captured.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--precision", "float32"], "needs --precision int8"),
        (["--json"], "need --prompt or --token-ids"),
        (["--prompt", "a", "--token-ids", "1"], "not both"),
        (["--prompt", "a", "--logprobs", "2"], "needs --json"),
        (["--token-ids", "1,x"], "whole numbers"),
        (["--token-ids", "1,-2"], "out of range"),
        (["--credit", "0"], "from 1 to 4096"),
        (["--temperature", "nan"], "a number from"),
        (["--connect", "127.0.0.1:1", "--pad-bank", "1MiB"], "belongs to `cleave up`"),
        (["--connect", "127.0.0.1:1", "--memory-budget", "1MiB"], "--memory-budget belongs to `cleave up`"),
        (["--connect", "127.0.0.1:1", "--tee-profile", "optee"], "--tee-profile belongs to `cleave up`"),
        (["--connect", "127.0.0.1:1", "--insecure-unchecked-tiles"], "belongs to `cleave up`"),
        (["--tee-profile", "enclave"], "'optee', 'optee-rpi3', 'qsee', 'trustzone', 'sgx1', 'cvm'"),
        (["--scheme", "magic"], "invalid choice"),
        (["--policy", "policy.toml"], "--policy needs --connect"),
        (["--connect", "h:1", "--policy", "p", "--insecure-unattested"], "leave one out"),
        (["--insecure-unattested"], "--insecure-unattested needs --connect"),
        (
            ["--connect", "h:1", "--policy-file", "p"],
            "cleave chat: unrecognized arguments: --policy-file p; `cleave chat --help` lists what there is",
        ),
    ],
)
def test_wrong_flags_are_one_line_and_status_two(capsys: Output, flags: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["chat", *flags])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


def test_a_remote_peer_without_evidence_is_refused(
    folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = FakeWorker(Script())
    monkeypatch.setattr("client.attestation.policy.is_local", lambda target: False)
    assert chat(worker, folder, "--prompt", "secret") == 1
    assert "--insecure-unattested" in capsys.readouterr().err
    assert not worker.opened


@pytest.mark.parametrize("command", ["chat", "up"])
def test_what_the_trusted_worker_reads_is_passed_on(command: str) -> None:
    more = (
        "--tee-profile", "optee", "--process-memory", "1GiB", "--kv-dtype", "int8", "--embed", "client",
        "--switch-us", "5", "--insecure-unchecked-tiles",
    )  # fmt: skip
    options = flags.parse([command, *more])
    assert options.more == more
    assert options.memory_budget is None
    assert flags.parse([command]).more == ()


class StandIn:
    """A cluster that only says what it was started with."""

    target = "127.0.0.1:7750"
    started: ClassVar[list[Settings]] = []

    def __init__(self, settings: Settings, *_: object, log: object = None) -> None:
        self.started.append(settings)
        self.policy = Path("/run/a folder/policy.toml") if settings.simulated else None

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait(self) -> None: ...


def test_up_prints_the_chat_s_command_line_with_its_policy(
    folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.up.Cluster", StandIn)
    assert main(["up", "--model", str(folder), "--scheme", "split", "--policy-file", "mine.toml"]) == 0
    captured = capsys.readouterr()
    words = shlex.split(captured.out.splitlines()[-1].removeprefix("talk to it with: cleave "))
    options = flags.parse(words)
    assert (options.connect, options.scheme, options.model) == (StandIn.target, "split", folder)
    assert options.policy == Path("/run/a folder/policy.toml")
    assert "SIMULATED TEE: whoever runs this machine can read the conversation" in captured.err
    assert "\x1b" not in captured.err
    settings = StandIn.started.pop()
    assert (settings.simulated, settings.policy_file) == (True, Path("mine.toml"))


def test_what_other_machines_reach_has_no_evidence_to_offer(
    folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.up.Cluster", StandIn)
    public = ["up", "--model", str(folder), "--listen", "0.0.0.0:7750", "--insecure-plaintext"]
    assert main(public) == 0
    captured = capsys.readouterr()
    assert not StandIn.started.pop().simulated
    assert "--policy" not in captured.out
    assert "SIMULATED" not in captured.err
    assert main([*public, "--policy-file", "mine.toml"]) == 1
    assert "--policy-file has no use" in capsys.readouterr().err
    assert not StandIn.started


def test_a_chat_s_own_cluster_is_simulated() -> None:
    assert talk.settings(flags.parse(["chat"])).simulated


@pytest.mark.parametrize(("text", "says"), [(None, "cannot be read"), ("version = 2\n", "line 1: version")])
def test_a_policy_that_makes_no_sense_stops_a_chat(
    serve: Serve, folder: Path, capsys: Output, text: str | None, says: str
) -> None:
    worker = serve(Script())
    if text:
        (folder / "policy.toml").write_text(text)
    assert chat(worker, folder, "--prompt", "secret", "--policy", str(folder / "policy.toml")) == 1
    assert says in capsys.readouterr().err
    assert not worker.nonces


def test_a_policy_file_wants_evidence(serve: Serve, folder: Path, capsys: Output) -> None:
    worker = serve(Script())
    policy = simulated_policy.text("ab" * 32, "cd" * 48, "secure-infer", [])
    (folder / "policy.toml").write_text(policy)
    assert chat(worker, folder, "--prompt", "secret", "--policy", str(folder / "policy.toml")) == 1
    assert "none evidence refused at step 0, provider: the policy accepts simulated" in capsys.readouterr().err
    assert (len(worker.nonces), worker.opened) == (1, [])


def test_up_does_not_listen_for_others(folder: Path, capsys: Output) -> None:
    assert main(["up", "--listen", "0.0.0.0:7750", "--model", str(folder)]) == 1
    assert "--insecure-plaintext" in capsys.readouterr().err


def test_help_says_how_the_rate_is_measured(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    assert "time after the first token" in " ".join(capsys.readouterr().out.split())


def test_doctor_reports_and_imports_nothing_heavy(capsys: Output) -> None:
    loaded = set(sys.modules)
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "missing", "absent"}
    assert any("numpy" in line for line in lines)
    assert not {"torch", "numba"} & (set(sys.modules) - loaded)


@pytest.mark.parametrize(("held", "freely"), [("0000000000004000", True), ("000001ffffffbfff", False)])
def test_doctor_knows_who_is_above_the_limit_of_locked_memory(tmp_path: Path, held: str, freely: bool) -> None:
    status = tmp_path / "status"
    status.write_text(f"Name:\tpython\nCapPrm:\t{held}\nCapEff:\t{held}\n")
    assert doctor._locks_freely(status) is freely
    assert not doctor._locks_freely(tmp_path / "nowhere")


def test_an_ignored_hangup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, object] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    terminal.unwind_on_signals()
    assert handlers[signal.SIGHUP] is signal.SIG_IGN  # as nohup wants it
    leave = handlers[signal.SIGTERM]
    assert callable(leave)
    with pytest.raises(SystemExit) as left:
        leave(signal.SIGTERM, None)
    assert left.value.code == 128 + signal.SIGTERM
    assert handlers[signal.SIGTERM] is signal.SIG_IGN  # a second one does not end the unwinding


def test_a_size_never_shows_more_than_its_unit_holds() -> None:
    shown = [terminal.size(count) for count in (0, 1023, 1024, 1536, (1 << 20) - 1, (1 << 30) - 999, 1 << 30)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "1.0 GiB", "1.0 GiB"]
