import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from client.tokenizer import Tokenizer
from tests.client.conftest import TEMPLATE
from wire.errors import CheckpointError, InvalidArgumentError

MESSAGES = [
    {"role": "user", "content": "who are you?"},
    {"role": "assistant", "content": "a <model> & more"},
    {"role": "user", "content": "ok"},
]
LOOPS = "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m | tojson }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("template", [TEMPLATE, LOOPS])
def test_ids_equal_those_of_transformers(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    path = str(folder / "tokenizer.json")
    reference: Any = PreTrainedTokenizerFast(tokenizer_file=path, eos_token="<|end|>")  # noqa: S106
    expected = reference.apply_chat_template(
        MESSAGES, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert Tokenizer(folder).chat(MESSAGES) == reference(expected, add_special_tokens=False)["input_ids"]


def test_a_named_template_is_found(folder: Path) -> None:
    entries = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries}))
    assert len(Tokenizer(folder).chat(MESSAGES)) == len("yes")


def test_without_a_template_the_prompt_is_plain_text(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer(folder)
    assert len(tokenizer.chat([{"role": "user", "content": "abc"}])) == 3


def test_a_folder_without_tokenizer_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--token-ids"):
        Tokenizer(tmp_path)


def test_unreadable_files_are_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="template"):
        Tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        Tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        Tokenizer(folder)


@pytest.mark.parametrize("template", ["{{ raise_exception(messages[0].content) }}", "{{ messages.append(1) }}"])
def test_a_refusing_or_hostile_template_is_one_error_without_the_prompt(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InvalidArgumentError) as caught:
        Tokenizer(folder).chat([{"role": "user", "content": "secret"}])
    assert "secret" not in str(caught.value)


def test_a_token_is_spelt_as_it_stands_within_a_text(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.text(" a<|end|>")
    assert [tokenizer.spelling(token_id) for token_id in ids] == [" ", "a", "<|end|>"]
    assert tokenizer.spelling(tokenizer.text("ü")[0]) == "\ufffd"


def test_other_threads_run_while_a_long_text_is_read(folder: Path) -> None:
    tokenizer, turns = Tokenizer(folder), 0
    with ThreadPoolExecutor(1) as pool:
        ids = pool.submit(tokenizer.text, "a " * 250_000)
        while not ids.done():
            time.sleep(0.001)
            turns += 1
    assert len(ids.result()) == 500_000
    assert turns > 40  # a handful, if the library kept the others waiting
