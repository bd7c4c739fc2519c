"""cleave-bench over real processes: the demo model, two schemes, a few tokens; and how it fails."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "evaluation.bench"]


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *flags], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)


def test_two_schemes_beside_each_other() -> None:
    flags = ["--schemes", "tee-only,secure-infer", "--precision", "int8", "--context", "5", "--tokens", "4"]
    flags += ["--tee-profile", "optee", "--switch-us", "7"]
    done = bench(*flags, "--batch", "2", "--repeat", "1", "--json", "--markdown")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    assert (result["tee_profile"], result["switch_us"]) == ("optee", 7)
    assert table[0].endswith(", in optee, 7 us charged for each exchange")
    inside, masked = result["rows"]
    assert [(row["scheme"], row["precision"]) for row in (inside, masked)] == [
        ("tee-only", "int8"),
        ("secure-infer", "int8"),
    ]
    assert (result["model"], result["context"], result["tokens"], result["batch"]) == ("demo", [5], 4, [2])
    assert inside["exchanges_per_token"] == inside["bytes_per_token"] == 0
    assert masked["exchanges_per_token"] >= 25 / 2  # two sessions share a step at best
    assert masked["bytes_per_token"] > 50_000
    assert 0 < masked["exchange_p50_us"] <= masked["exchange_p99_us"]
    assert masked["bare_exchange_p50_us"] > 0
    assert inside["exchange_p50_us"] is inside["bare_exchange_p50_us"] is None
    assert masked["pad_seconds_per_token"] > 0
    assert set(inside["cpu_seconds_per_token"]) == {"client", "trusted_worker"}
    assert set(masked["cpu_seconds_per_token"]) == {"client", "trusted_worker", "gpu_worker"}
    assert sum(masked["shares"].values()) == pytest.approx(1)
    assert all(0 < share < 1 for share in masked["shares"].values())
    assert any(line.startswith("| secure-infer | int8 | grpc | 5 | 2 |") for line in table)


def test_contexts_a_picture_and_pads_for_prompts(tmp_path: Path) -> None:
    flags = ["--schemes", "plain,secure-infer", "--precision", "int8", "--context", "3,20", "--tokens", "4"]
    flags += ["--data-plane", "stream", "--prefill", "worker", "--repeat", "1", "--json"]
    flags += ["--plot", str(tmp_path / "bench.png")] if importlib.util.find_spec("matplotlib") else []
    done = bench(*flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    names = [(row["scheme"], row["plane"], row["context"]) for row in result["rows"]]
    assert names == [(scheme, "stream", context) for context in (3, 20) for scheme in ("plain", "secure-infer")]
    masked = [row for row in result["rows"] if row["scheme"] == "secure-infer"]
    assert [row["prompt_products_inside"] for row in masked] == [0, 0]
    assert all(row["tokens_per_second_sustained"] < row["tokens_per_second"] for row in masked)
    assert all(row["refill_macs_per_second"] > 1e6 for row in masked)
    assert all(row["first_token_of_plain"] > 0 for row in masked)
    assert [one["row"] for one in result["ratios"]] == 2 * ["secure-infer int8 stream"]
    plain = [row for row in result["rows"] if row["scheme"] == "plain"]
    assert all(row["roofline"]["decode_seconds"] > 0 for row in plain if result["rates"])
    assert (tmp_path / "bench.png").is_file() == ("--plot" in flags)


def test_a_budget_that_is_too_small_one_that_streams_and_one_that_holds_all(tmp_path: Path) -> None:
    flags = ["--budget-curve", "--budgets", "3MiB,optee", "--context", "5", "--long-context", "200", "--tokens", "4"]
    flags += ["--plot", str(tmp_path / "curve.png")] if importlib.util.find_spec("matplotlib") else []
    done = bench(*flags, "--repeat", "1", "--json", "--markdown")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    streamed, refused, inside, masked = json.loads(last)["points"]
    assert [one["budget"] for one in (streamed, refused, inside, masked)] == 2 * [3 << 20] + 2 * [14 << 20]
    assert [(one["weights"], one["embedding"]) for one in (streamed, inside, masked)] == [
        ("streamed", "resident"),
        ("resident", "resident"),
        ("resident", "resident"),
    ]
    kinds = [(one["digests"], one["context"]) for one in streamed["speeds"]]
    assert kinds == [("on", 5), ("off", 5), ("on", 200), ("off", 200)]
    assert all(one["tiles_per_token"] >= 6 * 4 for one in streamed["speeds"])  # every linear of a layer is one tile
    assert [one["digests"] for one in inside["speeds"]] == ["none", "none"]
    assert masked["speeds"][0]["seconds_per_pad"] > 0
    assert (refused["failed"], refused["profiles"], masked["profiles"]) == (False, [], ["optee"])
    assert str(3 << 20) in refused["error"]
    assert refused["least"] > 3 << 20
    assert 64 <= streamed["context_inside"] < inside["context_inside"]
    assert streamed["context_admitted"] == inside["context_admitted"] == 1024
    assert all(one["memory_peak"] <= one["budget"] for one in (streamed, inside, masked))
    assert sum(line.startswith("| ") for line in table) == 1 + 4 + 1 + 2 + 2
    assert (tmp_path / "curve.png").is_file() == ("--plot" in flags)


@pytest.mark.parametrize("work", [[], ["--budget-curve"]])
def test_a_picture_that_cannot_be_drawn_is_found_before_anything_is_measured(work: list[str]) -> None:
    done = bench(*work, "--plot", "/nowhere/curve.png")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("cleave-bench: ")


@pytest.mark.parametrize(
    "flags",
    [
        ["--schemes", "tee-only", "--repeat", "1000"],
        ["--soak", "--schemes", "tee-only"],
        ["--budget-curve", "--schemes", "tee-only", "--repeat", "1000"],
    ],
)
def test_an_interrupt_leaves_nothing_behind(flags: list[str], tmp_path: Path) -> None:
    status, rest = stopped(signal.SIGINT, flags, tmp_path)
    assert (status, rest.splitlines()[-1]) == (130, "cleave-bench: interrupted")


def test_a_signal_from_outside_leaves_nothing_behind(tmp_path: Path) -> None:
    assert stopped(signal.SIGTERM, ["--schemes", "secure-infer", "--repeat", "1000"], tmp_path)[0] == 128 + 15


def stopped(number: int, flags: list[str], tmp_path: Path) -> tuple[int, str]:
    """Status and last words of a bench that gets a signal while it measures."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [*COMMAND, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stderr
        seen = [running.stderr.readline()]
        while not any(word in seen[-1] for word in ("measuring", "answering")):
            assert seen[-1], "it ended by itself"
            seen.append(running.stderr.readline())
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        assert children
        running.send_signal(number)
        rest = running.stderr.read()
        status = running.wait(60)
    assert "Traceback" not in rest
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert list(tmp_path.iterdir()) == []
    return status, rest


def test_a_context_that_the_model_lacks_is_one_line() -> None:
    done = bench("--context", "5000", "--schemes", "plain")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("cleave-bench: a context of ")
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_none_is_one_line() -> None:
    done = bench("--model", "/nowhere")
    assert done.returncode == 1
    assert done.stderr == (
        "cleave-bench: /nowhere is not a folder: give a local folder in Hugging Face layout (config.json and "
        "*.safetensors); model names of a hub are not downloaded\n"
    )


def test_a_worker_that_refuses_names_its_row() -> None:
    done = bench("--schemes", "tee-only", "--precision", "int8", "--memory-budget", "64KiB", "--repeat", "1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("cleave-bench: tee-only int8: the trusted worker stopped")
