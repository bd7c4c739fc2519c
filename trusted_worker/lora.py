"""A LoRA adapter (Hu et al. 2021), from PEFT's files to y += (x . A^T) . B^T * scale beside the model's own products.

Paper: SecureInfer (arXiv 2510.19979) keeps adapters in the TEE: the GPU worker multiplies with public weights only.

What the GPU worker sees: nothing of A, B or the rank. Its requests are as many and as large as without an adapter.
What it learns: from how long it waits between two requests, about how large the adapter is.
What breaks it: side channels of the TEE, and the answers: whoever may ask the adapted model can imitate it. Under
`split` activations cross in the clear, and what an adapter changed can be solved for from enough of them.
An adapter is as hostile as the client that sent it: what it says is checked before it is used, and a refusal names a
field, a module or a tensor. Values may still be absurd: a result out of bounds ends its own session, and no other.

Steps, by the numbers beside the code:
 1. Read the configuration: which modules of the model, which rank and scale. All that is not plain LoRA is refused.
 2. Check that the file has exactly A and B of these modules, and copy them into the arena as float32, B times scale.
 3. Add to what the worker's product gave, row by row, so that a row's bits do not depend on the rows beside it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from trusted_worker.arithmetic import F32
from trusted_worker.secure_memory import Scratch
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError, InvalidArgumentError
from wire.linears import Linear, LinearSpec, spec
from wire.model_config import ModelConfig
from wire.parameters import Kind, parameters
from wire.scratch import ADAPTED_ROWS, MAX_RANK

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 18
MAX_DELTA = float(1 << 15)  # norm of what one row of one module may gain: below the largest float16
_PIECE = 1 << 15  # elements of the file that are converted at a time
_LINE = 16  # float32 of a cache line
_READ = ("r", "lora_alpha", "use_rslora", "target_modules")
_ALLOWED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # others change the base model's weights too
}
_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
)  # fmt: skip


@dataclass(frozen=True)
class Module:
    """A linear layer as PEFT sees it: these output rows of one of our linears."""

    name: str
    of: LinearSpec
    start: int
    stop: int


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter applies to, in the order of the model, and how."""

    modules: tuple[Module, ...]
    rank: int
    scale: float

    @property
    def linears(self) -> list[tuple[LinearSpec, list[Module]]]:
        """The modules of each linear."""
        return [(of, list(found)) for of, found in groupby(self.modules, lambda module: module.of)]

    @property
    def floats(self) -> int:
        """float32 that they take here, each matrix on a cache line of its own."""
        downs = sum(_lines(self.rank * len(found) * of.k) for of, found in self.linears)
        return downs + sum(_lines(self.rank * (one.stop - one.start)) for one in self.modules)


