"""One suite over every scheme: the results are right, at both precisions, in any chunking and any batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import MODELS, Rig, build, forward, greedy_reference, transformers_logits
from trusted_worker import arithmetic
from trusted_worker.model import Batch, Run
from wire.linears import LinearSpec

FLOAT32 = ("plain", "tee-only", "split", "kv-shield")
INT8 = {
    "tee-only": (),
    "split": (),
    "secure-infer": (),
    "secure-infer --projections trusted": ("--projections", "trusted"),
    "secure-infer --projections auto": ("--projections", "auto"),
}
PROMPT = [int(token) for token in np.random.default_rng(7).integers(0, 300, 40)]


def int8(folder: Path, way: str, **more: Any) -> Rig:
    """A rig of one of INT8."""
    return build(folder, way.partition(" ")[0], flags=INT8[way], **more)


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> Path:
    return model_folder(request.param)


@pytest.mark.parametrize("scheme", FLOAT32)
def test_float32_logits_are_those_of_transformers(folder: Path, scheme: str) -> None:
    reference = transformers_logits(folder, PROMPT)
    logits = build(folder, scheme, "float32").logits(PROMPT, [7, 1, 20, 12])
    assert np.abs(logits - reference).max() <= 1e-4 * np.abs(reference).max()


@pytest.mark.parametrize("scheme", FLOAT32)
def test_float32_greedy_tokens_are_those_of_transformers(folder: Path, scheme: str) -> None:
    assert build(folder, scheme, "float32").greedy(PROMPT, 64) == greedy_reference(folder, PROMPT, 64)


def test_secure_infer_equals_split_and_tee_only_bit_for_bit_in_any_chunking(folder: Path) -> None:
    reference = build(folder, "split").logits(PROMPT)
    for way in INT8:
        for chunks in ([40], [7, 1, 20, 12]):
            assert np.array_equal(int8(folder, way).logits(PROMPT, chunks), reference), (way, chunks)


@pytest.mark.parametrize("way", INT8)
def test_int8_stays_close_to_float32(folder: Path, way: str) -> None:
    reference, logits = transformers_logits(folder, PROMPT), int8(folder, way).logits(PROMPT, [40])
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(reference, axis=1)
    assert ((logits * reference).sum(axis=1) / norms).min() >= 0.995


@pytest.mark.parametrize("way", INT8)
def test_rows_of_many_sessions_in_one_call_get_what_they_get_alone(folder: Path, way: str) -> None:
    rig = int8(folder, way, bank_rows=128)
    prompts = [PROMPT[:5], PROMPT[5:6], PROMPT[6:19], PROMPT[19:40]]
    caches = [rig.scheme.open(64) for _ in prompts]
    ids: list[int] = []
    runs: list[Run] = []
    for cache, prompt in zip(caches, prompts, strict=True):
        assert cache.wake(len(prompt)) == len(prompt)
        runs.append(Run(cache, len(ids), len(ids) + len(prompt), 0))
        ids.extend(prompt)
    together = forward(rig.scheme, Batch(np.array(ids, np.int32), tuple(runs), np.arange(len(ids), dtype=np.int32)))
    alone = build(folder, "split")
    for run, prompt in zip(runs, prompts, strict=True):
        assert np.array_equal(together[run.start : run.stop], alone.logits(prompt))


@pytest.mark.parametrize("stock", [0, 1, 5, 64])
@pytest.mark.parametrize("prefill", ["auto", "inside", "worker"])
def test_a_dry_bank_changes_nothing_but_the_counters(
    model_folder: Callable[[str], Path], stock: int, prefill: str
) -> None:
    folder = model_folder("qwen2")
    rig = build(folder, "secure-infer", bank_rows=stock, prefill=prefill)
    assert np.array_equal(rig.logits(PROMPT, [20, 1, 1, 1, 17]), build(folder, "split").logits(PROMPT))
    counters = rig.scheme.counters()
    products = len(PROMPT) * len(rig.weights.specs)
    assert counters["products_verified"] + counters["products_inside"] == products
    assert counters["products_verified"] == counters["pads_issued"] * len(rig.weights.specs)
    assert counters["pads_issued"] <= stock


def test_every_product_of_a_run_equals_an_int64_reference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = build(folder, "secure-infer", bank_rows=10)  # some rows outside, some inside
    taken: list[tuple[Any, Any]] = []
    quantize, dequantize = arithmetic.quantize, arithmetic.dequantize
    inputs: list[Any] = []

    def spy_in(*args: Any) -> Any:
        result = quantize(*args)
        inputs.append(result[0].copy())
        return result

    def spy_out(y_q: Any, *rest: Any) -> Any:
        taken.append((inputs[-1], y_q.copy()))
        return dequantize(y_q, *rest)

    monkeypatch.setattr(arithmetic, "quantize", spy_in)
    monkeypatch.setattr(arithmetic, "dequantize", spy_out)
    rig.logits(PROMPT[:16], [16])
    assert len(taken) == len(rig.weights.specs)
    spec: LinearSpec
    for spec, (x_q, y_q) in zip(rig.weights.specs, taken, strict=True):
        exact = x_q.astype(np.int64) @ rig.worker.weight(spec.layer, spec.linear, int8=True).T
        assert np.array_equal(exact, y_q)
        assert np.abs(exact).max() < 1 << 30
