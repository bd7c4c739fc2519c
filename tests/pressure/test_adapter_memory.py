"""Adapters in budgets that are exactly large enough, in sessions that share a worker, and what lies outside the arena.

The service is real, with its compute thread, and without sockets.
"""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.shapes import SHAPES
from evaluation.shapes import make as write_model
from tests.adapter_folders import ATTENTION, PLAIN, Case, everything, make, read, tensors_of, upload, write
from tests.conftest import build, one_run
from tests.pressure.inside import Client, Inside, inside
from trusted_worker.assembly import assemble
from trusted_worker.config import parse
from trusted_worker.lora import CONFIG, WEIGHTS, read_config
from trusted_worker.secure_memory import SecureMemory
from wire.errors import CleaveError, ExhaustedError, InvalidArgumentError, PreconditionError
from wire.kv_pages import KvType
from wire.layout import WORD, Demand, blocks
from wire.model_config import ModelConfig
from wire.plan import smallest
from wire.scratch import MAX_RANK

Folder = Callable[[str], Path]
PROMPT = [int(token) for token in np.random.default_rng(7).integers(0, 300, 20)]
SCHEMES = [
    ("tee-only", "int8"),
    ("tee-only", "float32"),
    ("split", "int8"),
    ("split", "float32"),
    ("secure-infer", "int8"),
]
ALLOWANCE = 1 << 20


