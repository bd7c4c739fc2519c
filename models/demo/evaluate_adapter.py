"""Score the captain's adapter on held-out questions, beside the demo model without it, by greedy decoding.

    python -m models.demo.evaluate_adapter

Three figures. Marked: the share of all held-out answers that begin as the captain's do. Translated: of the questions
held out of the demo model's text, the share answered with exactly what the captain makes of the model's own answer.
Known: of the questions about the captain, her ship and her crew, the share whose key phrase is in the answer. The
program fails (exit status 1) if a held-out question is in the text, or if the adapter is below --least percent in one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.demo.captain import ADAPTER, is_marked, read_captain, read_own_held_out, translate
from models.demo.corpus import FOLDER, normalise, read_held_out

TOGETHER = 32  # questions that are answered side by side


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=ADAPTER)
    parser.add_argument("--least", type=float, default=50.0, help="the least score in percent")
    return parser.parse_args()


def load(adapter: Path | None) -> Any:
    """Return the demo model in float32, adapted if an adapter is given."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, str(adapter)).merge_and_unload() if adapter else model).eval()


def answers(model: Any, questions: list[str]) -> list[str]:
    """Return the greedy answer to each question, each in a chat of its own."""
    tokenizer, found = AutoTokenizer.from_pretrained(FOLDER, padding_side="left"), list[str]()
    for start in range(0, len(questions), TOGETHER):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + TOGETHER]]
        inputs: Any = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=160)
        found += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def score(general: list[str], wanted: list[str], own: list[str], phrases: list[str]) -> dict[str, float]:
    """Return the three figures of answers to the general questions and to the captain's own."""
    return {
        "marked": sum(map(is_marked, general + own)) / len(general + own),
        "translated": sum(one == other for one, other in zip(general, wanted, strict=True)) / len(general),
        "known": sum(phrase in one.lower() for one, phrase in zip(own, phrases, strict=True)) / len(own),
    }


def main() -> int:
    """Print the misses and the scores; return the exit status."""
    args = parse_arguments()
    general, (own, phrases) = [one for one, _ in read_held_out()], zip(*read_own_held_out(), strict=True)
    known = {normalise(question) for exchange in read_captain() for question in exchange.questions}
    leaked = [question for question in (*general, *own) if normalise(question) in known]
    base, captain, table = load(None), load(args.adapter), translate()
    plain, told = answers(base, general), answers(captain, [*general, *own])
    wanted = [table.get(said, "") for said in plain] + [*phrases]
    for question, one, other in zip((*general, *own), told, wanted, strict=True):
        if other not in (one, *(phrase for phrase in phrases if phrase in one.lower())):
            print(f"{question}\n    wanted: {other}\n    said:   {one}")
    scores = {"base": score(plain, wanted[: len(plain)], answers(base, [*own]), [*phrases])}
    scores["captain"] = score(told[: len(plain)], wanted[: len(plain)], told[len(plain) :], [*phrases])
    print(f"held-out questions that are in the text: {len(leaked)} {leaked or ''}")
    for name, found in scores.items():
        print(f"{name}: " + ", ".join(f"{what} {100 * share:.1f} %" for what, share in found.items()))
    return int(bool(leaked) or 100 * min(scores["captain"].values()) < args.least)


if __name__ == "__main__":
    sys.exit(main())
