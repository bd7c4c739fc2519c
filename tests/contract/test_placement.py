"""secure-infer with its projections inside: the same bits, half of the exchanges, and nothing of them in a pad."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from tests.adapter_folders import ATTENTION, Case, make, upload
from tests.conftest import Rig, build, one_run
from tests.rows import forward
from tests.simulators.workers import CheatingWorker, RecordingWorker
from wire.errors import ExhaustedError, VerificationError
from wire.kv_pages import KvType
from wire.layout import Demand
from wire.linears import LOOKUP_LAYER, PROJECTIONS, Linear, all_specs, lookup_spec
from wire.model_config import ModelConfig
from wire.plan import smallest
from wire.sheets import row_bytes

Folder = Callable[[str], Path]
PROMPT = [int(token) for token in np.random.default_rng(7).integers(0, 300, 40)]
TRUSTED = ("--projections", "trusted")
PLACES = {"gpu": ("--projections", "gpu"), "trusted": TRUSTED}
KEPT = {"gpu": (), "trusted": PROJECTIONS}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that parked weights take less than resident ones, in models as small as these."""
    monkeypatch.setattr("wire.layout.TILE_ELEMENTS", 3000)


def least(folder: Path, where: str) -> int:
    demand = Demand(ModelConfig.from_hf(folder), "secure-infer", "int8", KvType.FLOAT32, 64, kept=KEPT[where])
    return smallest(demand)


def one_token(rig: Rig) -> int:
    """Exchanges of one decoded token."""
    cache = rig.scheme.open(8)
    forward(rig.scheme, one_run(cache, PROMPT[:1], 0))
    before = rig.worker.calls
    forward(rig.scheme, one_run(cache, PROMPT[1:2], 1))
    cache.free()
    return int(rig.worker.calls - before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-bf16-tied-sharded"])
@pytest.mark.parametrize(("where", "exchanges"), [("gpu", 4), ("trusted", 2)])
def test_exchanges_of_one_token(model_folder: Folder, name: str, where: str, exchanges: int) -> None:
    """4 or 2 for each layer, one for the head, and one more where the embedding is looked up."""
    folder = model_folder(name)
    rig = build(folder, "secure-infer", flags=PLACES[where])
    assert one_token(rig) == exchanges * rig.config.layers + 1
    small = build(folder, "secure-infer", flags=PLACES[where], budget=least(folder, where))
    assert small.weights.layout.embed == "scan"
    assert one_token(small) == exchanges * rig.config.layers + 2


@pytest.mark.parametrize("where", PLACES)
def test_a_lookup_is_uniform_words_and_no_pad_of_it_comes_again(model_folder: Folder, where: str) -> None:
    """The tokens themselves go into it. Known ones leave the pad: no block of it recurs, here or at a linear."""
    folder = model_folder("llama")
    rig = build(folder, "secure-infer", worker=RecordingWorker, flags=PLACES[where], budget=least(folder, where))
    for _ in range(3):
        rig.logits(PROMPT, [20, 1, 19])
        rig.fill()
    ids, seen = 3 * PROMPT, cast(RecordingWorker, rig.worker).seen
    words = np.concatenate([z for layer, _, z in seen if layer == LOOKUP_LAYER])
    assert words.shape == (len(ids), rig.config.vocabulary)
    counts = np.array([np.bincount(words.view(np.uint32).ravel() >> at & 255, minlength=256) for at in (0, 8, 16, 24)])
    expected = words.size / 256
    assert (((counts - expected) ** 2 / expected).sum(axis=1) < 420).all()  # 255 degrees of freedom: one in 1e9
    words[np.arange(len(ids)), ids] -= 1
    others = [row for layer, _, z in seen if layer != LOOKUP_LAYER for row in z]
    blocks = [row[at : at + 4].tobytes() for row in (*words, *others) for at in range(0, len(row) - 3, 4)]
    assert len(set(blocks)) == len(blocks)


def test_only_the_other_linears_go_out_have_pads_and_are_checked(model_folder: Folder) -> None:
    folder = model_folder("llama")
    rig = build(folder, "secure-infer", worker=RecordingWorker, flags=TRUSTED)
    rig.logits(PROMPT, [20, 1, 19])
    seen = cast(RecordingWorker, rig.worker).seen
    assert {Linear(linear) for _, linear, _ in seen} == set(Linear) - set(PROJECTIONS)
    assert set(rig.scheme._verifier._c) == set(all_specs(rig.config, PROJECTIONS))
    assert rig.bank.sheets.row_bytes == row_bytes(all_specs(rig.config, PROJECTIONS))
    products, kept = len(rig.weights.specs), len(PROJECTIONS) * rig.config.layers
    counters = rig.scheme.counters()
    assert counters["products_inside"] == kept * len(PROMPT)
    assert counters["products_verified"] == (products - kept) * len(PROMPT)


def test_a_bank_of_the_same_size_holds_more_pads(model_folder: Folder) -> None:
    folder = model_folder("llama")
    gpu, trusted = (build(folder, "secure-infer", flags=flags).bank for flags in PLACES.values())
    bank = 64 * row_bytes([*all_specs(ModelConfig.from_hf(folder)), lookup_spec(ModelConfig.from_hf(folder))])
    assert gpu.capacity == bank // gpu.sheets.row_bytes
    assert trusted.capacity == bank // trusted.sheets.row_bytes > 1.2 * gpu.capacity


@pytest.mark.parametrize("stock", [0, 3, 64])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "llama-bf16-tied-sharded"])
def test_the_smallest_budget_gives_the_same_bits(model_folder: Folder, name: str, stock: int) -> None:
    """Everything else is parked and looked up; rows without a pad are computed from parked tiles."""
    folder = model_folder(name)
    rig = build(folder, "secure-infer", bank_rows=stock, budget=least(folder, "trusted"), flags=TRUSTED)
    assert (rig.weights.layout.linears, rig.weights.layout.embed) == ("parked", "scan")
    assert np.array_equal(rig.logits(PROMPT, [20, 1, 19]), build(folder, "split").logits(PROMPT))
    if stock == 64:  # with pads nothing is read from disk
        rig.fill()
        read = rig.scheme.counters()["tiles_read"]
        rig.logits(PROMPT[:1])
        assert rig.scheme.counters()["tiles_read"] == read


