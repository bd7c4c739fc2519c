"""The process behind a `transformers` row: the library itself, as fast as it decodes greedily, on a Unix socket.

Started by reference.py. Requests and answers are lines of JSON. {"prompts": [[id, ...], ...], "room": n}, of prompts
of equal lengths, gives one line of token ids, the first of each answer; {"tokens": n} then gives n more lines, one for
each step. {"tune": ...} with the same prompts finds out which cache is faster for such a batch, and gives its name.

What was tried for speed, and is used or not: inference mode; logits of the last row only; scaled dot product attention
(eager is slower); a cache that grows, or a static one: whichever is faster for a batch, measured beforehand. int8 is
weight-only: every linear, the head too, is replaced by `torch._weight_int8pack_mm` over our own integers. It is fastest
with bfloat16 activations (five times slower with float32), and slow for many rows: from PACKED_ROWS on, weights are
turned into bfloat16 for each product instead.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wire.lifetime import die_with_parent
from wire.quantize import quantize_rows

SPIN_COUNT = "2000"  # of waiting OpenMP threads, as the GPU worker has it
PACKED_ROWS = 20
TUNING_STEPS = 12


def main() -> None:
    """Serve one connection. Exit status 2 and one line on stderr for a model that the library does not have."""
    options = _parse()
    die_with_parent(options.parent)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    import torch

    torch.set_num_threads(options.threads)
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        generator = Generator(load(options.model, options.precision, device), torch)
        with socket.create_server(options.socket, family=socket.AF_UNIX) as server:
            print("serving", flush=True)
            connection, _ = server.accept()
            with connection, connection.makefile("rw") as file:
                serve(file, generator)


class Generator:
    """Greedy decoding of a batch, token by token, over a cache of keys and values."""

    def __init__(self, model: Any, torch: Any) -> None:
        self._model, self._torch = model, torch
        self._best: dict[tuple[int, int], str] = {}  # by batch and length of its prompts

    def begin(self, prompts: list[list[int]], room: int, kind: str = "") -> list[int]:
        """The first token of each answer. `room`: tokens that follow, at most. `kind`: of cache, if not the best."""
        self._last = self._torch.tensor(prompts, device=self._model.device)
        shape = len(prompts), len(prompts[0])
        self._cache = self._new_cache(kind or self._best.get(shape, "dynamic"), shape[1] + room + 1)
        return self.step()

    def step(self) -> list[int]:
        """The next token of each answer."""
        found = self._model(self._last, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._last = found.logits[:, -1].argmax(-1, keepdim=True)
        tokens: list[int] = self._last[:, 0].tolist()
        return tokens

    def tune(self, prompts: list[list[int]], room: int) -> str:
        """The cache whose fastest step is the faster one; it is used for such batches from now on."""
        times: dict[str, float] = {}
        for kind in ("dynamic", "static"):
            self.begin(prompts, room, kind)
            times[kind] = min(self._timed() for _ in range(min(room, TUNING_STEPS)))
        best = self._best[len(prompts), len(prompts[0])] = min(times, key=lambda kind: times[kind])
        return best

    def _timed(self) -> float:
        started = time.perf_counter()
        self.step()
        return time.perf_counter() - started

    def _new_cache(self, kind: str, size: int) -> Any:
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        return StaticCache(config=config, max_cache_len=size) if kind == "static" else DynamicCache(config=config)


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
    parser.add_argument("--parent", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
