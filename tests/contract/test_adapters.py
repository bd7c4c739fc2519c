"""LoRA adapters under every scheme whose decoder runs inside: as peft computes them, and nothing of them outside."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from tests.adapter_folders import ATTENTION, FFN, Case, Made, everything, make, read, upload
from tests.conftest import MODELS, Rig, build, forward, transformers_logits
from tests.simulators.workers import RecordingWorker
from trusted_worker.adapters import Adapter
from trusted_worker.model import Batch, Run

Folder = Callable[[str], Path]
Maker = Callable[..., Made]
PROMPT = [int(token) for token in np.random.default_rng(7).integers(0, 300, 40)]
FLAGS = ("--adapter-memory", "4MiB")
INT8 = ("tee-only", "split", "secure-infer")
CASES = {
    "two of the attention": Case(rank=4),
    "one row": Case(rank=1, alpha=2, targets=("k_proj",)),
    "rslora": Case(rank=16, alpha=4, rslora=True, targets=ATTENTION),
    "feed-forward": Case(rank=3, alpha=5, targets=FFN),
    "a path": Case(rank=8, targets=("model.layers.1.mlp.down_proj", "layers.2.self_attn.q_proj")),
    "everything": Case(rank=8, alpha=16, targets="all-linear"),
}


@pytest.fixture(scope="module")
def made(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """`made(model, case)`: an adapter of a name in MODELS."""
    root, kept = tmp_path_factory.mktemp("adapters"), dict[tuple[str, Case], Made]()

    def get(name: str, case: Case) -> Made:
        if (name, case) not in kept:
            kept[name, case] = make(model_folder(name), root / str(len(kept)), case)
        return kept[name, case]

    return get


def rig_of(folder: Path, scheme: str, precision: str = "int8", bank_rows: int = 64) -> Rig:
    return build(folder, scheme, precision, bank_rows=bank_rows, flags=FLAGS)


@pytest.mark.parametrize("scheme", ["tee-only", "split"])
@pytest.mark.parametrize("name", MODELS)
def test_float32_answers_are_those_of_peft(model_folder: Folder, made: Maker, name: str, scheme: str) -> None:
    folder = model_folder(name)
    adapted = made(name, Case(rank=8, alpha=16, targets=everything(folder)))
    rig, reference = rig_of(folder, scheme, "float32"), adapted.logits(PROMPT)
    adapter = upload(rig.adapters, adapted.folder)
    logits = rig.logits(PROMPT, [7, 1, 20, 12], adapter)
    assert np.abs(logits - reference).max() <= 1e-4 * np.abs(reference).max()
    assert rig.greedy(PROMPT, 32, adapter) == adapted.greedy(PROMPT, 32)
    assert np.abs(logits - transformers_logits(folder, PROMPT)).max() > 0.1 * np.abs(reference).max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_ranks_scales_and_targets_are_those_of_peft(model_folder: Folder, made: Maker, name: str, case: str) -> None:
    adapted, rig = made(name, CASES[case]), rig_of(model_folder(name), "tee-only", "float32")
    reference = adapted.logits(PROMPT)
    logits = rig.logits(PROMPT, [40], upload(rig.adapters, adapted.folder))
    assert np.abs(logits - reference).max() <= 1e-4 * np.abs(reference).max()
    assert np.abs(logits - transformers_logits(model_folder(name), PROMPT)).max() > 1e-3 * np.abs(reference).max()


@pytest.mark.parametrize("name", MODELS)
def test_int8_schemes_agree_bit_for_bit_in_any_chunking(model_folder: Folder, made: Maker, name: str) -> None:
    folder = model_folder(name)
    adapted = made(name, Case(rank=8, alpha=16, targets=everything(folder)))
    split = rig_of(folder, "split")
    reference = split.logits(PROMPT, None, upload(split.adapters, adapted.folder))
    for scheme in INT8:
        rig = rig_of(folder, scheme, bank_rows=90)
        adapter = upload(rig.adapters, adapted.folder)
        for chunks in ([40], [7, 1, 20, 12], [1] * 40):  # the pads do not last: rows outside, and rows inside
            assert np.array_equal(rig.logits(PROMPT, chunks, adapter), reference), (scheme, chunks)


@pytest.mark.parametrize("name", MODELS)
def test_int8_stays_close_to_peft(model_folder: Folder, made: Maker, name: str) -> None:
    folder = model_folder(name)
    adapted, rig = made(name, Case(rank=8, alpha=16, targets=everything(folder))), rig_of(folder, "secure-infer")
    reference = adapted.logits(PROMPT)
    logits = rig.logits(PROMPT, [40], upload(rig.adapters, adapted.folder))
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(reference, axis=1)
    assert ((logits * reference).sum(axis=1) / norms).min() >= 0.995


@pytest.mark.parametrize("scheme", INT8)
def test_rows_of_many_adapters_and_of_none_share_a_batch(model_folder: Folder, made: Maker, scheme: str) -> None:
    folder = model_folder("llama")
    rig, alone = rig_of(folder, scheme, bank_rows=30), rig_of(folder, "split")
    bare = build(folder, "split")  # without memory for adapters at all
    folders = [made("llama", CASES[case]).folder for case in ("two of the attention", "everything", "feed-forward")]
    chosen = [upload(rig.adapters, one) for one in folders]
    others = [upload(alone.adapters, one) for one in folders]
    order = [0, None, 1, 2, 1]
    prompts = [PROMPT[:5], PROMPT[5:6], PROMPT[6:19], PROMPT[19:39], PROMPT[39:]]
    ids, runs, caches = list[int](), list[Run](), [rig.scheme.open(64) for _ in prompts]
    for cache, prompt, which in zip(caches, prompts, order, strict=True):
        assert cache.wake(len(prompt)) == len(prompt)
        runs.append(Run(cache, len(ids), len(ids) + len(prompt), 0, None if which is None else chosen[which]))
        ids.extend(prompt)
    together = forward(rig.scheme, Batch(np.array(ids, np.int32), tuple(runs), np.arange(len(ids), dtype=np.int32)))
    for run, prompt, which in zip(runs, prompts, order, strict=True):
        expected = bare.logits(prompt) if which is None else alone.logits(prompt, None, others[which])
        assert np.array_equal(together[run.start : run.stop], expected)


def seen_with(folder: Path, adapted: Path | None) -> RecordingWorker:
    """What the GPU worker sees of one prompt and some tokens."""
    rig = build(folder, "secure-infer", worker=RecordingWorker, bank_rows=60, flags=FLAGS)
    adapter: Adapter | None = upload(rig.adapters, adapted) if adapted else None
    rig.logits(PROMPT, [20, 1, 1, 18], adapter)
    return cast(RecordingWorker, rig.worker)


def test_the_gpu_worker_sees_nothing_of_an_adapter(model_folder: Folder, made: Maker) -> None:
    """Requests are as many, as large and in the same order; no word of A or B is among them."""
    folder, adapted = model_folder("llama"), made("llama", CASES["everything"]).folder
    without, beside = seen_with(folder, None).seen, seen_with(folder, adapted).seen
    assert [(layer, linear, z.shape) for layer, linear, z in beside] == [(a, b, z.shape) for a, b, z in without]
    sent = b"".join(z.tobytes() for _, _, z in beside)
    for tensor in read(adapted)[1].values():
        flat = tensor.reshape(-1).astype(np.float32)
        for factor in (1, 2):  # as it came, and times its scale
            pieces = (flat * np.float32(factor)).reshape(-1, 2) if flat.size % 2 == 0 else flat[:-1].reshape(-1, 2)
            assert not any(piece.tobytes() in sent for piece in pieces[:64])
