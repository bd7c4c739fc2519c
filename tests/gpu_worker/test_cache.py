"""Caches are bounded per sequence and in all, what is dropped is free again, and pages come back bit for bit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_worker.allowance import Allowance
from gpu_worker.cache import CacheStore, reserved_bytes
from gpu_worker.kv_array import KvArray, quantize
from gpu_worker.worker import Worker
from tests.gpu_worker.calling import MODEL
from tests.gpu_worker.peer import Peer
from wire.errors import ContextError, ExhaustedError, InvalidArgumentError
from wire.kv_pages import PAGE_TOKENS, KvType, page_words, token_bytes
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb

F32 = KvType.FLOAT32
PROMPT = [3, 141, 59, 26, 5, 200, 260, 0, 17, 17, 99] * 7  # more than a page


@pytest.fixture
def config(model_folders: dict[str, Path]) -> ModelConfig:
    return ModelConfig.from_hf(model_folders[MODEL])


@pytest.fixture
def store() -> CacheStore:
    return CacheStore(Allowance("a KV cache", 1 << 30))


def test_a_full_sequence_refuses_more_rows(store: CacheStore, config: ModelConfig) -> None:
    store.reserve(5, config, 10, F32, "cpu")
    [(sequence, rows)] = store.find([(5, 10)], config)
    sequence.advance(rows)
    with pytest.raises(ContextError):
        store.find([(5, 1)], config)


def test_unknown_and_doubled_numbers_are_refused(store: CacheStore, config: ModelConfig) -> None:
    store.reserve(1, config, 4, F32, "cpu")
    with pytest.raises(InvalidArgumentError):
        store.reserve(1, config, 4, F32, "cpu")
    with pytest.raises(InvalidArgumentError):
        store.drop(2)
    with pytest.raises(InvalidArgumentError):
        store.find([(2, 1)], config)
    with pytest.raises(ContextError):
        store.reserve(3, config, config.max_context + 1, F32, "cpu")


def test_a_sequence_of_a_replaced_model_is_unknown(store: CacheStore, config: ModelConfig) -> None:
    store.reserve(1, config, 4, F32, "cpu")
    with pytest.raises(InvalidArgumentError):
        store.find([(1, 1)], replace(config))


@pytest.mark.parametrize("kind", list(KvType))
def test_what_is_counted_is_whole_pages_of_what_is_held(config: ModelConfig, kind: KvType) -> None:
    assert reserved_bytes(config, 1, kind) == PAGE_TOKENS * token_bytes(config, kind)
    assert reserved_bytes(config, 65, kind) == 2 * PAGE_TOKENS * token_bytes(config, kind)
    half = KvArray(config, PAGE_TOKENS, kind, "cpu")
    assert 2 * sum(part.nbytes for part in half._parts()) == reserved_bytes(config, 1, kind)


def test_stores_share_one_allowance_and_give_it_back(config: ModelConfig) -> None:
    allowance = Allowance("a KV cache", 3 * PAGE_TOKENS * token_bytes(config, F32))
    first, second = CacheStore(allowance), CacheStore(allowance)
    first.reserve(1, config, 65, F32, "cpu")
    with pytest.raises(ExhaustedError, match="would fit"):
        second.reserve(1, config, 65, F32, "cpu")
    second.reserve(1, config, 64, F32, "cpu")
    first.drop(1)
    second.clear()
    assert allowance.used == 0


def test_an_allowance_that_shrinks_has_nothing_left() -> None:
    allowance = Allowance("a thing", 10)
    allowance.take(8)
    allowance.limit = 5
    with pytest.raises(ExhaustedError, match="a thing of 1 bytes was asked for; 0 bytes"):
        allowance.take(1)
    allowance.give(8)
    allowance.take(5)


def test_int8_rounds_to_the_nearest_of_255_steps() -> None:
    rows = torch.randn(3, 5, 16)
    rows[1, 2] = 0
    rows[2, 0] *= 1e-37
    quantised, scale = quantize(rows)
    assert quantised.dtype is torch.int8
    torch.testing.assert_close(scale[0], rows[0].abs().amax(-1) / 127)
    assert int(quantised.abs().max()) == 127
    assert float(scale[1, 2]) == float(scale[2, 0]) == 0
    assert bool(((quantised * scale[..., None] - rows).abs() <= 0.5001 * scale[..., None] + 1e-36).all())


def _logits(peer: Peer, sequence: int) -> np.ndarray:
    peer.forward({sequence: PROMPT}, [])
    return np.concatenate([peer.forward({sequence: [i]}) for i in (5, 200, 7)])


@pytest.mark.parametrize(("kind", "bound"), [(KvType.FLOAT16, 0.005), (KvType.INT8, 0.08)])
@pytest.mark.parametrize("name", [MODEL, "mistral", "gpt2"])
def test_each_type_is_near_float32(worker: Worker, name: str, kind: KvType, bound: float) -> None:
    peer = Peer(worker, name)
    peer.reserve(1)
    peer.reserve(2, kind=kind)
    exact, near = _logits(peer, 1), _logits(peer, 2)
    assert 0 < np.abs(near - exact).max() < bound * np.abs(exact).max()


def _pages(peer: Peer, sequence: int) -> dict[tuple[int, int], np.ndarray]:
    places = [(layer, page) for layer in range(3) for page in range(2)]
    return {(layer, page): peer.cache(sequence, read=pb.ReadPage(layer=layer, page=page)) for layer, page in places}


@pytest.mark.parametrize("kind", list(KvType))
def test_pages_go_out_and_come_back(worker: Worker, kind: KvType) -> None:
    peer = Peer(worker, MODEL)
    peer.reserve(1, 2, kind=kind)
    expected = _logits(peer, 1)
    peer.forward({2: PROMPT}, [])
    pages = _pages(peer, 2)
    assert all(words.shape == (page_words(peer.model.config, kind),) for words in pages.values())
    peer.cache(2, wipe=pb.Wipe())
    assert not any(words.any() for words in _pages(peer, 2).values())
    for (layer, page), words in pages.items():
        peer.cache(2, words, write=pb.WritePage(layer=layer, page=page))
    for place, words in _pages(peer, 2).items():
        np.testing.assert_array_equal(words, pages[place])
    np.testing.assert_array_equal(np.concatenate([peer.forward({2: [i]}) for i in (5, 200, 7)]), expected)


@pytest.mark.parametrize("kind", list(KvType))
def test_any_words_are_kept(worker: Worker, kind: KvType) -> None:
    """What is a page to the peer may be no numbers at all: every bit pattern, those of NaNs too."""
    peer, random = Peer(worker, "qwen3"), np.random.default_rng(0)
    peer.reserve(1, tokens=65, kind=kind)
    words = random.integers(-(1 << 31), 1 << 31, page_words(peer.model.config, kind)).astype(np.int32)
    words[:100] |= 0x7F800000
    peer.cache(1, words, write=pb.WritePage(layer=2, page=1))
    np.testing.assert_array_equal(peer.cache(1, read=pb.ReadPage(layer=2, page=1)), words)
    assert not peer.cache(1, read=pb.ReadPage(layer=1, page=1)).any()
    assert not peer.cache(1, read=pb.ReadPage(layer=2, page=0)).any()


def test_pages_that_there_are_not(worker: Worker) -> None:
    peer = Peer(worker, MODEL)
    peer.reserve(1, tokens=64)
    peer.reserve(2, tokens=65, kind=KvType.INT8)
    words = peer.cache(1, read=pb.ReadPage())
    for read in (pb.ReadPage(page=1), pb.ReadPage(layer=3), pb.ReadPage(page=(1 << 32) - 1)):
        with pytest.raises(InvalidArgumentError, match="out of range"):
            peer.cache(1, read=read)
    peer.cache(2, read=pb.ReadPage(page=1))
    with pytest.raises(InvalidArgumentError, match="number of words"):
        peer.cache(2, words, write=pb.WritePage())
    with pytest.raises(InvalidArgumentError, match="number of words"):
        peer.cache(1, words[:-1], write=pb.WritePage())
    with pytest.raises(InvalidArgumentError, match="rows"):
        peer.cache(1, np.zeros(len(words) + 1, np.int32), write=pb.WritePage())
    for action in ({"read": pb.ReadPage()}, {"wipe": pb.Wipe()}, {"drop": pb.Drop()}):
        with pytest.raises(InvalidArgumentError, match="unknown sequence"):
            peer.cache(3, **action)


def test_reservations_that_make_no_sense(worker: Worker) -> None:
    peer = Peer(worker, MODEL)
    reserves = (pb.Reserve(type=pb.KV_TYPE_INT8), pb.Reserve(tokens=4), pb.Reserve(tokens=4, type=9))  # type: ignore[arg-type]
    for reserve in reserves:
        with pytest.raises(InvalidArgumentError, match="known type"):
            peer.cache(1, reserve=reserve)
    with pytest.raises(InvalidArgumentError, match="unknown cache action"):
        peer.cache(1)
