"""Train the captain's adapter: LoRA on the demo model, from the captain's text and nothing else.

    python -m models.demo.train_adapter

A batch depends on the seed and its step only. The adapter is written in PEFT's layout, in float16, into the folder
given by --out: adapter_config.json, with plain LoRA features only, and adapter_model.safetensors.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from models.demo.captain import ADAPTER, read_captain, read_own_held_out
from models.demo.corpus import FOLDER, normalise
from models.demo.train import IGNORED, Batches, rate_at

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS = (36, 36, 48, 48, 64, 64, 128, 256)  # most of them hold one whole exchange
OWN = 4  # so much more often than others the hand-written exchanges come


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ADAPTER, help="folder for the adapter")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a batch")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def make_batches(tokens: int, seed: int) -> Batches:
    """Return the batches of the captain's conversations, without any held-out question."""
    batches = Batches(read_captain(), Tokenizer.from_file(str(FOLDER / "tokenizer.json")), tokens, seed)
    batches.weights = [
        OWN * weight if one.topic == "captain" else weight
        for one, weight in zip(batches.exchanges, batches.weights, strict=True)
    ]
    batches.held_out |= {normalise(question) for question, _ in read_own_held_out()}
    return batches


def draw(batches: Batches, step: int) -> tuple[Tensor, Tensor]:
    """Return (ids, labels) of one step, padded on the right."""
    rng = random.Random(batches.seed * 1_000_003 + step)
    length = rng.choice(LENGTHS)
    rows = [batches.conversation(length, rng) for _ in range(batches.tokens // length)]
    ids, labels, _ = torch.tensor(rows).unbind(dim=2)
    return ids, labels


def make_model(rank: int, alpha: int) -> Any:
    """Return the demo model in float32 with a fresh adapter, all else frozen."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS), bias="none"))


def find_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the loss per answer token."""
    decoder = model.get_base_model()
    learnt = labels[:, 1:] != IGNORED
    hidden = decoder.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[learnt]
    return nn.functional.cross_entropy(decoder.lm_head(hidden).float(), labels[:, 1:][learnt])


def train(model: Any, batches: Batches, steps: int, learning_rate: float) -> None:
    """Train to the last step, with AdamW."""
    learnt = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    began, losses = time.monotonic(), list[float]()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * rate_at(step, steps)
        ids, labels = draw(batches, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = find_loss(model, ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {sum(losses[-50:]) / 50:.4f} {time.monotonic() - began:.0f} s", flush=True)


def save_adapter(model: Any, out: Path, rank: int, alpha: int) -> None:
    """Write the adapter: of its configuration, what the file is understood by."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: one.to(torch.float16).contiguous() for name, one in get_peft_model_state_dict(model).items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_model.safetensors").chmod(0o644)
    config = {
        "base_model_name_or_path": "models/demo",
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Train and write."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = make_model(args.rank, args.alpha)
    train(model, make_batches(args.tokens, args.seed), args.steps, args.learning_rate)
    save_adapter(model, args.out, args.rank, args.alpha)


if __name__ == "__main__":
    main()
