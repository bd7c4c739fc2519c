"""The longest context, from a worker that admits as much as it is told to."""

import pytest

from evaluation.measure import longest


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
