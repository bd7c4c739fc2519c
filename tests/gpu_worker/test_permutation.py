"""Permuted caches: what the worker projects afterwards fits what it cached before, and attention comes out permuted."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from gpu_worker.worker import Worker
from tests.gpu_worker.calling import HEAD_DIM, MODEL
from tests.gpu_worker.peer import F32, Peer, attend, embed, finish, flat, head, project
from tests.gpu_worker.test_chain import close, rotation
from tests.gpu_worker.test_overlay import weights
from wire.errors import InvalidArgumentError
from wire.kv_pages import PAGE_TOKENS, KvType
from wire.linears import Linear
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name
from wire.v1 import gpu_worker_pb2 as pb

Indices = npt.NDArray[np.int32]

PROMPT = [3, 141, 59, 26, 5, 200, 260, 0, 17, 17, 99]
NAMES = ["qwen3", "gpt2", "chatglm3"]
# Sums in another order differ in their last bits, and so what is rounded afterwards may fall to the other side.
BOUNDS = [(KvType.FLOAT32, 1e-5), (KvType.FLOAT16, 1e-3), (KvType.INT8, 2e-2)]


def random_indices(config: ModelConfig, seed: int) -> Indices:
    random = np.random.default_rng(seed)
    shape = (config.layers, 2, config.kv_heads, config.head_dim)
    return random.permuted(np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape), axis=-1)


def gather(x: F32, config: ModelConfig, table: Indices) -> F32:
    """The dims of [m, heads.d] by table [kv_heads, d], whose heads serve groups."""
    heads = x.reshape(len(x), -1, config.head_dim)
    groups = np.repeat(table, heads.shape[1] // len(table), axis=0)
    return np.take_along_axis(heads, groups[None], axis=-1).reshape(x.shape)


def permute(peer: Peer, sequence: int, indices: Indices) -> None:
    peer.cache(sequence, indices, permute=pb.Permute())


def step(peer: Peer, sequence: int, ids: list[int], tables: Indices | None) -> list[F32]:
    """Attention of each layer and the logits; the peer takes the permutation off what goes back."""
    rows, config, seen = {sequence: ids}, peer.model.config, []
    a = peer.chain([embed(rows), project(0), attend(0)], flat(rows))
    for layer in range(config.layers):
        if tables is not None:
            a = gather(a, config, np.argsort(tables[layer, 1], axis=-1).astype(np.int32))
        seen.append(a)
        if layer + 1 < config.layers:
            a = peer.chain([finish(layer), project(layer + 1), attend(layer + 1)], a)
    return [*seen, peer.chain([finish(config.layers - 1), head(range(len(ids)))], a)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "bound"), BOUNDS)
def test_attention_is_the_same_but_for_the_order(worker: Worker, name: str, kind: KvType, bound: float) -> None:
    peer = Peer(worker, name)
    config = peer.model.config
    peer.reserve(1, 2, kind=kind)
    first, second = random_indices(config, 1), random_indices(config, 2)
    composed = np.take_along_axis(first, second, axis=-1)
    plain, permuted = [], []
    for ids, tables in (([*PROMPT], None), ([7, 8], first), ([9], composed), ([1, 2, 3], composed)):
        if len(ids) < 3:
            permute(peer, 2, first if tables is first else second)
        plain += step(peer, 1, ids, None)
        permuted += step(peer, 2, ids, tables)
    for expected, got in zip(plain, permuted, strict=True):
        close(got, expected, bound)


def test_a_permutation_before_the_first_token(worker: Worker) -> None:
    peer = Peer(worker, "qwen3")
    peer.reserve(1, 2)
    indices = random_indices(peer.model.config, 3)
    permute(peer, 2, indices)
    for expected, got in zip(step(peer, 1, PROMPT, None), step(peer, 2, PROMPT, indices), strict=True):
        close(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_projections_of_the_peer_are_taken_as_they_are(worker: Worker, name: str) -> None:
    """The peer norms, rotates and permutes q and k itself; v is permuted here."""
    peer = Peer(worker, name)
    config = peer.model.config
    peer.reserve(1, 2)
    indices = random_indices(config, 4)
    for sequence in (1, 2):
        peer.forward({sequence: PROMPT}, [])
    permute(peer, 2, indices)
    expected = peer.chain([embed({1: [5, 6]}), project(0), attend(0)], flat({1: [5, 6]}))
    rows = {2: [5, 6]}
    qk = rotation(peer, rows)(0, peer.chain([embed(rows), project(0)], flat(rows)))
    q, k = qk[:, : config.q_width], qk[:, config.q_width :]
    final = np.concatenate([gather(part, config, indices[0, 0]) for part in (q, k)], axis=1)
    close(peer.chain([attend(0)], final), gather(expected, config, indices[0, 1]))


@pytest.mark.parametrize("name", NAMES)
def test_provisioned_weights_undo_the_order(worker: Worker, model_folders: dict[str, Path], name: str) -> None:
    """With the columns of O in the order of the values, a whole Forward comes out as ever, in a mixed batch too."""
    peer, of = Peer(worker, name), weights(model_folders[name])
    config = peer.model.config
    peer.reserve(1, 2, 3)
    expected = np.concatenate([peer.forward({1: PROMPT}), peer.forward({1: [4, 5]})])
    indices = random_indices(config, 5)
    for sequence, length in ((2, 6), (3, 0)):
        if length:
            close(peer.forward({sequence: PROMPT[:length]}), expected[:length])
        permute(peer, sequence, indices)
    for layer in range(config.layers):
        o = Name(Kind.LINEAR, layer, Linear.O)
        peer.provision(o, gather(of[o], config, indices[layer, 1]))
    mixed = peer.forward({2: PROMPT[6:], 3: PROMPT[:8]})
    close(mixed, np.concatenate([expected[6:11], expected[:8]]))
    close(peer.forward({3: PROMPT[8:], 2: [4, 5]}), np.concatenate([expected[8:11], expected[11:]]))


def test_pages_are_permuted_with_the_rest(worker: Worker) -> None:
    peer = Peer(worker, MODEL)
    config = peer.model.config
    peer.reserve(1)
    peer.forward({1: PROMPT}, [])
    before = peer.cache(1, read=pb.ReadPage(layer=1)).view(np.float32).reshape(2, 2, PAGE_TOKENS, HEAD_DIM)
    indices = random_indices(config, 6)
    permute(peer, 1, indices)
    after = peer.cache(1, read=pb.ReadPage(layer=1)).view(np.float32).reshape(2, 2, PAGE_TOKENS, HEAD_DIM)
    np.testing.assert_array_equal(after, np.take_along_axis(before, indices[1][:, :, None], axis=-1))


def test_indices_that_are_no_permutations(worker: Worker) -> None:
    peer = Peer(worker, MODEL)
    config = peer.model.config
    peer.reserve(1)
    good = random_indices(config, 8)
    for value in (-1, HEAD_DIM, 1 << 30, -(1 << 31), good[1, 1, 0, 4]):
        spoiled = good.copy()
        spoiled[1, 1, 0, 3] = value
        with pytest.raises(InvalidArgumentError, match="permutation"):
            permute(peer, 1, spoiled)
    for shape in ((3, 2, 2, HEAD_DIM + 1), (3, 2, 2 * HEAD_DIM), (4, 2, 2, HEAD_DIM), (2, 2, 2, HEAD_DIM)):
        with pytest.raises(InvalidArgumentError, match="tensor"):
            permute(peer, 1, np.zeros(shape, np.int32))
    permute(peer, 1, good)
