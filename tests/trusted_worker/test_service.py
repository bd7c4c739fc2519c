"""What a session is opened with, in the real service: perturbation by client and operator."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pressure.inside import Inside, inside
from wire.errors import InvalidArgumentError
from wire.v1 import trusted_worker_pb2 as pb

Folder = Callable[[str], Path]
PROMPT = [3, 1, 4, 1, 5]
BUDGET = ("--memory-budget", "4MiB", "--pad-bank", "1MiB")


def perturbed(one: Inside, by: float) -> pb.OpenResponse:
    request = pb.OpenRequest()
    request.CopyFrom(one.request)
    request.sampling.perturbation = by
    opened: pb.OpenResponse = one.do(lambda: one.service.open(request, b""))
    return opened


def logprobs(one: Inside, by: float) -> list[float]:
    """Of the first tokens that a fresh session says after PROMPT."""
    events: list[pb.DecodeResponse] = []
    name = perturbed(one, by).session
    session = one.service.session(name)
    one.do(lambda: session.attach(events.append))
    one.do(lambda: session.feed(PROMPT, 1, False))
    while not events:
        one.stats()
    said = [event.token.logprob for event in events if event.HasField("token")]
    one.do(lambda: one.service.close(name))
    return said


def test_the_larger_of_what_client_and_operator_want_is_in_force_and_is_said(model_folder: Folder) -> None:
    with inside(model_folder("llama"), "tee-only", *BUDGET, "--least-perturbation", "0.5") as one:
        said = [perturbed(one, by).perturbation for by in (0.0, 0.25, 0.5, 2.0)]
    assert said == [0.5, 0.5, 0.5, 2.0]
    with inside(model_folder("llama"), "tee-only", *BUDGET) as one:
        assert perturbed(one, 0.0).perturbation == 0
        with pytest.raises(InvalidArgumentError, match="perturbation"):
            perturbed(one, 9.0)


def test_released_logits_are_off_and_the_same_question_gets_the_same_answer(model_folder: Folder) -> None:
    with inside(model_folder("llama"), "tee-only", *BUDGET) as one:
        exact = logprobs(one, 0.0)
        assert logprobs(one, 0.0) == exact
        first = logprobs(one, 1.0)
        assert first != exact
        assert logprobs(one, 1.0) == first
        assert abs(first[0] - exact[0]) <= 2  # the largest logit moves by at most b, and so does the log of the mass
    with inside(model_folder("llama"), "tee-only", *BUDGET) as other:  # another boot, another key
        assert logprobs(other, 1.0) != first
