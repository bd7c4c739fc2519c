"""kv-shield: right in every family, and what it hides from whom, read off the GPU worker itself."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.shield import ROWS, Shield, build_shield
from tests.model_folders import MODELS, greedy_reference, transformers_logits
from trusted_worker.arithmetic import F32
from trusted_worker.schemes.kv_shield import KvShield, Options, scratch_bytes
from trusted_worker.sealed_pages import PageStore
from trusted_worker.secure_memory import Scratch, SecureMemory
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError, UnavailableError, VerificationError
from wire.kv_pages import KvType
from wire.linears import Linear
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, parameters, read
from wire.v1 import gpu_worker_pb2 as pb

Folder = Callable[[str], Path]
PROMPTS = [[int(t) for t in np.random.default_rng(seed).integers(0, 300, size)] for seed, size in ((7, 40), (8, 3))]
BOUND = {KvType.FLOAT32: 1e-5, KvType.FLOAT16: 2e-3, KvType.INT8: 0.04}  # of the largest logit


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, model_folder: Folder) -> Path:
    return model_folder(request.param)


@pytest.mark.parametrize("rope_on_worker", [False, True])
def test_greedy_answers_of_a_mixed_batch_survive_renewed_permutations_and_parking(
    folder: Path, rope_on_worker: bool
) -> None:
    rig = build_shield(folder, Options(rope_on_worker=rope_on_worker, rotate_every=30, seal_idle=True))
    caches = [rig.scheme.open(len(prompt) + 128) for prompt in PROMPTS]
    answers: list[list[int]] = [[] for _ in PROMPTS]
    wanted = [(cache, prompt) for cache, prompt in zip(caches, PROMPTS, strict=True)]
    for number in range(128):
        logits = rig.step(wanted)
        for answer, rows in zip(answers, logits, strict=True):
            answer.append(int(rows[-1].argmax()))
        wanted = [(cache, answer[-1:]) for cache, answer in zip(caches, answers, strict=True)]
        if number in (20, 90):
            rig.park(caches[number == 90])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer == greedy_reference(folder, prompt, 128)
    counts = rig.scheme.counters()
    assert counts["permutations_renewed"] >= 8
    assert counts["pages_sealed"] == counts["pages_restored"] > 0


@pytest.mark.parametrize("kv_type", KvType)
def test_logits_stay_within_the_bound_of_their_cache(folder: Path, kv_type: KvType) -> None:
    reference = transformers_logits(folder, PROMPTS[0])
    rig = build_shield(folder, Options(kv_type=kv_type, rotate_every=8))
    logits = rig.logits(PROMPTS[0], [7, 1, 20, 12])
    assert np.abs(logits - reference).max() <= BOUND[kv_type] * np.abs(reference).max()
    assert rig.scheme.counters()["permutations_renewed"] == 2


@pytest.mark.parametrize("rope_on_worker", [False, True])
def test_a_pass_crosses_once_a_layer_and_twice_where_rope_wants_it(folder: Path, rope_on_worker: bool) -> None:
    rig = build_shield(folder, Options(rope_on_worker=rope_on_worker))
    cache = rig.scheme.open(8)
    before = rig.worker.calls
    rig.step([(cache, [1, 2, 3])])
    twice = rig.config.rope is not None and not rope_on_worker
    assert rig.worker.calls - before == (2 if twice else 1) * rig.config.layers + 1


def _keys_and_values(folder: Path, ids: list[int]) -> tuple[F32, F32]:
    """What an unprotected cache holds: float32[layers, heads, tokens, d] of keys and of values."""
    import torch

    from tests.model_folders import reference_model

    with torch.no_grad():
        cache = reference_model(folder)(torch.tensor([ids]), use_cache=True).past_key_values
    layers = [(layer.keys[0].numpy(), layer.values[0].numpy()) for layer in cache.layers]
    return np.stack([keys for keys, _ in layers]), np.stack([values for _, values in layers])


def _cached(rig: Shield) -> tuple[F32, F32]:
    """The same of the worker's cache of its first sequence."""
    sequence: Any = rig.worker.held._caches.get(1, rig.worker.worker.model.config)  # type: ignore[union-attr]
    halves = []
    for half in (sequence._keys, sequence._values):
        layers = [half.read(layer, 0, sequence.length).numpy().copy() for layer in range(rig.config.layers)]
        halves.append(np.stack(layers))
    return halves[0], halves[1]


