"""Permutations of head dims: they are permutations, they come back, they compose."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trusted_worker.permutation import columns, compose, draw, gather, scatter

CASES = settings(deadline=None, max_examples=50, derandomize=True)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 16))  # layers, g, group, d


def _drawn(layers: int, groups: int, dim: int) -> np.ndarray:
    table = np.empty((layers, groups, dim), np.uint16)
    draw(table)
    return table


@given(shapes)
@CASES
def test_every_row_of_a_drawn_table_is_a_permutation(shape: tuple[int, int, int, int]) -> None:
    layers, groups, _, dim = shape
    assert (np.sort(_drawn(layers, groups, dim), axis=-1) == np.arange(dim)).all()


def test_draws_are_uniform_enough_for_a_chi_square_test() -> None:
    table = _drawn(1, 24_000, 4)[0]
    codes = (table * np.array([64, 16, 4, 1])).sum(axis=1)
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 75  # 23 degrees of freedom: one in a million runs is above


def test_layers_heads_and_draws_differ() -> None:
    one, other = _drawn(3, 4, 64), _drawn(3, 4, 64)
    rows = [tuple(row) for table in (one, other) for row in table.reshape(-1, 64)]
    assert len(set(rows)) == len(rows)


@given(shapes, st.integers(1, 5))
@CASES
def test_scatter_undoes_gather_head_by_head(shape: tuple[int, int, int, int], rows: int) -> None:
    _, groups, share, dim = shape
    table, heads = _drawn(1, groups, dim)[0], groups * share
    x = np.arange(rows * heads * dim, dtype=np.float32).reshape(rows, -1)
    there, back = np.empty_like(x), np.empty_like(x)
    index = columns(table, heads)
    gather(x, index, there)
    scatter(there, index, back)
    assert (back == x).all()
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        assert (there[:, part] == x[:, part][:, table[head // share]]).all()


@given(shapes)
@CASES
def test_a_composition_leads_from_the_old_permutation_to_the_new(shape: tuple[int, int, int, int]) -> None:
    layers, groups, _, dim = shape
    old, new = _drawn(layers, groups, dim), _drawn(layers, groups, dim)
    x = np.random.default_rng(1).standard_normal((layers, groups, dim))
    permuted = np.take_along_axis(x, old.astype(int), axis=-1)
    renewed = np.take_along_axis(permuted, compose(old, new), axis=-1)
    assert (renewed == np.take_along_axis(x, new.astype(int), axis=-1)).all()


@pytest.mark.parametrize("heads", [1, 4])
def test_a_gather_writes_nothing_but_its_output(heads: int) -> None:
    table = _drawn(1, 1, 8)[0]
    x = np.arange(2 * heads * 8, dtype=np.float32).reshape(2, -1)
    before, out = x.copy(), np.zeros_like(x)
    gather(x, columns(table, heads), out)
    assert (x == before).all()
    assert (np.sort(out) == np.sort(x)).all()