def read_config(raw: bytes, config: ModelConfig) -> LoraConfig:
    """Step 1, from a PEFT adapter_config.json. Raises InvalidArgumentError for all but plain LoRA on this model."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise InvalidArgumentError(f"{CONFIG} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{CONFIG} is not JSON") from error
    if not isinstance(fields, dict):
        raise InvalidArgumentError(f"{CONFIG} is not a JSON object")
    _check_fields(fields, config)
    rank, alpha, rslora = fields.get("r", 0), fields.get("lora_alpha", 0), fields.get("use_rslora", False)
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise InvalidArgumentError(f"{CONFIG}: r must be an integer from 1 to {MAX_RANK}")
    if type(alpha) not in (int, float) or not 0 < alpha < 1e6:
        raise InvalidArgumentError(f"{CONFIG}: lora_alpha must be a positive number below 1000000")
    if not isinstance(rslora, bool):
        raise InvalidArgumentError(f"{CONFIG}: use_rslora must be true or false")
    scale = float(alpha) / (rank**0.5 if rslora else rank)
    return LoraConfig(_targets(fields.get("target_modules"), config), rank, scale)


def _check_fields(fields: dict[str, Any], config: ModelConfig) -> None:
    allowed = _ALLOWED | {"fan_in_fan_out": (False, config.names.transposed)}
    for key, value in ({"peft_type": None} | fields).items():
        if key in allowed:
            fine = value in allowed[key]
        else:
            fine = key in _READ or key in _WITHOUT_EFFECT or value is None or value is False or value in ("", [], {})
        if not fine:
            raise InvalidArgumentError(f"{CONFIG}: {shown(key)} has a value that is not supported: only plain LoRA is")


def _targets(names: object, config: ModelConfig) -> tuple[Module, ...]:
    """As PEFT matches them: a name is a module's whole path, or what follows one of the path's dots."""
    modules = list(_modules(config))
    if names == "all-linear":
        return tuple(modules)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InvalidArgumentError(
            f'{CONFIG}: target_modules must be a list of names, or "all-linear"; a pattern is not supported'
        )
    endings: dict[str, set[Module]] = {}
    for module in modules:
        path = module.name.split(".")
        for first in range(len(path)):
            endings.setdefault(".".join(path[first:]), set()).add(module)
    chosen: set[Module] = set()
    for name in set(names):
        if name not in endings:
            raise InvalidArgumentError(
                f"{CONFIG}: target module {shown(name)} is no linear of this model's layers; the head and the "
                "embeddings cannot be adapted"
            )
        chosen |= endings[name]
    return tuple(module for module in modules if module in chosen)


def _modules(config: ModelConfig) -> Iterator[Module]:
    """All that can be adapted, in the order of the model."""
    for parameter in parameters(config).values():
        name = parameter.name
        if name.kind is Kind.LINEAR and not name.bias and name.linear not in (None, Linear.LM_HEAD):
            of, first = spec(config, name.layer, Linear(name.linear)), 0
            for tensor, rows in parameter.tensors:
                yield Module(tensor.removesuffix(".weight"), of, first, first + rows)
                first += rows


def shown(name: str) -> str:
    """A client's name for something, if it is fit for an error's text."""
    return name if re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", name) else "(a name that cannot be shown)"


class LowRank:
    """What an adapter adds to one linear: A of all its modules, one below the other, and B^T of each."""

    def __init__(self, a: F32, b: list[tuple[slice, F32]]) -> None:
        """`a` is float32[modules * r, k]; `b` has the output rows of each module and its float32[r, rows]."""
        self.a, self.b = a, b

    def add(self, x: F32, y: F32, scratch: Scratch) -> bool:
        """Step 3: x float32[m, k] through A and B onto y float32[m, n]. False, and y is junk, if it is out of bounds.

        numpy multiplies stacked rows one at a time, each like a row that is alone.
        """
        bounded, ranks = True, len(self.a) // len(self.b)
        for first in range(0, len(x), ADAPTED_ROWS):
            some, onto = x[first : first + ADAPTED_ROWS, None], y[first : first + ADAPTED_ROWS]
            with scratch.frame():
                down: F32 = scratch.empty((len(some), 1, len(self.a)), np.float32)
                np.matmul(some, self.a.T, out=down)
                delta: F32 = scratch.empty((len(some), 1, y.shape[1]), np.float32)
                for number, (rows, b) in enumerate(self.b):
                    added = np.matmul(down[..., number * ranks : (number + 1) * ranks], b, out=delta[..., rows])[:, 0]
                    bounded &= bool((np.einsum("mn,mn->m", added, added) <= MAX_DELTA**2).all())  # False for NaN
                    onto[:, rows] += added
        return bounded


def place(config: LoraConfig, floats: F32) -> dict[LinearSpec, LowRank]:
    """The matrices of an adapter as parts of float32[config.floats]."""
    placed, at = {}, 0

    def take(rows: int, columns: int) -> F32:
        nonlocal at
        first, at = at, at + _lines(rows * columns)
        return floats[first : first + rows * columns].reshape(rows, columns)

    for of, modules in config.linears:
        a = take(config.rank * len(modules), of.k)
        b = [(slice(one.start, one.stop), take(config.rank, one.stop - one.start)) for one in modules]
        placed[of] = LowRank(a, b)
    return placed


def fill(placed: dict[LinearSpec, LowRank], config: LoraConfig, file: Checkpoint) -> None:
    """Step 2. Raises InvalidArgumentError, CheckpointError."""
    _check_names(file.names, {_tensor(module, part) for module in config.modules for part in "AB"})
    for of, modules in config.linears:
        low = placed[of]
        for number, (module, (_, b)) in enumerate(zip(modules, low.b, strict=True)):
            a = low.a[number * config.rank : (number + 1) * config.rank]
            _copy(file, _tensor(module, "A"), a, np.float32(1))
            _copy(file, _tensor(module, "B"), b.T, np.float32(config.scale))


def _tensor(module: Module, part: str) -> str:
    return f"base_model.model.{module.name}.lora_{part}.weight"


def _check_names(found: set[str], wanted: set[str]) -> None:
    if wanted - found:
        raise InvalidArgumentError(f"{WEIGHTS}: tensor {min(wanted - found)} is missing")
    if found - wanted:
        raise InvalidArgumentError(f"{WEIGHTS}: tensor {shown(min(found - wanted))} belongs to no target module")


def _copy(file: Checkpoint, tensor: str, into: F32, scale: np.float32) -> None:
    rows, width = into.shape
    step = max(1, _PIECE // width)
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        piece = file.read_rows(tensor, (rows, width), first, stop)
        with np.errstate(over="ignore"):
            np.multiply(piece, scale, out=into[first:stop])
    with np.errstate(over="ignore"):
        square = np.dot(into.ravel(order="K"), into.ravel(order="K"))
    if not np.isfinite(square):
        raise CheckpointError(f"{WEIGHTS}: tensor {tensor} is too large for its scale")


def _lines(count: int) -> int:
    return -(-count // _LINE) * _LINE
