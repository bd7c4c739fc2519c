"""Uploads of LoRA adapters to the tiny llama: valid ones, and ones with something wrong in any layer of them."""

import json
from random import Random
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.fuzz.mutate import Mutator
from wire.v1 import trusted_worker_pb2 as pb

RANKS = (1, 2, 8)
PIECES = (500, 4000, 1 << 16)  # bytes
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2.0, 1e308, float("nan"), float("inf"), 1 << 40, 1 << 70, "", "2", "F64", "all-linear",
    "(q_proj", "q_proj", [], ["nothing"], ["q_proj", "q_proj"], [[0]], [16], [0, 1 << 62], [-8, 8], {}, {"a": {"r": 1}},
)  # fmt: skip
KEYS = (
    "r", "lora_alpha", "use_rslora", "target_modules", "peft_type", "task_type", "bias", "fan_in_fan_out", "use_dora",
    "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "exclude_modules", "lora_dropout", "x",
)  # fmt: skip
CONFIGS = (b"", b"{}", b"[]", b"\xff", b"[" * 50_000, b'{"r":' * 20_000, b'{"r": ' + b"9" * 5_000 + b"}")


def adapter(rank: int) -> tuple[bytes, bytes]:
    """adapter_config.json and adapter_model.safetensors of q_proj and o_proj."""
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "o_proj"]}
    random, tensors = np.random.default_rng(rank), {}
    for layer in range(2):
        for module in ("q_proj", "o_proj"):
            start = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{start}.lora_A.weight"] = random.normal(0, 0.1, (rank, 16)).astype(np.float32)
            tensors[f"{start}.lora_B.weight"] = random.normal(0, 0.1, (16, rank)).astype(np.float32)
    return json.dumps(config).encode(), save(tensors)


def valid(random: Random) -> list[bytes]:
    """The messages of an upload that has nothing wrong."""
    config, weights = adapter(random.choice(RANKS))
    made = requests(config, weights, len(weights), random.choice(PIECES))
    return [one.SerializeToString() for one in made]


def requests(config: bytes, weights: bytes, size: int, piece: int) -> list[pb.UploadRequest]:
    """The messages of an upload; the first one has the first piece."""
    pieces = [weights[at : at + piece] for at in range(0, len(weights), piece)] or [b""]
    first = pb.UploadRequest(config=config, weights_size=size, weights=pieces[0])
    return [first, *[pb.UploadRequest(weights=one) for one in pieces[1:]]]


def spoilt(random: Random, mutator: Mutator) -> list[bytes]:
    """The messages of an upload with something wrong."""
    config, weights = adapter(random.choice(RANKS))
    size, way = len(weights), random.random()
    if way < 0.3:
        config = _config(random, mutator, config)
    elif way < 0.6:
        weights = _header(random, mutator, weights)
        size = len(weights)
    elif way < 0.7:
        weights = weights[:-512] + mutator.words(weights[-512:])
    elif way < 0.8:
        size = random.choice((0, 7, 8, size - 1, size + 1, 2 * size, 48 << 10, 1 << 31, 1 << 32, (1 << 64) - 1))
    made = [one.SerializeToString() for one in requests(config, weights, size, random.choice(PIECES))]
    if way >= 0.8:
        place = random.randrange(len(made))
        made[place] = mutator.message(pb.UploadRequest.FromString(made[place]))
    if random.random() < 0.05:
        made.pop(random.randrange(len(made)))
    return made


def _config(random: Random, mutator: Mutator, config: bytes) -> bytes:
    way = random.random()
    if way < 0.1:
        return random.choice(CONFIGS)
    if way < 0.3:
        return mutator.raw(config)
    changed = json.loads(config)
    changed[random.choice(KEYS)] = random.choice(ODD)
    return json.dumps(changed).encode()


def _header(random: Random, mutator: Mutator, weights: bytes) -> bytes:
    """A safetensors file whose header is not right, its length among other things."""
    length = int.from_bytes(weights[:8], "little")
    raw, data = weights[8 : 8 + length], weights[8 + length :]
    if random.random() < 0.2:
        raw = random.choice((mutator.raw(raw), b"[" * 50_000, b""))
    else:
        header = json.loads(raw)
        name = random.choice(list(header))
        field = random.choice(("dtype", "shape", "data_offsets", ""))
        if field:
            header[name][field] = random.choice((*ODD, "F16", "BF16", "F32", [8, 16], [128], [1, 1, 16]))
        else:
            header[random.choice(("x", f"{name}.x", "__metadata__"))] = header.pop(name)
        raw = json.dumps(header).encode()
    said = len(raw) if random.random() < 0.9 else random.choice((0, len(raw) + 1, 1 << 20, 1 << 40, (1 << 64) - 1))
    return said.to_bytes(8, "little") + raw + data
