"""A pass in any cuts gives what Forward gives; what is out of order is refused; what is given up leaves nothing."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gpu_worker.worker import Worker
from tests.gpu_worker.calling import HEAD_DIM, HIDDEN, MODEL, QK_WIDTH, TIED, VOCABULARY
from tests.gpu_worker.peer import F32, Peer, Rows, attend, embed, finish, flat, head, project
from wire.errors import ContextError, InvalidArgumentError
from wire.kv_pages import KvType
from wire.v1 import gpu_worker_pb2 as pb

PROMPT = [3, 141, 59, 26, 5, 200, 260, 0, 17, 17, 99]
LAYERS = 3


def inside(peer: Peer, rows: Rows) -> F32:
    """Attention crosses and comes back; q and k stay inside."""
    a = peer.chain([embed(rows), project(0), attend(0)], flat(rows))
    for layer in range(1, LAYERS):
        a = peer.chain([finish(layer - 1), project(layer), attend(layer)], a)
    return peer.chain([finish(LAYERS - 1), head(range(len(a)))], a)


def outside(peer: Peer, rows: Rows) -> F32:
    """q beside k crosses and comes back final; attention stays inside."""
    turn = rotation(peer, rows)
    qk = turn(0, peer.chain([embed(rows), project(0)], flat(rows)))
    for layer in range(1, LAYERS):
        qk = turn(layer, peer.chain([attend(layer - 1), finish(layer - 1), project(layer)], qk))
    return peer.chain([attend(LAYERS - 1), finish(LAYERS - 1), head(range(len(qk)))], qk)


def everything(peer: Peer, rows: Rows) -> F32:
    """Each crossing there is."""
    turn, x = rotation(peer, rows), [embed(rows)]
    given = flat(rows)
    for layer in range(LAYERS):
        qk = turn(layer, peer.chain([*x, project(layer)], given))
        given, x = peer.chain([attend(layer)], qk), [finish(layer)]  # type: ignore[assignment]
    return peer.chain([*x, head(range(len(given)))], given)


def four_steps(peer: Peer, rows: Rows) -> F32:
    """The longest chains: q and k by the peer in even layers."""
    turn = rotation(peer, rows)
    qk = turn(0, peer.chain([embed(rows), project(0)], flat(rows)))
    a = peer.chain([attend(0), finish(0), project(1), attend(1)], qk)
    qk = turn(2, peer.chain([finish(1), project(2)], a))
    return peer.chain([attend(2), finish(2), head(range(len(qk)))], qk)


def rotation(peer: Peer, rows: Rows) -> Callable[[int, F32], F32]:
    """The peer's own norm and RoPE of q and k, for the positions that come next."""
    decoder = peer.model.decoder
    assert decoder is not None
    lengths = [peer.stream._caches.get(sequence, peer.model.config).length for sequence in rows]
    places = [torch.arange(at, at + len(ids)) for at, ids in zip(lengths, rows.values(), strict=True)]
    rotations = decoder.rotations(torch.cat(places))

    def turn(layer: int, qk: F32) -> F32:
        with torch.inference_mode():
            q, k = decoder.finish_qk(layer, torch.from_numpy(qk.copy()), rotations)
            final: F32 = torch.cat([q.flatten(1), k.flatten(1)], dim=1).numpy()
        return final

    return turn


def close(got: F32, expected: F32, bound: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < bound * np.abs(expected).max()


@pytest.mark.parametrize("cut", [inside, outside, everything, four_steps])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "chatglm3", "mistral"])
def test_any_cut_equals_forward_in_mixed_batches(worker: Worker, name: str, cut: Callable[[Peer, Rows], F32]) -> None:
    peer = Peer(worker, name)
    peer.reserve(1, 2, 3)
    whole = peer.forward({3: PROMPT})
    close(cut(peer, {1: PROMPT[:4]}), whole[:4])
    mixed = cut(peer, {2: PROMPT[:6], 1: PROMPT[4:5]})
    close(mixed, np.concatenate([whole[:6], whole[4:5]]))
    mixed = cut(peer, {1: PROMPT[5:], 2: PROMPT[6:9]})
    close(mixed, np.concatenate([whole[5:], whole[6:9]]))
    close(peer.forward({2: PROMPT[9:]}), whole[9:])


@pytest.mark.parametrize("precision", [pb.PRECISION_FLOAT32, pb.PRECISION_INT8])
@pytest.mark.parametrize("kind", list(KvType))
def test_a_chain_equals_forward_in_each_precision(worker: Worker, precision: int, kind: KvType) -> None:
    peer = Peer(worker, TIED, precision)
    peer.reserve(1, 2, kind=kind)
    close(inside(peer, {1: PROMPT}), peer.forward({2: PROMPT}))
    close(inside(peer, {1: [8]}), peer.forward({2: [8]}))