def _closest(rows: Any, others: Any, dim: int) -> Any:
    """For each head of `rows` the largest difference to the head of `others` that is most like it."""
    a, b = np.reshape(rows, (-1, 1, dim)), np.reshape(others, (1, -1, dim))
    return np.abs(a - b).max(axis=-1).min(axis=1)


def _same_numbers_in_another_order(rows: Any, others: Any, dim: int) -> bool:
    rows, others = np.reshape(rows, (-1, dim)), np.reshape(others, (-1, dim))
    known = bool(_closest(np.sort(rows), np.sort(others), dim).max() < 1e-4)
    return known and bool(_closest(rows, others, dim).min() > 1e-3)


def _requests(rig: Shield, first: str) -> list[Any]:
    """The tensors of the chains that begin with a step."""
    chains = [one for one in rig.worker.seen if one.operation.HasField("chain")]
    return [one.request for one in chains if one.operation.chain.steps[0].HasField(first)]  # type: ignore[arg-type]


@pytest.mark.parametrize("rotate_every", [0, 2])
def test_no_row_of_k_or_v_is_unpermuted_in_the_cache_or_on_its_way_there(folder: Path, rotate_every: int) -> None:
    ids, dim = PROMPTS[0][:6], 0
    rig = build_shield(folder, Options(rotate_every=rotate_every))
    dim = rig.config.head_dim
    cache = rig.scheme.open(16)
    for part in (ids[:4], ids[4:5], ids[5:]):
        rig.step([(cache, part)])
    keys, values = _keys_and_values(folder, ids)
    cached_keys, cached_values = _cached(rig)
    assert _same_numbers_in_another_order(cached_keys, keys, dim)
    assert _same_numbers_in_another_order(cached_values, values, dim)
    sent = [request[:, rig.config.q_width :] for request in _requests(rig, "attend")]
    assert bool(sent) == (rig.config.rope is not None)
    if sent:
        assert _same_numbers_in_another_order(np.concatenate(sent), keys, dim)
    # What the threat model concedes: the restored attention vector goes back, and that of a sequence's
    # first token is its row of V.
    restored = np.stack([request[0] for request in _requests(rig, "finish_block")[: rig.config.layers]])
    assert _closest(restored, values[:, :, 0], dim).max() < 1e-4


def test_the_v_only_form_leaves_k_as_it_is_and_hides_v(model_folder: Folder) -> None:
    ids = PROMPTS[0][:6]
    folder = model_folder("llama")
    rig = build_shield(folder, Options(rope_on_worker=True, rotate_every=2))
    cache = rig.scheme.open(16)
    for part in (ids[:4], ids[4:]):
        rig.step([(cache, part)])
    keys, values = _keys_and_values(folder, ids)
    cached_keys, cached_values = _cached(rig)
    assert _closest(cached_keys, keys, rig.config.head_dim).max() < 1e-4
    assert _same_numbers_in_another_order(cached_values, values, rig.config.head_dim)


def test_two_sessions_permute_the_same_keys_differently(model_folder: Folder) -> None:
    rig = build_shield(model_folder("llama"))
    for _ in range(2):
        rig.step([(rig.scheme.open(16), PROMPTS[0][:6])])
    first, second = _requests(rig, "attend")[0], _requests(rig, "attend")[rig.config.layers]
    assert _same_numbers_in_another_order(first, second, rig.config.head_dim)


def test_renewed_permutations_reorder_what_is_cached(model_folder: Folder) -> None:
    rig = build_shield(model_folder("gpt2"), Options(rotate_every=6))
    cache = rig.scheme.open(16)
    rig.step([(cache, PROMPTS[0][:6])])
    before = _cached(rig)
    cache.renew(keep_keys=False)
    for old, new in zip(before, _cached(rig), strict=True):
        assert _same_numbers_in_another_order(new, old, rig.config.head_dim)


