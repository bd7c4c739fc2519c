"""Valid calls of every operation, for the fuzzer to start from, and where a stream stands after them."""

from random import Random
from typing import Any

import numpy as np

from gpu_worker import steps
from tests.fuzz.mutate import WORDS
from wire.codec import Array, header_of
from wire.kv_pages import PAGE_TOKENS, KvType, page_words
from wire.linears import all_specs
from wire.model_config import ModelConfig
from wire.parameters import parameters
from wire.v1 import gpu_worker_pb2 as pb

Made = tuple[pb.Operation, Array | None]


class Calls:
    """Draws calls that are valid where the stream stands; `follow` what was carried out."""

    def __init__(self, random: Random, config: ModelConfig, float32: bool, ring_only: bool) -> None:
        self.random, self.config = random, config
        self.sequences: dict[int, tuple[int, KvType]] = {}  # reserved tokens and type, by number
        self._next, self._rows = 0, 0  # the step that comes next, and the rows of the pass
        self._filling: dict[Any, int] = {}
        self._ring_only = ring_only
        decoder = [self._forward, self._chain, self._chain, self._cache, self._cache]
        self._kinds = [self._ring, self._lookup] if ring_only else decoder
        self._kinds += [self._matmul, self._provision] if float32 else [self._matmul, self._ring, self._lookup]

    def draw(self) -> Made:
        """An operation and its tensor."""
        if self.random.random() < 0.02:
            return self.random.choice(
                (self._ring, self._lookup, self._matmul, self._forward, self._chain, self._provision, self._reserve)
            )()
        if not self._ring_only and len(self.sequences) < self.random.choice((1, 2, 3)):
            return self._reserve()
        return self.random.choice(self._kinds)()

    def follow(self, operation: pb.Operation) -> None:
        """This was carried out."""
        cache, action = operation.cache, operation.cache.WhichOneof("action")
        if action == "reserve":
            self.sequences[cache.sequence] = cache.reserve.tokens, KvType(cache.reserve.type)
        if action == "drop":
            self.sequences.pop(cache.sequence, None)
        if action is not None or operation.HasField("forward"):
            self._next = 0
        if operation.HasField("chain"):
            self._next = (steps.number(operation.chain.steps[-1], self.config) + 1) % (2 + 3 * self.config.layers)
            if operation.chain.steps[0].HasField("embed"):
                self._rows = sum(one.rows for one in operation.chain.steps[0].embed.sequences)

    def tensor(self, dtype: int, shape: tuple[int, ...]) -> Array:
        """Numbers of that dtype; some of them strange."""
        random, size = self.random, int(np.prod(shape))
        if dtype == 2:
            array: Any = np.frombuffer(random.randbytes(4 * size), "<i4") % self.config.vocabulary
        else:
            array = np.frombuffer(random.randbytes(4 * size), "<u4").astype(np.float32) / np.float32(1 << 31) - 1
        array = array.astype("<i4" if dtype == 2 else "<f4").reshape(shape)
        if random.random() < 0.2 and size:
            array.reshape(-1)[random.randrange(size)] = np.frombuffer(random.choice(WORDS), array.dtype)[0]
        made: Array = array
        return made

    def _ring(self) -> Made:
        of = self.random.choice(all_specs(self.config))
        made = pb.Operation(ring_matmul=pb.RingMatmul(layer=of.layer, linear=of.linear.number))
        return made, self.tensor(2, (self.random.choice((1, 1, 2, 5)), of.k))

    def _lookup(self) -> Made:
        rows = self.random.choice((1, 1, 2, 5))
        return pb.Operation(ring_lookup=pb.RingLookup()), self.tensor(2, (rows, self.config.vocabulary))

    def _matmul(self) -> Made:
        of = self.random.choice(all_specs(self.config))
        made = pb.Operation(matmul=pb.Matmul(layer=of.layer, linear=of.linear.number))
        return made, self.tensor(1, (self.random.choice((1, 1, 2, 5)), of.k))

    def _spans(self) -> list[pb.SequenceRows]:
        names = list(self.sequences) or [1]
        chosen = self.random.sample(names, self.random.randint(1, min(len(names), 3)))
        return [pb.SequenceRows(sequence=one, rows=self.random.choice((1, 1, 2, 3))) for one in chosen]

    def _forward(self) -> Made:
        spans = self._spans()
        rows = sum(span.rows for span in spans)
        wanted = sorted(self.random.sample(range(rows), self.random.randint(0, rows)))
        return pb.Operation(forward=pb.Forward(sequences=spans, logit_rows=wanted)), self.tensor(2, (rows,))

    def _chain(self) -> Made:
        """What comes next in the pass, or a new one."""
        random, layers = self.random, self.config.layers
        first = self._next if self._next % 3 != 1 and random.random() < 0.9 else 0
        spans = self._spans()
        rows = self._rows if first else sum(span.rows for span in spans)
        ends = [n for n in range(first, min(first + 4, 2 + 3 * layers)) if n % 3 in (1, 2) and n]
        made: list[pb.Step] = []
        for number in range(first, random.choice(ends) + 1):
            layer, kind = divmod(number - 1, 3)
            if number == 0:
                made.append(pb.Step(embed=pb.Embed(sequences=spans)))
            elif layer == layers:
                made.append(pb.Step(head=pb.Head(logit_rows=range(random.randint(0, rows)))))
            else:
                made.append(_step(kind, layer))
        width = self.config.q_width + (self.config.kv_width if first % 3 == 2 else 0)
        tensor = self.tensor(1, (rows, width)) if first else self.tensor(2, (rows,))
        return pb.Operation(chain=pb.Chain(steps=made)), tensor

    def _provision(self) -> Made:
        """The next rows of a parameter; from 0 when all of them are there."""
        name, parameter = self.random.choice(list(parameters(self.config).items()))
        first = self._filling.get(name, 0) % parameter.rows
        rows = self.random.choice((1, parameter.rows - first, parameter.rows - first))
        self._filling[name] = first + rows
        made = pb.Provision(layer=name.layer, bias=name.bias, first_row=first)
        made.kind = name.kind.number
        if name.linear is not None:
            made.linear = name.linear.number
        return pb.Operation(provision=made), self.tensor(1, (rows, parameter.width))

    def _reserve(self) -> Made:
        kind, tokens = self.random.choice(list(KvType)), self.random.choice((1, 4, 20, 65, 192))
        number = self.random.choice((0, 1, 2, 3, 7, (1 << 32) - 1, (1 << 64) - 1))
        made = pb.Cache(sequence=number, reserve=pb.Reserve(tokens=tokens, type=kind.number))
        return pb.Operation(cache=made), None

    def _cache(self) -> Made:  # noqa: PLR0911
        random, config = self.random, self.config
        if not self.sequences:
            return self._reserve()
        number = random.choice(list(self.sequences))
        tokens, kind = self.sequences[number]
        layer, page = random.randrange(config.layers), random.randrange(-(-tokens // PAGE_TOKENS))
        match random.randrange(6):
            case 0:
                return self._reserve()
            case 1:
                return pb.Operation(cache=pb.Cache(sequence=number, drop=pb.Drop())), None
            case 2:
                shape = (config.layers, 2, config.kv_heads, config.head_dim)
                order = [random.sample(range(shape[3]), shape[3]) for _ in range(shape[0] * 2 * shape[2])]
                made = pb.Cache(sequence=number, permute=pb.Permute())
                return pb.Operation(cache=made), np.array(order, np.int32).reshape(shape)
            case 3:
                made = pb.Cache(sequence=number, read=pb.ReadPage(layer=layer, page=page))
                return pb.Operation(cache=made), None
            case 4:
                made = pb.Cache(sequence=number, write=pb.WritePage(layer=layer, page=page))
                return pb.Operation(cache=made), self.tensor(2, (page_words(config, kind),))
            case _:
                return pb.Operation(cache=pb.Cache(sequence=number, wipe=pb.Wipe())), None


def frames(number: int, operation: pb.Operation, array: Array | None, cuts: int) -> list[pb.ExecuteRequest]:
    """A call in 1 + `cuts` frames, as far as it has bytes for them."""
    head = pb.ExecuteRequest(id=number, operation=operation)
    if array is None:
        return [head]
    head.header.CopyFrom(header_of(array))
    data = array.tobytes()
    size = max(-(-len(data) // (1 + cuts)), 1)
    parts = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    head.data = parts[0]
    return [head, *[pb.ExecuteRequest(id=number, data=part) for part in parts[1:]]]


def _step(kind: int, layer: int) -> pb.Step:
    if kind == 0:
        return pb.Step(project_qkv=pb.ProjectQkv(layer=layer))
    return pb.Step(attend=pb.Attend(layer=layer)) if kind == 1 else pb.Step(finish_block=pb.FinishBlock(layer=layer))
