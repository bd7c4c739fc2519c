"""The demo model: it loads, it answers, and it answers the same through Cleave. The first thing a newcomer meets."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from client.tokenizer import Tokenizer
from models.demo.corpus import FOLDER, read_held_out, read_text
from models.demo.evaluate import find_known
from tests.conftest import Rig, build, forward, transformers_logits
from trusted_worker.model import Batch, Run

HELD_OUT = read_held_out(FOLDER / "heldout.jsonl")
BATCH = 16
QUESTIONS = [question for question, _ in HELD_OUT[::50]]


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    """Model and tokenizer, as transformers loads the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        FOLDER
    )


@pytest.fixture(scope="module")
def held_out_score() -> float:
    """Per cent in float32."""
    return score(build(FOLDER, "tee-only", "float32", budget=96 << 20))


def test_the_folder_is_what_it_promises_to_be() -> None:
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= 16_000_000
    assert json.loads((FOLDER / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert len({exchange.answer for exchange in read_text()}) >= 400
    assert len(HELD_OUT) >= 100
    assert find_known(HELD_OUT) == []


def test_it_answers_questions_that_it_has_never_seen(held_out_score: float) -> None:
    assert held_out_score >= 70


def test_int8_answers_as_well_as_float32(held_out_score: float) -> None:
    assert abs(score(build(FOLDER, "tee-only")) - held_out_score) <= 2


@pytest.mark.parametrize("scheme", ["split", "tee-only"])
def test_float32_schemes_say_what_transformers_says(reference: tuple[Any, Any], scheme: str) -> None:
    model, tokenizer = reference
    rig = build(FOLDER, scheme, "float32", budget=96 << 20)
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = inputs["input_ids"][0].tolist()
        assert ids == Tokenizer(FOLDER).chat([{"role": "user", "content": question}])
        logits = transformers_logits(FOLDER, ids)
        assert np.abs(rig.logits(ids, [len(ids)]) - logits).max() <= 1e-4 * np.abs(logits).max()
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=64, min_new_tokens=64, eos_token_id=None)
        assert rig.greedy(ids, 64) == expected[0, len(ids) :].tolist()


def test_plain_says_what_transformers_says_over_the_command_line(reference: tuple[Any, Any]) -> None:
    model, tokenizer = reference
    flags = [
        "--prompt",
        QUESTIONS[0],
        "--scheme",
        "plain",
        "--precision",
        "float32",
        "--max-new-tokens",
        "64",
        "--json",
    ]
    command = [sys.executable, "-m", "client", "chat", *flags]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=120, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
    assert said["token_ids"] == expected.tolist()
    assert said["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_secure_infer_equals_split_bit_for_bit() -> None:
    ids = Tokenizer(FOLDER).chat([{"role": "user", "content": QUESTIONS[0]}])
    masked = build(FOLDER, "secure-infer", bank_rows=40, budget=96 << 20)
    assert np.array_equal(masked.logits(ids, [len(ids)]), build(FOLDER, "split").logits(ids))
    assert masked.scheme.counters()["products_verified"] > 0


def score(rig: Rig) -> float:
    """Per cent of the held-out questions whose key phrase is in the greedy answer; BATCH of them side by side."""
    hits = 0
    for start in range(0, len(HELD_OUT), BATCH):
        pairs = HELD_OUT[start : start + BATCH]
        texts = answers(rig, [question for question, _ in pairs])
        hits += sum(key_phrase in text.lower() for (_, key_phrase), text in zip(pairs, texts, strict=True))
    return 100 * hits / len(HELD_OUT)


def answers(rig: Rig, questions: list[str]) -> list[str]:
    """Greedy answers to several questions, a row of each in every step."""
    tokenizer = Tokenizer(FOLDER)
    caches = [rig.scheme.open(160) for _ in questions]
    pending = [tokenizer.chat([{"role": "user", "content": question}]) for question in questions]
    said: list[list[int]] = [[] for _ in questions]
    while open_ones := [i for i, ids in enumerate(said) if len(ids) < 100 and not set(ids) & set(rig.config.eos)]:
        for members in groups(open_ones, pending, rig.rows):
            for i, row in zip(members, forward(rig.scheme, batch(caches, pending, members)), strict=True):
                pending[i] = [int(row.argmax())]
                said[i] += pending[i]
    for cache in caches:
        cache.free()
    return ["".join(map(tokenizer.detokenizer().feed, ids)) for ids in said]


def groups(members: list[int], pending: list[list[int]], rows: int) -> list[list[int]]:
    """The members in order, as many together as one step has rows for."""
    found: list[list[int]] = [[]]
    for i in members:
        if sum(len(pending[one]) for one in (*found[-1], i)) > rows:
            found.append([])
        found[-1].append(i)
    return found


def batch(caches: list[Any], pending: list[list[int]], members: list[int]) -> Batch:
    """The pending tokens of some sequences, with logits for the last one of each."""
    runs, ids = [], list[int]()
    for i in members:
        assert caches[i].wake(len(pending[i])) == len(pending[i])
        runs.append(Run(caches[i], len(ids), len(ids) + len(pending[i]), caches[i].length))
        ids += pending[i]
    return Batch(np.array(ids, np.int32), tuple(runs), np.array([run.stop - 1 for run in runs], np.int32))