def test_rows_and_biases_arrive_permuted_within_their_heads(folder: Path) -> None:
    config, checkpoint = ModelConfig.from_hf(folder), Checkpoint(folder)
    rig = build_shield(folder)
    rig.scheme.provision()  # once more, with a record
    provisioned = [one for one in rig.worker.seen if one.operation.HasField("provision")]
    for layer in range(config.layers):
        for bias in (False, True):
            parameter = parameters(config).get(Name(Kind.LINEAR, layer, Linear.QKV, bias))
            sent = [one.request for one in provisioned if _names(one.operation.provision, layer, bias)]
            assert bool(sent) == (parameter is not None)
            if parameter is None:
                continue
            original = read(checkpoint, parameter).reshape(-1, config.head_dim, parameter.width)
            heads: F32 = np.concatenate(sent).reshape(original.shape)  # type: ignore[arg-type]
            assert np.array_equal(np.sort(heads, axis=1), np.sort(original, axis=1))
            assert all(not np.array_equal(one, other) for one, other in zip(heads, original, strict=True))


def _names(provision: pb.Provision, layer: int, bias: bool) -> bool:
    return (provision.layer, provision.linear, provision.bias) == (layer, pb.LINEAR_QKV, bias)


def _parked(folder: Path) -> tuple[Shield, list[Any]]:
    """Two sequences of 70 tokens, which is two pages a layer, parked."""
    rig = build_shield(folder, Options(seal_idle=True))
    caches = [rig.scheme.open(100) for _ in range(2)]
    ids = [int(token) for token in np.random.default_rng(1).integers(0, 300, 70)]
    for cache in caches:
        for start in range(0, 70, 35):
            rig.step([(cache, ids[start : start + 35])])
        rig.park(cache)
    return rig, caches


def test_a_parked_sequence_leaves_nothing_on_the_worker_and_comes_back_bit_for_bit(model_folder: Folder) -> None:
    rig, caches = _parked(model_folder("llama"))
    keys, values = _cached(rig)
    assert not keys.any()
    assert not values.any()
    pages = [one for one in rig.worker.seen if one.operation.cache.HasField("read")]
    caches[0].wake(1)
    back = [one for one in rig.worker.seen if one.operation.cache.HasField("write")]
    assert len(back) == 2 * rig.config.layers
    for there, here in zip(pages, back, strict=False):
        assert there.answer is not None
        assert here.request is not None
        assert np.array_equal(there.answer, here.request)
    assert _cached(rig)[0].any()


def test_a_sequence_that_wakes_while_it_is_parked_loses_nothing(model_folder: Folder) -> None:
    folder = model_folder("llama")
    rig = build_shield(folder, Options(seal_idle=True))
    cache = rig.scheme.open(20)
    rig.step([(cache, PROMPTS[0][:5])])
    cache.rest()
    assert rig.scheme.idle()  # begins
    assert rig.scheme.idle()  # one page of three
    last = rig.step([(cache, PROMPTS[0][5:6])])[0]
    assert not cache.parked
    expected = transformers_logits(folder, PROMPTS[0][:6])[-1:]
    assert np.abs(last - expected).max() < 1e-4 * np.abs(expected).max()
    rig.park(cache)
    last = rig.step([(cache, PROMPTS[0][6:7])])[0]
    expected = transformers_logits(folder, PROMPTS[0][:7])[-1:]
    assert np.abs(last - expected).max() < 1e-4 * np.abs(expected).max()


def _flip(file: Any, other: Any, old: bytes) -> None:
    file.seek(100)
    byte = file.read(1)
    file.seek(100)
    file.write(bytes([byte[0] ^ 1]))


def _of_another_sequence(file: Any, other: Any, old: bytes) -> None:
    other.seek(0)
    file.seek(0)
    file.write(other.read())


def _an_old_version(file: Any, other: Any, old: bytes) -> None:
    file.seek(0)
    file.write(old)


