"""What a request may say: read, accepted because it changes nothing, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from client.flags import DEMO_MODEL
from client.gateway import requests
from client.gateway.errors import ApiError
from client.session import Request
from client.tokenizer import Tokenizer
from tests.client.gateway.stand import asked

BASE = Request("demo", "secure-infer", "int8")
MESSAGES = asked("What is Cleave?")
SHAPES = Path(__file__).parent / "front_ends.json"


def chat(**fields: Any) -> requests.Order:
    return requests.chat({"messages": MESSAGES} | fields, BASE)


def completion(**fields: Any) -> requests.Order:
    return requests.completion({"prompt": "Cleave"} | fields, BASE)


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    return caught.value


def test_what_is_absent_or_null_means_what_it_means_in_cleave_chat() -> None:
    order = chat()
    assert (order.request.temperature, order.request.top_p, order.request.seed) == (0.0, 1.0, None)
    assert (order.stops, order.stream, order.logprobs, order.include_usage) == ((), False, False, False)
    assert order.max_new_tokens == requests.MAX_TOKENS
    names = ("temperature", "top_p", "seed", "stop", "max_tokens", "stream", "logprobs", "tools", "n", "logit_bias")
    assert chat(**dict.fromkeys(names)).request == order.request


def test_what_is_supported_arrives() -> None:
    order = chat(
        model="demo", temperature=0.5, top_p=0.9, top_k=40, repetition_penalty=1.1, seed=(1 << 64) - 1, max_tokens=9,
        stop=["a", "b"], stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=20,
    )  # fmt: skip
    request = order.request
    assert (request.temperature, request.top_p, request.top_k, request.repetition_penalty) == (0.5, 0.9, 40, 1.1)
    assert (request.seed, request.logprobs, order.max_new_tokens) == ((1 << 64) - 1, 20, 9)
    assert (order.stops, order.stream, order.include_usage, order.logprobs) == (("a", "b"), True, True, True)
    assert chat(max_completion_tokens=4, max_tokens=4).max_new_tokens == 4
    assert chat(stop="a").stops == ("a",)


def test_top_p_0_is_one_token_and_not_off() -> None:
    assert 0 < chat(top_p=0).request.top_p < 1e-5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1), ("presence_penalty", 0), ("presence_penalty", 0.0), ("frequency_penalty", 0), ("logit_bias", {}),
        ("tools", []), ("tool_choice", "none"), ("tool_choice", "auto"), ("parallel_tool_calls", True),
        ("functions", []), ("function_call", "none"), ("response_format", {"type": "text"}), ("modalities", ["text"]),
        ("service_tier", "auto"), ("store", False), ("user", "me"), ("metadata", {"a": "b"}), ("min_p", 0),
        ("safety_identifier", "x"), ("prompt_cache_key", "x"), ("reasoning_effort", "none"), ("verbosity", "medium"),
        ("stream_options", None), ("web_search_options", None), ("made_up", None), ("ignore_eos", False),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_accepted(field: str, value: Any) -> None:
    assert chat(**{field: value}).request == chat().request


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2), ("n", True), ("presence_penalty", 0.5), ("presence_penalty", False), ("frequency_penalty", -1),
        ("logit_bias", {"7": 1}), ("tools", [{}]), ("tool_choice", "required"), ("functions", [{}]),
        ("function_call", {"name": "f"}), ("response_format", {"type": "json_object"}), ("modalities", ["audio"]),
        ("audio", {}), ("prediction", {}), ("web_search_options", {}), ("reasoning_effort", "high"),
        ("verbosity", "low"), ("store", True), ("service_tier", "priority"), ("min_p", 0.1), ("ignore_eos", True),
        ("best_of", 1), ("suffix", ""), ("guided_json", {}), ("chat_template", "x"), ("made_up", 0),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")
    assert field in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", "1"), ("temperature", True), ("temperature", float("nan")),
        ("top_p", 1.1), ("seed", -1), ("seed", 1 << 64), ("seed", 1.5), ("max_tokens", 0), ("max_tokens", -1),
        ("max_completion_tokens", 2.5), ("stop", ""), ("stop", ["a", ""]), ("stop", [7]), ("stop", ["a"] * 65),
        ("stream", "true"), ("stream", 1), ("logprobs", 5), ("messages", []), ("messages", None),
        ("messages", "hello"), ("model", 7), ("stop", "\ud800"), ("top_k", -1), ("stream_options", {}),
        ("top_logprobs", 2),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_name(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert (error.status, error.param) == (400, field)


def test_fields_that_contradict_each_other_are_refused() -> None:
    assert refusal(max_tokens=3, max_completion_tokens=4).param == "max_tokens"
    assert refusal(stream=True, stream_options={"made_up": 1}).param == "stream_options.made_up"
    assert refusal(model="gpt-4o").status == 404


@pytest.mark.parametrize("body", [[], "x", 7, None])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    with pytest.raises(ApiError, match="object"):
        requests.chat(body, BASE)


def test_roles_and_parts_become_what_templates_know() -> None:
    tokenizer = Tokenizer(DEMO_MODEL)
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "Cleave?"}]
    for spelling in (parts, "What is\nCleave?"):
        messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": spelling}]
        plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is\nCleave?"}]
        assert chat(messages=messages).tokens(tokenizer) == tokenizer.chat(plain)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hello", "messages[1]"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": 7}, "messages[1].content"),
        ({"role": "user", "content": "\udfff"}, "messages[1].content"),
        ({"role": "user", "content": "x", "name": "ann"}, "messages[1].name"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "messages[1].tool_calls"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}, "messages[1].content[0].b"),
    ],
)
def test_a_message_that_cannot_be_passed_on_whole_is_refused(message: Any, param: str) -> None:
    assert refusal(messages=[*MESSAGES, message]).param == param


def test_answers_of_other_servers_come_back_in_a_history() -> None:
    extra: dict[str, Any] = {"refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    history = [*MESSAGES, {"role": "assistant", "content": "It is.", **extra}, *MESSAGES]
    plain = [*MESSAGES, {"role": "assistant", "content": "It is."}, *MESSAGES]
    tokenizer = Tokenizer(DEMO_MODEL)
    assert chat(messages=history).tokens(tokenizer) == tokenizer.chat(plain)


def test_completions_take_one_prompt() -> None:
    tokenizer = Tokenizer(DEMO_MODEL)
    ids = tokenizer.text("Cleave")
    for prompt in ("Cleave", ["Cleave"], ids, [ids]):
        assert completion(prompt=prompt).tokens(tokenizer) == ids
    assert completion(logprobs=0).logprobs
    assert not completion().logprobs
    assert completion(echo=False, best_of=1, suffix="").request == completion().request
    for field, value in (("prompt", ["a", "b"]), ("prompt", [[1], [2]]), ("prompt", []), ("prompt", 7), ("echo", True)):
        with pytest.raises(ApiError) as caught:
            completion(**{field: value})
        assert caught.value.param == field


@pytest.mark.parametrize("name", json.loads(SHAPES.read_text()))
def test_what_front_ends_send(name: str) -> None:
    """Request bodies as chat front ends build them, written down by hand; each with what must become of it."""
    shape = json.loads(SHAPES.read_text())[name]
    if shape["refused"]:
        with pytest.raises(ApiError) as caught:
            requests.chat(shape["body"], BASE)
        assert caught.value.param == shape["refused"]
    else:
        order = requests.chat(shape["body"], BASE)
        assert order.stream == shape["body"].get("stream", False)
        assert order.tokens(Tokenizer(DEMO_MODEL))
