import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import flags
from client.__main__ import main
from client.costs import SCHEMES, cost
from client.shapes import SHAPES
from wire.profiles import holding

Output = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[2]

KEYS = {"model", "context", "stock", "kv_bytes_per_token", "kv_bytes", "schemes"}
SCHEME_KEYS = {
    "precision", "exchanges", "bytes_up", "bytes_down", "prompt_bytes_up", "prompt_bytes_down", "start_bytes_up",
    "lookup",
    "macs_trusted", "macs_worker", "memory_budget", "memory_parts", "fits_in", "pad", "link_tokens_per_second",
}  # fmt: skip


def budget(capsys: Output, model: str, *more: str) -> dict[str, Any]:
    assert main(["budget", "--model", model, "--context", "64", "--json", *more]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    result: dict[str, Any] = json.loads(captured.out)
    return result


def test_json_has_every_key_of_every_scheme(capsys: Output) -> None:
    result = budget(capsys, "shape:llama2-7b")
    assert set(result) == KEYS
    assert (result["model"], result["context"], result["stock"]) == ("llama2-7b", 64, 64)
    assert result["kv_bytes_per_token"] == {"float32": 1 << 20, "float16": 1 << 19, "int8": (1 << 18) + (1 << 13)}
    assert result["kv_bytes"] == {kind: 64 * count for kind, count in result["kv_bytes_per_token"].items()}
    assert set(result["schemes"]) == set(SCHEMES) == set(flags.SCHEMES)
    for scheme, found in result["schemes"].items():
        assert set(found) == SCHEME_KEYS
        assert found["precision"] == ("float32" if scheme == "kv-shield" else "int8")
        assert found["memory_budget"] == sum(found["memory_parts"].values())
        assert found["fits_in"] == holding(found["memory_budget"])
        assert (found["pad"] is None) == (found["lookup"] is None) == (scheme != "secure-infer")
        assert found["link_tokens_per_second"] is None
    pad = budget(capsys, "shape:llama2-7b", "--stock", "10")["schemes"]["secure-infer"]["pad"]
    assert set(pad) == {"words", "macs", "sealed_bytes", "bank_bytes"}
    assert pad["bank_bytes"] == 10 * pad["sealed_bytes"]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_a_table_that_fits_a_wide_terminal(capsys: Output, name: str) -> None:
    argv = ["budget", "--model", f"shape:{name}", "--context", "1024", "--rtt-us", "50", "--bandwidth", "10Gbit"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert next(line.split() for line in lines if "tee-only" in line) == list(SCHEMES)
    assert any("envelope" in line for line in lines)
    assert any("no computing" in line for line in lines)


def test_the_smallest_profile_stands_below_the_memory(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([14 << 20, (14 << 20) + 1, 64 << 20, 1 << 40, 0])
    monkeypatch.setattr(
        "client.budget.cost", lambda scheme, case: replace(cost(scheme, case), memory={"all": next(sizes)})
    )
    assert main(["budget", "--model", "shape:gpt2", "--context", "8"]) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("smallest TEE profile"))
    assert line.split()[-5:] == ["optee", "optee-rpi3", "trustzone", "-", "optee"]
    assert "optee 14 MiB, optee-rpi3 16 MiB, qsee 24 MiB" in printed


def test_one_scheme_one_precision(capsys: Output) -> None:
    result = budget(capsys, "shape:gpt2", "--scheme", "split", "--precision", "float32")
    assert {scheme: found["precision"] for scheme, found in result["schemes"].items()} == {"split": "float32"}
    every = budget(capsys, "shape:gpt2", "--precision", "float32")["schemes"]
    assert every["secure-infer"]["precision"] == "int8"
    assert {every[scheme]["precision"] for scheme in every if scheme != "secure-infer"} == {"float32"}


def test_projections_inside_save_exchanges_and_pads_and_cost_memory(capsys: Output) -> None:
    gpu, trusted = (
        budget(capsys, "shape:llama2-7b", "--projections", where)["schemes"] for where in ("gpu", "trusted")
    )
    before, after = gpu.pop("secure-infer"), trusted.pop("secure-infer")
    assert gpu == trusted  # other schemes have no choice
    assert (before["exchanges"], after["exchanges"]) == (4 * 32 + 1, 2 * 32 + 1)
    assert after["macs_trusted"]["linears"] == 32 * 4 * 4096**2
    assert before["pad"]["macs"] - after["pad"]["macs"] == 32 * 4 * 4096**2
    assert after["memory_parts"]["weights"] == 32 * 4 * 4096**2


def test_rope_on_the_worker_saves_exchanges(capsys: Output) -> None:
    counts = [
        budget(capsys, "shape:llama2-7b", "--rope", where)["schemes"]["kv-shield"]["exchanges"]
        for where in ("trusted", "worker")
    ]
    assert counts == [65, 33]


@pytest.mark.parametrize(
    ("link", "rate"),
    [
        (["--rtt-us", "1000"], 1000.0),
        (["--bandwidth", "1Mbit"], 125_000 / (4 + 4 * 50257)),
        (["--bandwidth", "0.125MB", "--rtt-us", "1000"], 1 / (0.001 + (4 + 4 * 50257) / 125_000)),
        (["--bandwidth", "1GiB"], (1 << 30) / (4 + 4 * 50257)),
    ],
)
def test_the_link_bounds_the_rate(capsys: Output, link: list[str], rate: float) -> None:
    schemes = budget(capsys, "shape:gpt2", *link)["schemes"]
    assert schemes["plain"]["link_tokens_per_second"] == pytest.approx(rate)
    assert schemes["tee-only"]["link_tokens_per_second"] is None


def test_a_config_alone_says_what_its_folder_says(capsys: Output, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    shutil.copy(flags.DEMO_MODEL / "config.json", folder)
    results = [budget(capsys, str(path)) for path in (flags.DEMO_MODEL, folder, folder / "config.json")]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--model", "shape:llama9", "--context", "1"], "known are chatglm3-6b, gpt2"),
        (["--model", "nowhere", "--context", "1"], "no config.json"),
        (["--model", "nowhere/config.json", "--context", "1"], "no config.json"),
        (["--model", str(ROOT / "README.md"), "--context", "1"], "not readable as JSON"),
        (["--model", "shape:gpt2", "--context", "1025"], "has 1 to 1024"),
        (["--model", "shape:gpt2", "--context", "8", "--scheme", "kv-shield", "--precision", "int8"], "at float32"),
    ],
)
def test_known_errors_are_one_line(capsys: Output, argv: list[str], says: str) -> None:
    assert main(["budget", *argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert says in captured.err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--model", "shape:gpt2"], "--context"),
        (["--context", "8"], "--model"),
        (["--model", "shape:gpt2", "--context", "0"], "whole number from 1"),
        (["--model", "shape:gpt2", "--context", "8", "--bandwidth", "10"], "Gbit"),
        (["--model", "shape:gpt2", "--context", "8", "--bandwidth", "0Gbit"], "Gbit"),
        (["--model", "shape:gpt2", "--context", "8", "--bandwidth", "1Gbps"], "Gbit"),
        (["--model", "shape:gpt2", "--context", "8", "--rtt-us", "-1"], "number from 0"),
        (["--model", "shape:gpt2", "--context", "8", "--stock", "0"], "whole number from 1"),
    ],
)
def test_wrong_flags_are_one_line_and_status_two(capsys: Output, argv: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["budget", *argv])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


def test_it_needs_neither_a_worker_nor_a_tokenizer() -> None:
    """Only what every worker has: numpy, grpcio, protobuf."""
    missing = ("torch", "numba", "tokenizers", "jinja2", "Crypto", "trusted_worker", "gpu_worker", "deploy")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
        "from client.__main__ import main\n"
        "sys.exit(main(['budget', '--model', 'shape:gpt2', '--context', '8']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "secure-infer" in done.stdout