def test_a_budget_that_does_not_hold_the_weights_is_refused(model_folder: Folder) -> None:
    folder = model_folder("llama")
    enough = least(folder, "trusted")
    with pytest.raises(ExhaustedError, match=f"--projections trusted: --memory-budget {enough} would do"):
        build(folder, "secure-infer", budget=enough - 64, flags=TRUSTED)


def test_adapters_of_the_projections_are_added_inside(model_folder: Folder, tmp_path: Path) -> None:
    folder = model_folder("llama")
    made = make(folder, tmp_path / "adapter", Case(rank=4, alpha=8, targets=ATTENTION))
    rigs: list[Any] = [
        build(folder, scheme, flags=("--adapter-memory", "4MiB", *flags))
        for scheme, flags in (("split", ()), ("secure-infer", TRUSTED))
    ]
    split, trusted = (rig.logits(PROMPT, [20, 1, 19], upload(rig.adapters, made.folder)) for rig in rigs)
    assert np.array_equal(split, trusted)
    assert not np.array_equal(trusted, rigs[1].logits(PROMPT, [20, 1, 19]))


def test_a_wrong_product_is_rejected_and_the_next_secret_serves(model_folder: Folder) -> None:
    folder = model_folder("llama")
    rig = build(folder, "secure-infer", worker=CheatingWorker, flags=TRUSTED, bank_rows=64)
    rig.worker.cheat = lambda answer, _: answer + np.int32(1)
    with pytest.raises(VerificationError):
        rig.logits(PROMPT[:4], [4])
    rig.worker.cheat = None
    rig.scheme.distrust()
    assert np.array_equal(rig.logits(PROMPT[:4], [4]), build(folder, "split").logits(PROMPT[:4]))
