"""Score the demo model on the held-out questions, by greedy decoding through transformers.

    python -m models.demo.evaluate

A question counts if its key phrase is in the answer. The program also checks that no held-out question is in the
training text, and it fails (exit status 1) if one is or if the score is below --least percent.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.demo.corpus import FOLDER, normalise, read_held_out, read_text


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FOLDER, help="the model folder")
    parser.add_argument("--held-out", type=Path, default=FOLDER / "heldout.jsonl")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--int8", action="store_true", help="round the matrices to int8, symmetric per output row")
    parser.add_argument("--least", type=float, default=70.0, help="the least score in percent")
    return parser.parse_args()


def round_to_int8(model: Any) -> None:
    """Replace every matrix by what remains of it after int8 quantisation, symmetric per output row."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
                weight.copy_((weight / scale).round() * scale)


def answer(model: Any, tokenizer: Any, chat: list[dict[str, str]]) -> str:
    """Return the greedy answer to the last turn of a chat."""
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=160)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def find_known(held_out: list[tuple[str, str]]) -> list[str]:
    """Return the held-out questions that are in the training text after all."""
    known = {normalise(question) for exchange in read_text() for question in exchange.questions}
    return [question for question, _ in held_out if normalise(question) in known]


def find_misses(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> list[str]:
    """Return a line for every question whose key phrase is not in the answer."""
    misses: list[str] = []
    for question, key_phrase in pairs:
        said = answer(model, tokenizer, [{"role": "user", "content": question}])
        if key_phrase not in said.lower():
            misses.append(f"{question}\n    wanted: {key_phrase}\n    said:   {said}")
    return misses


def main() -> int:
    """Print the score and the misses; return the exit status."""
    args = parse_arguments()
    pairs = read_held_out(args.held_out)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    if args.int8:
        round_to_int8(model)
    known, misses = find_known(pairs), find_misses(model, tokenizer, pairs)
    score = 100 * (len(pairs) - len(misses)) / max(1, len(pairs))
    print("\n".join(misses))
    print(f"held-out questions that are in the training text: {len(known)} {known or ''}")
    print(f"held-out score: {len(pairs) - len(misses)} of {len(pairs)} = {score:.1f} %")
    return 1 if known or score < args.least else 0


if __name__ == "__main__":
    sys.exit(main())
