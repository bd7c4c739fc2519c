"""The longest context, from a worker that admits as much as it is told to."""

import pytest

from evaluation.measure import Load, longest, prompts_of, warm_up


@pytest.mark.parametrize(
    ("most", "admitted", "found"),
    [(1000, 1000, 1000), (1000, 999, 960), (1024, 1023, 960), (1000, 64, 64), (1000, 63, 0), (50, 49, 0), (50, 50, 50)],
)
def test_the_longest_context_is_the_model_s_or_whole_pages(most: int, admitted: int, found: int) -> None:
    asked: list[int] = []

    def opens(tokens: int) -> bool:
        asked.append(tokens)
        return tokens <= admitted

    assert longest(most, opens) == found
    assert max(asked) == asked[0] == most
    assert len(asked) <= 6


def test_prompts_are_the_same_for_every_row_and_have_the_length_of_the_load() -> None:
    load = Load(context=9, tokens=4, batch=3)
    found = prompts_of(load, 50)
    assert found == prompts_of(load, 50)
    assert [len(prompt) for prompt in found] == [9, 9, 9]
    assert all(0 <= token < 50 for prompt in found for token in prompt)
    assert found[0] != found[1]


def test_a_short_answer_of_every_batch_warms_up() -> None:
    loads = [Load(128, 100, 1), Load(4096, 100, 1), Load(128, 100, 8)]
    assert warm_up(loads) == [Load(64, 64, 1), Load(64, 64, 8)]
    assert warm_up([Load(5, 4, 2)]) == [Load(5, 4, 2)]
