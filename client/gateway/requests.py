"""From the body of a request to an order: what is supported, what changes nothing, and what is refused by name.

A field that is absent means what it means for `cleave chat`: the most likely token is taken, and the answer ends where
the model ends it, or its context. So the same fields give the same tokens on both ways.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from client.gateway.errors import refused
from client.gateway.fields import Fields, integer, number, text, truth
from client.gateway.messages import messages
from client.session import Request
from client.tokenizer import Tokenizer

MAX_TOKENS = 1 << 24  # beyond every context: it ends the answer
MAX_STOPS = 64
MAX_TOP = 20  # log-probabilities beside that of the token itself
SMALLEST_TOP_P = 1e-6  # 0 stands for "off" on the way to the trusted worker; here it asks for one token

_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")  # change no answer
_NEUTRAL: Mapping[str, Sequence[Any]] = {  # values beside null that ask for nothing
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "min_p": (0,),
    "ignore_eos": (False,),
}
CHAT_NEUTRAL = {
    **_NEUTRAL,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
COMPLETION_NEUTRAL = {**_NEUTRAL, "best_of": (1,), "echo": (False,), "suffix": ("",)}


@dataclass(frozen=True)
class Order:
    """One answer that somebody wants."""

    tokens: Callable[[Tokenizer], list[int]]  # of the prompt
    request: Request  # what its session is opened with
    max_new_tokens: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: bool


def chat(body: Any, base: Request) -> Order:
    """A body of /v1/chat/completions. `base` says model, scheme and precision. Raises ApiError."""
    fields = Fields(body)
    said = messages(fields.need("messages", _array))
    wanted = fields.take("logprobs", truth, False)
    top = fields.take("top_logprobs", integer(0, MAX_TOP), 0)
    if top and not wanted:
        raise refused("top_logprobs", "needs logprobs: true")
    most = fields.take("max_completion_tokens", integer(1, MAX_TOKENS), 0)
    order = _order(fields, base, lambda tokenizer: tokenizer.chat(said), top)
    if most and fields.take("max_tokens", integer(1, MAX_TOKENS), most) != most:
        raise refused("max_tokens", "contradicts max_completion_tokens: leave one out")
    most = most or fields.take("max_tokens", integer(1, MAX_TOKENS), MAX_TOKENS)
    fields.finish(CHAT_NEUTRAL)
    return replace(order, max_new_tokens=most, logprobs=wanted)


def completion(body: Any, base: Request) -> Order:
    """A body of /v1/completions. `logprobs` is a number there. Raises ApiError."""
    fields = Fields(body)
    prompt = fields.need("prompt", _prompt)
    top = fields.take("logprobs", integer(0, MAX_TOP), -1)
    most = fields.take("max_tokens", integer(1, MAX_TOKENS), MAX_TOKENS)

    def tokens(tokenizer: Tokenizer) -> list[int]:
        return tokenizer.text(prompt) if isinstance(prompt, str) else prompt

    order = _order(fields, base, tokens, max(top, 0))
    fields.finish(COMPLETION_NEUTRAL)
    return replace(order, max_new_tokens=most, logprobs=top >= 0)


def _order(fields: Fields, base: Request, tokens: Callable[[Tokenizer], list[int]], top: int) -> Order:
    """What both have."""
    model = fields.take("model", text, base.model)
    if model != base.model:
        raise _no_model(model, base.model)
    top_p = fields.take("top_p", number(0, 1), 1.0)
    request = replace(
        base,
        temperature=fields.take("temperature", number(0, 100), 0.0),
        top_p=max(top_p, SMALLEST_TOP_P),
        top_k=fields.take("top_k", integer(0, 1 << 20), 0),
        repetition_penalty=fields.take("repetition_penalty", number(0.01, 100), 0.0),
        seed=fields.take("seed", integer(0, (1 << 64) - 1), None),
        logprobs=top,
    )
    stops, stream = fields.take("stop", _stops, ()), fields.take("stream", truth, False)
    usage = _include_usage(fields, stream)
    for label in _LABELS:
        fields.take(label, lambda value: value, None)
    return Order(tokens, request, MAX_TOKENS, stops, stream, usage, False)


def _no_model(asked: str, served: str) -> Exception:
    error = refused("model", f"there is no {asked!r} here; this gateway serves {served!r}", "model_not_found")
    error.status = 404
    return error


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.take("stream_options", lambda value: Fields(value, "stream_options"), None)
    if options is None:
        return False
    if not stream:
        raise refused("stream_options", "needs stream: true")
    include = options.take("include_usage", truth, False)
    options.finish({"include_obfuscation": (False,)})
    return include


def _array(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError("must be an array that is not empty")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = tuple(map(text, value)) if isinstance(value, list) else (text(value),)
    if len(stops) > MAX_STOPS or "" in stops:
        raise ValueError(f"must be a string or at most {MAX_STOPS} of them, none of them empty")
    return stops


def _prompt(value: Any) -> str | list[int]:
    """One prompt, as text or as token ids; also as an array of one."""
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], int):
        return _prompt(value[0])
    if isinstance(value, list) and value and all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        return value
    if isinstance(value, list):
        raise ValueError("must be one prompt: several in one request are not supported")
    return text(value)
