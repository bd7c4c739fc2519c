"""What tensor each operation takes, and the bounds of its fields: everything that needs no state to be checked.

Importing this file imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from gpu_worker import steps
from wire.codec import MAX_ROWS, MAX_TENSOR_BYTES
from wire.errors import InvalidArgumentError
from wire.kv_pages import KvType, page_words
from wire.linears import Linear, LinearSpec, spec
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, Parameter, parameters
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import tensor_pb2

INT32, FLOAT32 = tensor_pb2.DTYPE_INT32, tensor_pb2.DTYPE_FLOAT32

LOOKUP_ROWS = 64  # of one ring_lookup: a row is as wide as the vocabulary
KV_TYPES = frozenset(kind.number for kind in KvType)

_parameters = lru_cache(maxsize=4)(parameters)


@dataclass(frozen=True)
class Expected:
    """The tensor that an operation takes, and how large its answer may get."""

    dtype: int
    shape: tuple[int | None, ...]  # None, of the first extent: 1 to `most_rows`
    most_rows: int = MAX_ROWS
    answer_columns: int = 0  # 0: the answer needs no bound
    logit_rows: Sequence[int] | None = None  # rows of the answer, by their numbers; None: as many as the tensor has

    def check(self, header: tensor_pb2.TensorHeader) -> None:
        """Raises InvalidArgumentError for any other tensor."""
        shape = tuple(header.shape)
        if header.dtype != self.dtype or len(shape) != len(self.shape):
            raise InvalidArgumentError("the operation takes a tensor of another dtype or rank")
        if not 1 <= shape[0] <= self.most_rows:
            raise InvalidArgumentError(f"the tensor of this operation has 1 to {self.most_rows} rows")
        if self.shape[0] not in (None, shape[0]) or self.shape[1:] != shape[1:]:
            raise InvalidArgumentError("the operation takes a tensor of another shape")
        wanted_rows = self.logit_rows
        if wanted_rows is not None and (len(wanted_rows) > shape[0] or any(row >= shape[0] for row in wanted_rows)):
            raise InvalidArgumentError("logit row out of range")
        check_answer(shape[0] if wanted_rows is None else len(wanted_rows), self.answer_columns)


def expected_tensor(operation: pb.Operation, config: ModelConfig) -> Expected | None:
    """What tensor an operation takes; None when it takes none.

    Raises InvalidArgumentError for fields that are out of range.
    """
    match operation.WhichOneof("kind"):
        case "ring_matmul" | "matmul" as kind:
            op: pb.RingMatmul | pb.Matmul = getattr(operation, kind)
            of = _linear(config, op.layer, op.linear)
            return Expected(INT32 if kind == "ring_matmul" else FLOAT32, (None, of.k), answer_columns=of.n)
        case "ring_lookup":
            rows = min(LOOKUP_ROWS, MAX_TENSOR_BYTES // (4 * config.vocabulary))
            return Expected(INT32, (None, config.vocabulary), most_rows=rows, answer_columns=config.hidden)
        case "forward":
            rows = _rows(operation.forward.sequences)
            return Expected(INT32, (rows,), answer_columns=config.vocabulary, logit_rows=operation.forward.logit_rows)
        case "chain":
            return _chain(operation.chain.steps, config)
        case "provision":
            parameter, first = parameter_of(operation.provision, config), operation.provision.first_row
            if first >= parameter.rows:
                raise InvalidArgumentError(f"the parameter has {parameter.rows} rows only")
            return Expected(FLOAT32, (None, parameter.width), most_rows=parameter.rows - first)
        case _:
            return _cache(operation.cache, config)


def parameter_of(op: pb.Provision, config: ModelConfig) -> Parameter:
    """The parameter that an operation names. Raises InvalidArgumentError for one that the model does not have."""
    try:
        name = Name(Kind(op.kind), op.layer, Linear(op.linear) if op.linear else None, op.bias)
    except ValueError:
        raise InvalidArgumentError("unknown parameter") from None
    parameter = _parameters(config).get(name)
    if parameter is None:
        raise InvalidArgumentError("the model has no such parameter")
    return parameter


def check_answer(rows: int, columns: int) -> None:
    """Raises InvalidArgumentError for an answer of 32-bit elements that no tensor holds."""
    if 4 * rows * columns > MAX_TENSOR_BYTES:
        raise InvalidArgumentError("the answer would be larger than a tensor may be: ask for fewer rows")


def _linear(config: ModelConfig, layer: int, number: int) -> LinearSpec:
    try:
        linear = Linear(number)
    except ValueError:
        raise InvalidArgumentError("unknown linear") from None
    _check_layer(layer, 1 if linear is Linear.LM_HEAD else config.layers)
    return spec(config, layer, linear)


def _chain(chain: Sequence[pb.Step], config: ModelConfig) -> Expected:
    steps.check(chain, config)
    qk_width = config.q_width + config.kv_width
    columns = {"project_qkv": qk_width, "attend": config.q_width, "head": config.vocabulary}
    last = chain[-1].WhichOneof("kind") or ""
    logit_rows = chain[-1].head.logit_rows if last == "head" else None
    match chain[0].WhichOneof("kind"):
        case "embed":
            return Expected(INT32, (_rows(chain[0].embed.sequences),), answer_columns=columns[last])
        case "attend":
            return Expected(FLOAT32, (None, qk_width), answer_columns=columns[last], logit_rows=logit_rows)
        case _:
            return Expected(FLOAT32, (None, config.q_width), answer_columns=columns[last], logit_rows=logit_rows)


def _cache(op: pb.Cache, config: ModelConfig) -> Expected | None:
    match op.WhichOneof("action"):
        case "reserve":
            if op.reserve.tokens == 0 or op.reserve.type not in KV_TYPES:
                raise InvalidArgumentError("a cache is reserved for at least one token and of a known type")
        case "permute":
            shape = (config.layers, 2, config.kv_heads, config.head_dim)
            return Expected(INT32, shape, most_rows=config.layers)
        case "read":
            _check_layer(op.read.layer, config.layers)
            check_answer(1, page_words(config, KvType.FLOAT32))
        case "write":
            _check_layer(op.write.layer, config.layers)
            return Expected(INT32, (None,), most_rows=page_words(config, KvType.FLOAT32))
        case None:
            raise InvalidArgumentError("unknown cache action")
    return None


def _rows(sequences: Sequence[pb.SequenceRows]) -> int:
    if len(sequences) > MAX_ROWS:  # before they become objects
        raise InvalidArgumentError(f"a call has at most {MAX_ROWS} sequences")
    named = list(sequences)
    if len({s.sequence for s in named}) != len(named) or not all(s.rows for s in named):
        raise InvalidArgumentError("each sequence must be named once, with at least one row")
    return sum(s.rows for s in named)


def _check_layer(layer: int, layers: int) -> None:
    if layer >= layers:
        raise InvalidArgumentError("layer out of range")
