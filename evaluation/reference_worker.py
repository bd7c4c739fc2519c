"""The process behind a `transformers` row: the library itself, as fast as it decodes greedily, on a Unix socket.

Started by reference.py. Requests and answers are lines of JSON. {"prompts": [[id, ...], ...], "room": n}, of prompts
of equal lengths, gives one line of token ids, the first of each answer; {"tokens": n} then gives n more lines, one for
each step. {"tune": ...} with the same prompts finds out which way to decode is the fastest for such a batch.

What was tried for speed, and is used or not: inference mode; logits of the last row only; scaled dot product attention
(eager is slower); a cache that grows, a static one, or a static one and decode steps compiled by torch.compile: the
fastest for a batch, measured beforehand. (On two cores compiling did nothing for bfloat16 and saved int8 a sixth.)
int8 is weight-only: every linear, the head too, is replaced by `torch._weight_int8pack_mm` over our own integers. It is
fastest with bfloat16 activations (five times slower with float32), and slow for many rows: from PACKED_ROWS on, weights
are turned into bfloat16 for each product instead.
"""

import argparse
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from wire.lifetime import die_with_parent
from wire.quantize import quantize_rows

SPIN_COUNT = "2000"  # of waiting OpenMP threads, as the GPU worker has it
PACKED_ROWS = 20
TUNING_STEPS = 12
MOST_SHAPES = 64  # that are compiled, of batches and lengths
WAYS = DYNAMIC, STATIC, COMPILED = "dynamic", "static", "compiled"


def main() -> None:
    """Serve one connection. Exit status 2 and one line on stderr for a model that the library does not have."""
    options = _parse()
    die_with_parent(options.parent)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    folder = Path(options.socket).parent / "compiled"
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no more processes
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    import torch

    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        generator = Generator(
            load(options.model, options.precision, device), torch, WAYS[: 3 if options.compile else 2]
        )
        with socket.create_server(options.socket, family=socket.AF_UNIX) as server:
            print("serving", flush=True)
            connection, _ = server.accept()
            with connection, connection.makefile("rw") as file:
                serve(file, generator)


class Generator:
    """Greedy decoding of a batch, token by token, over a cache of keys and values."""

    def __init__(self, model: Any, torch: Any, ways: Sequence[str]) -> None:
        self._model, self._torch, self._ways = model, torch, ways
        self._compiled = torch.compile(model, dynamic=False)  # at its first call, and for every new shape
        self._best: dict[tuple[int, int], str] = {}  # by batch and length of its prompts

    def begin(self, prompts: list[list[int]], room: int, way: str = "") -> list[int]:
        """The first token of each answer. `room`: tokens that follow, at most. `way`: of WAYS, if not the best."""
        self._last = self._torch.tensor(prompts, device=self._model.device)
        shape = len(prompts), len(prompts[0])
        self._way = way or self._best.get(shape, self._ways[0])
        self._cache = self._new_cache(self._way, shape[1] + room + 1)
        return self._next(self._model)

    def step(self) -> list[int]:
        """The next token of each answer."""
        return self._next(self._compiled if self._way == COMPILED else self._model)

    def _next(self, forward: Callable[..., Any]) -> list[int]:
        found = forward(self._last, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._last = found.logits[:, -1].argmax(-1, keepdim=True)
        tokens: list[int] = self._last[:, 0].tolist()
        return tokens

    def tune(self, prompts: list[list[int]], room: int) -> str:
        """The way whose fastest step is the fastest; it is used for such batches from now on."""
        times = {way: self._fastest(prompts, room, way) for way in self._ways}
        best = self._best[len(prompts), len(prompts[0])] = min(times, key=lambda way: times[way])
        return best

    def _fastest(self, prompts: list[list[int]], room: int, way: str) -> float:
        """Seconds of a step; infinite where there is no compiler."""
        self.begin(prompts, room, way)
        try:
            return min(self._timed() for _ in range(min(room, TUNING_STEPS)))
        except self._torch._dynamo.exc.TorchDynamoException as error:
            print(f"torch.compile: {type(error).__name__}", file=sys.stderr)
            return math.inf

    def _timed(self) -> float:
        started = time.perf_counter()
        self.step()
        return time.perf_counter() - started

    def _new_cache(self, way: str, size: int) -> Any:
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        return DynamicCache(config=config) if way == DYNAMIC else StaticCache(config=config, max_cache_len=size)


def serve(file: Any, generator: Generator) -> None:
    """Answer requests until there are no more."""
    for line in file:
        for answer in _answers(generator, **json.loads(line)):
            file.write(json.dumps(answer) + "\n")
            file.flush()


def _answers(
    generator: Generator,
    prompts: list[list[int]] | None = None,
    tune: list[list[int]] | None = None,
    room: int = 0,
    tokens: int = 0,
) -> Iterator[Any]:
    if tune:
        yield generator.tune(tune, room)
    if prompts:
        yield generator.begin(prompts, room)
    for _ in range(tokens):
        yield generator.step()


def load(folder: Path, precision: str, device: str) -> Any:
    """A causal language model of the library, from a local folder: float32, bfloat16, or int8 weight-only."""
    import torch
    import transformers

    raw = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, raw["architectures"][0], None)
    if kind is None:
        print(f"transformers has no {raw['architectures'][0]}", file=sys.stderr)
        sys.exit(2)
    element = torch.float32 if precision == "float32" else torch.bfloat16
    config = kind.config_class(**raw)
    model = kind.from_pretrained(folder, config=config, dtype=element, attn_implementation="sdpa").eval()
    if precision == "int8":
        _quantize(model, torch, transformers.pytorch_utils.Conv1D)
    return model.to(device)


def _quantize(model: Any, torch: Any, conv: Any) -> None:
    """Every linear becomes an int8 one. `conv`: GPT-2's linear, whose matrix is turned around."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, _packed(torch, child.weight, child.bias))
            elif isinstance(child, conv):
                setattr(parent, name, _packed(torch, child.weight.T, child.bias))


def _packed(torch: Any, weight: Any, bias: Any) -> Any:
    integers, scales = (torch.from_numpy(part) for part in quantize_rows(weight.detach().float().numpy()))
    module = torch.nn.Module()
    module.register_buffer("integers", integers)
    module.register_buffer("scales", scales.bfloat16())
    module.bias, module.in_features, module.out_features = bias, integers.shape[1], integers.shape[0]
    module.forward = _forward(torch, module)
    return module


def _forward(torch: Any, module: Any) -> Callable[[Any], Any]:
    def forward(x: Any) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < PACKED_ROWS:
            y = torch._weight_int8pack_mm(rows, module.integers, module.scales)
        else:
            y = torch.nn.functional.linear(rows, module.integers.bfloat16()) * module.scales
        y = y.view(*x.shape[:-1], -1)
        return y if module.bias is None else y + module.bias

    return forward


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--precision", choices=("float32", "bfloat16", "int8"), required=True)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--compile", action="store_true", help="try torch.compile, too")
    parser.add_argument("--parent", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
