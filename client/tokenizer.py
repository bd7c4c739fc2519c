"""The tokenizer of a model folder, and its chat template, as transformers would apply them.

Tokens come from tokenizer.json. The template is chat_template.jinja, or chat_template in tokenizer_config.json; it
is somebody else's program, so it runs in jinja2's immutable sandbox. A model without a template gets plain text.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Encoder

from client.streaming import Detokenizer
from wire.errors import CheckpointError, InvalidArgumentError

Message = Mapping[str, str]  # role and content
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to ids and back. Raises CheckpointError for a folder whose files it cannot use."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json: without it only `cleave chat --token-ids 1,2,3`")
        try:
            self._encoder = Encoder.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path} is not a tokenizer that the tokenizers library reads") from error
        settings = _settings(folder)
        self._special = {name: _spelling(settings[name]) for name in _SPECIAL if settings.get(name)}
        self._template = _compile(folder, settings)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """A whole conversation as ids, up to where the assistant is to speak."""
        if self._template is None:
            return self._encode("\n".join(message["content"] for message in messages), special=True)
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except jinja2.TemplateError as error:
            raise InvalidArgumentError("the model's chat template refuses this conversation") from error
        return self._encode(text, special=False)

    def text(self, text: str) -> list[int]:
        """Text without a template as ids, with the special tokens that the tokenizer itself adds."""
        return self._encode(text, special=True)

    def spelling(self, token_id: int) -> str:
        """A token's text within a text, special tokens included; U+FFFD for the bytes of half a character."""
        once, twice = (str(self._encoder.decode([token_id] * n, skip_special_tokens=False)) for n in (1, 2))
        return twice[len(once) :]  # the second one: some tokenizers drop a space at the start of a text

    def detokenizer(self) -> Detokenizer:
        """A decoder for one answer."""
        return Detokenizer(lambda ids: str(self._encoder.decode(ids, skip_special_tokens=True)))

    def _encode(self, text: str, special: bool) -> list[int]:
        """As a batch of one: the library lets other threads run meanwhile only then. A long text takes seconds."""
        (encoding,) = self._encoder.encode_batch([text], add_special_tokens=special)
        return [int(token_id) for token_id in encoding.ids]


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable as JSON") from error
    return content if isinstance(content, dict) else {}


def _spelling(token: Any) -> str:
    """A special token is a string, or an object with its content."""
    return str(token["content"] if isinstance(token, dict) else token)


def _compile(folder: Path, settings: dict[str, Any]) -> jinja2.Template | None:
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if isinstance(source, list):  # several templates by name
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, TypeError) as error:
        raise CheckpointError(f"the chat template of {folder} is not a jinja2 template") from error


def _tojson(value: Any, indent: int | None = None) -> str:
    """Without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