@pytest.mark.parametrize("tamper", [_flip, _of_another_sequence, _an_old_version])
def test_parked_pages_that_were_changed_are_data_loss_for_their_sequence_only(
    model_folder: Folder, tamper: Callable[[Any, Any, bytes], None]
) -> None:
    rig, caches = _parked(model_folder("llama"))
    file, other = (cache._pages._file for cache in caches)
    file.seek(0)
    old = file.read()
    rig.step([(caches[0], [5])])
    rig.park(caches[0])
    tamper(file, other, old)
    file.flush()
    with pytest.raises(VerificationError):
        caches[0].wake(1)
    rig.step([(caches[1], [5])])  # the other one comes back


def test_a_sequence_of_a_stream_that_ended_is_told_so_and_a_new_one_works(model_folder: Folder) -> None:
    folder = model_folder("llama")
    rig = build_shield(folder)
    lost = rig.scheme.open(8)
    rig.step([(lost, [1])])
    rig.worker.close()
    rig.scheme.provision()
    calls = rig.worker.calls
    with pytest.raises(UnavailableError, match="new session"):
        lost.wake(1)
    lost.free()
    assert rig.worker.calls == calls  # a call that names it would end the new stream
    expected = transformers_logits(folder, PROMPTS[1])
    logits = rig.step([(rig.scheme.open(8), PROMPTS[1])])[0]
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_sequence_gives_back_all_that_it_took(model_folder: Folder) -> None:
    rig = build_shield(model_folder("llama"), Options(seal_idle=True, rotate_every=1))
    used = rig.memory.used
    for _ in range(3):
        cache = rig.scheme.open(16)
        rig.step([(cache, [1, 2])])
        rig.park(cache)
        cache.free()
        assert rig.memory.used == used


class _Sink:
    """A GPU worker that only counts what it is sent."""

    stream = 0

    def __init__(self) -> None:
        self.rows = 0

    def call(self, operation: Any, array: Any, into: Any, meanwhile: Any = None) -> None:
        self.rows += len(array)

    def close(self) -> None: ...


def _wide_layer(folder: Path) -> None:
    """One layer of LLaMA2-7B, all but its feed-forward part and its vocabulary, in float16."""
    import json

    from safetensors.numpy import save_file

    config = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 1, "intermediate_size": 8}
    config |= {"vocab_size": 8, "max_position_embeddings": 4096, "architectures": ["LlamaForCausalLM"]}  # type: ignore[dict-item]
    (folder / "config.json").write_text(json.dumps(config))
    block = np.random.default_rng(0).standard_normal((4096, 4096), np.float32).astype(np.float16)
    save_file({f"model.layers.0.self_attn.{part}_proj.weight": block for part in "qkv"}, folder / "model.safetensors")


def test_a_layer_of_7b_is_initialised_inside_24_mib(tmp_path: Path) -> None:
    import tracemalloc

    _wide_layer(tmp_path)
    config, memory = ModelConfig.from_hf(tmp_path), SecureMemory(24 << 20)
    scratch = Scratch(memory, scratch_bytes(config, KvType.FLOAT32, 8))
    pages, sink = PageStore(secrets.token_bytes(32), None), _Sink()
    checkpoint = Checkpoint(tmp_path)
    tracemalloc.start()
    try:
        KvShield(checkpoint, config, memory, scratch, sink, pages, Options()).provision()
        outside = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sink.rows == 3 * 4096
    assert memory.peak + outside <= 24 << 20


def test_weights_that_are_not_finite_are_refused_by_name(model_folder: Folder, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "llama"
    shutil.copytree(model_folder("llama"), folder)
    name = "model.layers.1.self_attn.k_proj.weight"
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(Checkpoint(folder).info(name).offset + 40)
        file.write(np.array([np.nan], np.float32).tobytes())
    config, memory = ModelConfig.from_hf(folder), SecureMemory(1 << 20)
    scratch, pages = Scratch(memory, scratch_bytes(config, KvType.FLOAT32, ROWS)), PageStore(bytes(32), None)
    scheme = KvShield(Checkpoint(folder), config, memory, scratch, _Sink(), pages, Options())
    with pytest.raises(CheckpointError, match=name):
        scheme.provision()