@pytest.fixture(scope="module")
def folders(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the llama: a good one, another, and one whose values are absurd."""
    model, root = model_folder("llama"), tmp_path_factory.mktemp("adapters")
    for name, case in (
        ("good", Case(rank=4, targets="all-linear")),
        ("other", Case(rank=8, targets=ATTENTION, seed=2)),
    ):
        make(model, root / name, case)
    config, tensors = read(root / "good")
    write(root / "absurd", config, {name: tensor * np.float32(1e5) for name, tensor in tensors.items()})
    return {name: root / name for name in ("good", "other", "absurd")}


@pytest.mark.parametrize("name", ["llama", "gpt2", "chatglm3"])
@pytest.mark.parametrize(("scheme", "precision"), SCHEMES)
def test_the_smallest_budget_holds_one_adapter_of_the_largest_rank_and_one_session(
    model_folder: Folder, tmp_path: Path, name: str, scheme: str, precision: str
) -> None:
    folder, config = model_folder(name), ModelConfig.from_hf(model_folder(name))
    adapted = make(folder, tmp_path, Case(rank=MAX_RANK, alpha=16, targets=everything(folder))).folder
    lora, size = read_config((adapted / CONFIG).read_bytes(), config), (adapted / WEIGHTS).stat().st_size
    set_aside = blocks([WORD * lora.floats, size])
    demand = Demand(config, scheme, precision, KvType.FLOAT32, 4, adapters=set_aside)
    flags = ("--adapter-memory", str(set_aside))
    rig = build(folder, scheme, precision, budget=smallest(demand), bank_rows=4, flags=flags)
    adapter = upload(rig.adapters, adapted, 1 << 20)
    large = build(folder, scheme, precision, bank_rows=4, flags=flags)
    logits = rig.logits(PROMPT, None, adapter)
    expected = large.logits(PROMPT, None, upload(large.adapters, adapted, 1 << 20))
    if precision == "int8":
        assert np.array_equal(logits, expected)
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    adapter.hold()
    with pytest.raises(ExhaustedError, match=f"needs {set_aside} bytes"):
        upload(rig.adapters, adapted)


@pytest.mark.parametrize(("scheme", "precision"), SCHEMES)
def test_the_scratch_of_a_wide_linear_is_planned(tmp_path: Path, scheme: str, precision: str) -> None:
    """Where nothing else of a step is as large as what an adapter adds to one row."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    raw = SHAPES["tinyllama-1.1b"] | sizes | {"intermediate_size": 1 << 16, "vocab_size": 64}
    config = ModelConfig.from_dict("wide", raw, {})
    write_model(tmp_path / "wide", raw, config, lambda *_: None)
    fields = PLAIN | {"r": 1, "target_modules": "all-linear"}
    tensors = tensors_of(read_config(json.dumps(fields).encode(), config))
    write(tmp_path / "adapter", fields, {name: one * np.float32(0.01) for name, one in tensors.items()})
    demand = Demand(config, scheme, precision, KvType.FLOAT32, 4, adapters=2 << 20)
    words = ("--adapter-memory", "2MiB")
    rig = build(tmp_path / "wide", scheme, precision, budget=smallest(demand), bank_rows=4, flags=words)
    rig.logits([1, 2], None, upload(rig.adapters, tmp_path / "adapter"))


@pytest.mark.parametrize("scheme", ["plain", "kv-shield"])
def test_schemes_that_cannot_apply_an_adapter_take_no_memory_for_one(model_folder: Folder, scheme: str) -> None:
    folder = model_folder("llama")
    words = ["--model", str(folder), "--scheme", scheme, "--precision", "float32"]
    for more in (["--adapter-memory", "1MiB"], ["--insecure-clear-adapter", f"a={folder}"]):
        with pytest.raises(PreconditionError, match=f"the scheme {scheme} cannot apply adapters"):
            assemble(parse([*words, *more]), ModelConfig.from_hf(folder), SecureMemory(1 << 22), None)  # type: ignore[arg-type]


def test_a_scheme_that_cannot_apply_an_adapter_refuses_one(model_folder: Folder) -> None:
    adapters: Any = build(model_folder("llama"), "plain", "float32").adapters
    with pytest.raises(PreconditionError, match="the scheme plain cannot apply adapters"):
        adapters.begin(b"{}", 1000)


def test_what_lies_outside_the_arena_is_small(model_folder: Folder, tmp_path: Path) -> None:
    folder = model_folder("llama")
    adapted = make(folder, tmp_path, Case(rank=MAX_RANK, targets="all-linear")).folder
    rig = build(folder, "tee-only", flags=("--adapter-memory", "16MiB"))
    raw, cache = (adapted / WEIGHTS).read_bytes(), rig.scheme.open(64)
    assert len(raw) > 3 * ALLOWANCE
    assert rig.adapters is not None
    tracemalloc.start(1)
    try:
        incoming = rig.adapters.begin((adapted / CONFIG).read_bytes(), len(raw))
        for first in range(0, len(raw), 1 << 16):
            incoming.write(raw[first : first + (1 << 16)])
        adapter = incoming.finish()
        rig.scheme.forward(one_run(cache, [1] * 64, 0, adapter), lambda *_: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= ALLOWANCE, peak


def flags(folders: dict[str, Path], *names: str) -> list[str]:
    words = ["--memory-budget", "16MiB", "--pad-bank", "2MiB", "--adapter-memory", "1MiB"]
    return [*words, *(word for name in names for word in ("--insecure-clear-adapter", f"{name}={folders[name]}"))]


def begin(clients: list[Client]) -> None:
    """All of them before the next step."""
    for client in clients:
        client.feed(PROMPT, 12)


def open_with(one: Inside, name: bytes) -> Client:
    """A session with an adapter. Raises CleaveError."""
    one.request.adapter = name
    try:
        return one.open()
    finally:
        one.request.adapter = b""


def test_sessions_choose_their_adapters_and_share_steps(model_folder: Folder, folders: dict[str, Path]) -> None:
    folder, names = model_folder("llama"), (b"", b"good", b"other")
    with inside(folder, "secure-infer", *flags(folders, "good", "other")) as one:
        alone = []
        for name in names:
            client = open_with(one, name)
            alone.append(client.say(PROMPT, 12))
            client.close()
        assert len({tuple(said) for said in alone}) == 3
        clients = [open_with(one, name) for name in (*names, *names)]
        one.do(lambda: begin(clients))
        assert [client.hear(12) for client in clients] == alone * 2
        stats = one.stats()
        assert (stats.adapters, stats.adapter_capacity) == (2, 1 << 20)
        assert 0 < stats.adapter_bytes < stats.adapter_capacity


def test_the_reply_says_which_adapter_it_is(model_folder: Folder, folders: dict[str, Path]) -> None:
    with inside(model_folder("llama"), "tee-only", *flags(folders, "good")) as one:
        one.request.adapter = b"good"
        assert one.do(lambda: one.service.open(one.request, b"")).adapter == b"good"
        one.request.adapter = b"unknown"
        with pytest.raises(PreconditionError, match="no such adapter: upload it again"):
            one.open()
        assert one.stats().sessions == 1


def test_an_absurd_adapter_ends_its_own_sessions_and_no_other(model_folder: Folder, folders: dict[str, Path]) -> None:
    """Its results would be infinite in a later step of the same batch, where nobody could say whose they were."""
    with inside(model_folder("llama"), "secure-infer", *flags(folders, "good", "absurd")) as one:
        expected = [open_with(one, name).say(PROMPT, 12) for name in (b"", b"good")]
        clients = [open_with(one, name) for name in (b"absurd", b"", b"absurd", b"good")]
        one.do(lambda: begin(clients))
        for client in (clients[0], clients[2]):
            with pytest.raises(InvalidArgumentError, match="adapter's results are out of bounds"):
                client.hear(12)
        assert [client.hear(12) for client in (clients[1], clients[3])] == expected


def test_a_session_keeps_its_adapter_and_gives_it_up_at_its_end(
    model_folder: Folder, folders: dict[str, Path], tmp_path: Path
) -> None:
    lora = read_config((folders["good"] / CONFIG).read_bytes(), ModelConfig.from_hf(model_folder("llama")))
    needed = blocks([WORD * lora.floats, (folders["good"] / WEIGHTS).stat().st_size])
    words = [*flags(folders)[:-1], str(needed)]
    with inside(model_folder("llama"), "tee-only", *words) as one:
        before = one.stats().memory_used
        kept = one.do(lambda: upload(one.service._assembled.adapters, folders["good"]))
        level = one.stats().memory_used
        assert level == before + kept.size
        client, second = open_with(one, kept.name), open_with(one, kept.name)
        said = client.say(PROMPT, 4)
        for session in (client, second):
            with pytest.raises(ExhaustedError, match=f"needs {needed} bytes"):
                one.do(lambda: upload(one.service._assembled.adapters, folders["good"]))
            session.close()
        after = one.do(lambda: upload(one.service._assembled.adapters, folders["good"]))
        assert after.name != kept.name
        assert one.stats().memory_used == level
        assert one.stats().adapter_bytes == after.size
        with pytest.raises(CleaveError, match="no such adapter"):
            open_with(one, kept.name)
        again = open_with(one, after.name)
        assert again.say(PROMPT, 4) == said


def test_an_operator_s_adapter_that_cannot_be_loaded_stops_the_start(
    model_folder: Folder, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["good"], tmp_path / "bad")
    (tmp_path / "bad" / WEIGHTS).write_bytes(b"x" * 100)
    with (
        pytest.raises(InvalidArgumentError, match="header"),
        inside(model_folder("llama"), "tee-only", *flags({"bad": tmp_path / "bad"}, "bad")),
    ):
        pass