def test_logits_of_some_rows_and_of_none(worker: Worker) -> None:
    peer, rows = Peer(worker, MODEL), {1: PROMPT}
    peer.reserve(1, 2)
    whole = peer.forward({2: PROMPT})
    a = peer.chain([embed(rows), project(0), attend(0)], flat(rows))
    a = peer.chain([finish(0), project(1), attend(1)], a)
    a = peer.chain([finish(1), project(2), attend(2)], a)
    none = peer.chain([finish(2), head([])], a)
    assert none.shape == (0, VOCABULARY)
    peer.cache(2, drop=pb.Drop())
    peer.reserve(2)
    peer.forward({2: PROMPT}, [])
    close(peer.forward({1: [9]}), peer.forward({2: [9]}))
    peer.reserve(3)
    close(peer.forward({3: PROMPT}, [10, 2]), whole[[10, 2]])


def begun(peer: Peer, rows: Rows) -> F32:
    """A pass that waits for FinishBlock of layer 0."""
    return peer.chain([embed(rows), project(0), attend(0)], flat(rows))


OUT_OF_ORDER: dict[str, Sequence[pb.Step]] = {
    "another layer": [finish(1), project(2)],
    "a step too early": [finish(2), head([0])],
    "the same again": [attend(0)],
    "a step left out": [attend(1), finish(1), project(2)],
}


@pytest.mark.parametrize("steps", OUT_OF_ORDER.values(), ids=OUT_OF_ORDER)
def test_a_chain_goes_on_where_the_pass_is(worker: Worker, steps: Sequence[pb.Step]) -> None:
    peer = Peer(worker, MODEL)
    peer.reserve(1)
    begun(peer, {1: PROMPT})
    width = QK_WIDTH if steps[0].HasField("attend") else HIDDEN
    with pytest.raises(InvalidArgumentError, match="go on where"):
        peer.chain(steps, np.zeros((len(PROMPT), width), np.float32))


def test_a_pass_has_as_many_rows_as_it_began_with(worker: Worker) -> None:
    peer = Peer(worker, MODEL)
    peer.reserve(1)
    a = begun(peer, {1: PROMPT})
    with pytest.raises(InvalidArgumentError, match="11 rows"):
        peer.chain([finish(0), project(1)], a[:-1])


def test_there_is_no_pass_before_embed_nor_after_head(worker: Worker) -> None:
    peer = Peer(worker, MODEL)
    peer.reserve(1)
    a = np.zeros((1, HIDDEN), np.float32)
    with pytest.raises(InvalidArgumentError, match="begins with Embed"):
        peer.chain([finish(0), project(1)], a)
    inside(peer, {1: [5]})
    with pytest.raises(InvalidArgumentError, match="begins with Embed"):
        peer.chain([finish(2), head([0])], a)


def _every_dim_in_place() -> npt.NDArray[np.int32]:
    return np.tile(np.arange(HEAD_DIM, dtype=np.int32), (LAYERS, 2, 2, 1))


GIVING_UP: dict[str, Callable[[Peer], object]] = {
    "Embed": lambda peer: begun(peer, {2: [7]}),
    "Forward": lambda peer: peer.forward({2: [7]}),
    "Drop": lambda peer: peer.cache(1, drop=pb.Drop()),
    "ReadPage": lambda peer: peer.cache(1, read=pb.ReadPage()),
    "WritePage": lambda peer: peer.cache(1, peer.cache(2, read=pb.ReadPage()), write=pb.WritePage()),
    "Wipe": lambda peer: peer.cache(1, wipe=pb.Wipe()),
    "Permute": lambda peer: peer.cache(1, _every_dim_in_place(), permute=pb.Permute()),
}


@pytest.mark.parametrize("act", GIVING_UP.values(), ids=GIVING_UP)
def test_what_gives_up_a_pass(worker: Worker, act: Callable[[Peer], object]) -> None:
    peer = Peer(worker, MODEL)
    peer.reserve(1, 2)
    a = begun(peer, {1: PROMPT})
    act(peer)
    with pytest.raises(InvalidArgumentError, match=r"begins with Embed|has 1 rows"):
        peer.chain([finish(0), project(1)], a)


def test_a_pass_that_was_given_up_leaves_no_tokens(worker: Worker) -> None:
    peer = Peer(worker, MODEL)
    peer.reserve(1, 2, tokens=len(PROMPT))
    begun(peer, {1: [200, 100, 7]})
    close(inside(peer, {1: PROMPT}), peer.forward({2: PROMPT}))
    with pytest.raises(ContextError):
        begun(peer, {1: [4]})


def test_other_sequences_do_not_disturb_a_pass(worker: Worker) -> None:
    peer = Peer(worker, MODEL)
    peer.reserve(1, 2)
    expected = inside(peer, {2: PROMPT})
    a = begun(peer, {1: PROMPT})
    peer.cache(2, wipe=pb.Wipe())
    peer.reserve(3)
    peer.cache(3, drop=pb.Drop())
    a = peer.chain([finish(0), project(1), attend(1)], a)
    a = peer.chain([finish(1), project(2), attend(2)], a)
    close(peer.chain([finish(2), head(range(len(a)))], a), expected)


def test_a_pass_ends_with_its_model(worker: Worker) -> None:
    peer = Peer(worker, MODEL)
    peer.reserve(1)
    a = begun(peer, {1: PROMPT})
    worker.load(TIED, pb.PRECISION_FLOAT32)
    with pytest.raises(InvalidArgumentError, match="begins with Embed"):
        peer.chain([finish(0), project(1)], a)
