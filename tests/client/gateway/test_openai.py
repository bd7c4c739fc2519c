"""The unmodified `openai` package, against both real workers."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai as package
import pytest

from client.attestation.policy import Policy
from client.attestation.policy_file import load
from client.conversation import Conversation
from client.flags import DEMO_MODEL
from client.session import Request, connect
from client.tokenizer import Tokenizer
from client.turn import Pacing
from tests.client.gateway.stand import LONG, Stand, asked

SHORT = "What is Cleave?"
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 7}


def said_in_chat(stand: Stand, *prompts: str, **sampling: Any) -> list[str]:
    """What `cleave chat` answers to these, one after the other."""
    request = Request("demo", "secure-infer", "int8", model_folder=DEMO_MODEL, **sampling)
    with connect(stand.target, Policy(rules=load(stand.policy))) as worker:
        conversation = Conversation(worker, request, Tokenizer(DEMO_MODEL), Pacing(), [])
        try:
            return ["".join(conversation.ask(prompt)) for prompt in prompts]
        finally:
            conversation.reset()


def streamed(client: Any, **fields: Any) -> list[Any]:
    """All chunks."""
    options = {"model": "demo", "messages": asked(SHORT), "stream": True} | fields
    return list(client.chat.completions.create(**options))


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_the_one_model_is_listed(openai: Any) -> None:
    assert [model.id for model in openai.models.list()] == ["demo"]
    assert openai.models.retrieve("demo").owned_by == "cleave"
    with pytest.raises(package.NotFoundError, match="demo"):
        openai.models.retrieve("another")


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_an_answer_is_that_of_cleave_chat(stand: Stand, openai: Any, sampling: dict[str, Any]) -> None:
    (expected,) = said_in_chat(stand, SHORT, **sampling)
    answer = openai.chat.completions.create(model="demo", messages=asked(SHORT), **sampling)
    assert answer.choices[0].message.content == expected
    assert text_of(streamed(openai, **sampling)) == expected
    assert (answer.object, answer.choices[0].finish_reason) == ("chat.completion", "stop")


def test_a_history_is_answered_as_in_cleave_chat(stand: Stand, openai: Any) -> None:
    first, second = said_in_chat(stand, SHORT, LONG)
    answer = openai.chat.completions.create(model="demo", messages=asked(SHORT, first, LONG))
    assert answer.choices[0].message.content == second


def test_usage_counts_and_the_field_cleave(openai: Any) -> None:
    prompt = len(Tokenizer(DEMO_MODEL).chat(asked(SHORT)))
    answer = openai.chat.completions.create(model="demo", messages=asked(SHORT), max_tokens=5)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 5)
    assert answer.usage.total_tokens == prompt + 5
    assert answer.choices[0].finish_reason == "length"
    told = answer.model_extra["cleave"]
    assert (told["scheme"], told["provider"], told["verified"]) == ("secure-infer", "simulated", False)
    assert told["products_verified"] > 0
    assert 0 < told["evidence_age_seconds"] < 3600


@pytest.mark.parametrize("include", [True, False])
def test_a_stream_ends_with_reason_usage_and_the_field_cleave(openai: Any, include: bool) -> None:
    chunks = streamed(openai, max_completion_tokens=3, stream_options={"include_usage": include})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "length"]
    assert [chunk.usage is not None for chunk in chunks] == [*[False] * (len(chunks) - 1), include]
    assert bool(chunks[-1].choices) != include
    assert ["cleave" in (chunk.model_extra or {}) for chunk in chunks] == [*[False] * (len(chunks) - 1), True]
    assert len({chunk.id for chunk in chunks}) == 1
    if include:
        assert chunks[-1].usage.completion_tokens == 3


def test_a_stop_string_ends_the_answer_before_it(openai: Any) -> None:
    whole = openai.chat.completions.create(model="demo", messages=asked(SHORT)).choices[0]
    stop = whole.message.content[20:26]
    for chosen in (stop, ["never said", stop]):
        answer = openai.chat.completions.create(model="demo", messages=asked(SHORT), stop=chosen, logprobs=True)
        choice = answer.choices[0]
        assert choice.message.content == whole.message.content.partition(stop)[0]
        assert choice.finish_reason == "stop"
        spelt = "".join(token.token for token in choice.logprobs.content)
        assert spelt.startswith(choice.message.content)
        assert text_of(streamed(openai, stop=chosen)) == choice.message.content


def test_log_probabilities_spell_the_answer(openai: Any) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
    answer = openai.chat.completions.create(model="demo", messages=asked(SHORT), **fields)
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert [entry.logprob for entry in token.top_logprobs] == sorted(
            (entry.logprob for entry in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.logprob <= 0
        assert bytes(token.bytes).decode() == token.token
    chunks = [chunk.choices[0].logprobs for chunk in streamed(openai, **fields)]
    assert [token for part in chunks if part for token in part.content] == tokens
    assert openai.chat.completions.create(model="demo", messages=asked(SHORT)).choices[0].logprobs is None


def test_completions(openai: Any) -> None:
    answer = openai.completions.create(model="demo", prompt="Cleave runs", max_tokens=6, logprobs=2)
    choice = answer.choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert [choice.text[offset] for offset in choice.logprobs.text_offset] == [
        token[0] for token in choice.logprobs.tokens
    ]
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    assert all(math.isfinite(value) for value in choice.logprobs.token_logprobs)
    ids = Tokenizer(DEMO_MODEL).text("Cleave runs")
    assert openai.completions.create(model="demo", prompt=ids, max_tokens=6).choices[0].text == choice.text
    chunks = list(openai.completions.create(model="demo", prompt=["Cleave runs"], max_tokens=6, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason == "length"


def test_what_is_refused_is_an_error_that_names_it(openai: Any) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    for stream in (True, False):
        with pytest.raises(package.BadRequestError) as refusal:
            openai.chat.completions.create(model="demo", messages=asked(SHORT), tools=[tool], stream=stream)
        error: Any = refusal.value
        assert (error.param, error.code, error.type) == ("tools", "unsupported_parameter", "invalid_request_error")
    with pytest.raises(package.NotFoundError) as missing:
        openai.chat.completions.create(model="gpt-4o", messages=asked(SHORT))
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [True, False])
def test_a_history_that_is_too_long_is_an_error_before_any_answer(openai: Any, stream: bool) -> None:
    with pytest.raises(package.BadRequestError) as refusal:
        openai.chat.completions.create(model="demo", messages=asked(SHORT * 400), stream=stream)
    assert refusal.value.code == "context_length_exceeded"


def test_sixteen_clients_at_once_get_what_each_gets_alone(stand: Stand, openai: Any) -> None:
    prompts = [SHORT, LONG, "Who are you?", "What is a one-time pad?"]
    alone = {prompt: said_in_chat(stand, prompt)[0] for prompt in prompts}

    def ask(number: int) -> bool:
        prompt = prompts[number % len(prompts)]
        if number % 2:
            return text_of(streamed(openai, messages=asked(prompt))) == alone[prompt]
        answer = openai.chat.completions.create(model="demo", messages=asked(prompt))
        return bool(answer.choices[0].message.content == alone[prompt])

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == [True] * 16
    stand.idle()
