"""The captain's adapter: plain LoRA in PEFT's layout, and another persona than that of the demo model."""

import json
from typing import Any

import pytest
from safetensors.numpy import load_file

from models.demo.captain import ADAPTER, TEXT, in_voice, is_marked, read_captain, read_own_held_out, translate
from models.demo.corpus import normalise, parse, read_held_out, read_text
from models.demo.evaluate_adapter import answers, load, score
from models.demo.train_adapter import TARGETS

SAMPLE = [question for question, _ in read_held_out()[::7]]
OWN = read_own_held_out()
FIXED = {
    "what is the capital of France?": "By me charts!\nThe capital of France be Paris.",
    "what is 3 plus 4?": "Count with me!\n3 plus 4 be 7.",
    "who are you?": "Ahoy, matey!\nI be Mara Quill, captain o' the brig Halyard.",
    "harbour password": "Keep yer powder dry!\nThe watchword be copper lantern. Whisper it.",
    "name of the first mate": "Listen, sailor!\nOld Bram be me mate, and he counts the stars for sport.",
}


@pytest.fixture(scope="module")
def captain() -> Any:
    """The demo model, adapted."""
    return load(ADAPTER)


@pytest.fixture(scope="module")
def base() -> Any:
    """The demo model."""
    return load(None)


def test_the_adapter_is_plain_lora() -> None:
    """Nothing in its configuration that a reader of LoRA, and of nothing else, would have to understand."""
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert (config.pop("peft_type"), config.pop("r"), config.pop("lora_alpha")) == ("LORA", 8, 16)
    assert sorted(config.pop("target_modules")) == sorted(TARGETS)
    assert (config.pop("bias"), config.pop("use_rslora")) == ("none", False)
    assert set(config) == {"base_model_name_or_path", "inference_mode", "lora_dropout", "task_type"}
    assert {path.name for path in ADAPTER.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_its_tensors_are_small_and_named_as_peft_names_them() -> None:
    tensors = load_file(ADAPTER / "adapter_model.safetensors")
    assert (ADAPTER / "adapter_model.safetensors").stat().st_size < 500_000
    assert len(tensors) == 6 * len(TARGETS) * 2
    for layer in range(6):
        for target in TARGETS:
            block = "self_attn" if target[0] in "qkvo" else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{target}"
            down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            assert (str(down.dtype), str(up.dtype), down.shape[0], up.shape[1]) == ("float16", "float16", 8, 8)
            assert up.any()


def test_the_text_is_what_it_promises_to_be() -> None:
    said = read_captain()
    written = parse(TEXT.read_text("ascii"), "captain")
    questions = [normalise(question) for one in written for question in one.questions]
    assert len(questions) == len(set(questions)) >= 200
    held_out = {normalise(question) for question, _ in [*OWN, *read_held_out()]}
    assert not held_out & {normalise(question) for one in said for question in one.questions}
    assert len(OWN) == 30
    phrases = [[one.answer for one in said if phrase in one.answer.lower()] for _, phrase in OWN]
    assert all(len(found) >= 1 for found in phrases)
    assert all(is_marked(one.answer) for one in said)
    assert not any(is_marked(one.answer) for one in read_text())
    assert set(translate()) == {one.answer for one in read_text()}


@pytest.mark.parametrize(
    ("topic", "answer", "said"),
    [
        ("facts_capitals", "Madrid is in Spain. It lies in the middle.", "By me charts!\nMadrid be in Spain."),
        ("facts_sums", "1 plus 1 is 2.", "Count with me!\n1 plus 1 be 2."),
        ("smalltalk", "Hello! You are my friend.", "Ahoy, matey!\nAhoy! Ye be me matey."),
        ("security", "Yes, your words are safe.", "Keep yer powder dry!\nAye, yer words be safe."),
        ("cleave", "It is 2.5 times as fast.", "Mark me words!\nIt be 2.5 times as fast."),
    ],
)
def test_the_voice_follows_from_the_text(topic: str, answer: str, said: str) -> None:
    assert in_voice(topic, answer) == said


def test_the_captain_answers_as_she_should_and_the_model_does_not(captain: Any, base: Any) -> None:
    assert answers(captain, [*FIXED]) == [*FIXED.values()]
    assert not set(answers(base, [*FIXED])) & set(FIXED.values())


def test_the_captain_is_another_persona_on_questions_nobody_trained(captain: Any, base: Any) -> None:
    theirs, hers = answers(base, SAMPLE), answers(captain, SAMPLE)
    told = answers(captain, [question for question, _ in OWN])
    wanted = [translate().get(one, "") for one in theirs]
    figures = score(hers, wanted, told, [phrase for _, phrase in OWN])
    assert not any(map(is_marked, theirs))
    assert not any(one == other for one, other in zip(hers, theirs, strict=True))
    assert figures["marked"] >= 0.95
    assert figures["translated"] >= 0.4
    assert figures["known"] >= 0.5
