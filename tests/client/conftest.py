"""Fixtures: a scripted trusted worker, and a model folder that has everything but weights."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.client.fake_worker import FakeWorker, Script, scripted_workers

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}
TEMPLATE = (
    "{% for message in messages %}\n"
    "    {% if message['role'] == 'user' %}\n"
    "<|user|>{{ message['content'] }}<|end|>{% else %}\n"
    "<|assistant|>{{ message['content'] }}<|end|>{% endif %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """`main` takes the signals over; give them back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def serve() -> Iterator[Callable[[Script], FakeWorker]]:
    """Starts scripted workers, and stops them."""
    yield from scripted_workers()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder: byte-level tokens (a byte's id is 3 + its place in the alphabet), chat template, no weights."""
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    _byte_tokenizer().save(str(model / "tokenizer.json"))
    settings: dict[str, Any] = {"chat_template": TEMPLATE, "eos_token": {"content": "<|end|>"}, "bos_token": None}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def _byte_tokenizer() -> Tokenizer:
    special = ["<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer
