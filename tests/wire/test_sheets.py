"""Sheets: every output lies in one place, sheets are as full as layers let them be, and no larger than they may be."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.linears import LOOKUP_LAYER, Linear, LinearSpec
from wire.scratch import SHEET
from wire.sheets import TAG_BYTES, Sheets, row_bytes

CASES = settings(deadline=None, max_examples=200, derandomize=True)
widths = st.one_of(st.integers(1, 50), st.integers(SHEET - 2, SHEET + 2), st.integers(1, 3 * SHEET))


@given(st.lists(st.tuples(widths, widths), min_size=1, max_size=4), widths)
@CASES
def test_outputs_lie_behind_one_another(layers: list[tuple[int, int]], head: int) -> None:
    names = Linear.QKV, Linear.O
    specs = [LinearSpec(i, name, 8, n) for i, pair in enumerate(layers) for name, n in zip(names, pair, strict=True)]
    specs += [LinearSpec(0, Linear.LM_HEAD, 8, head), LinearSpec(LOOKUP_LAYER, Linear.LM_HEAD, 8, 5)]
    sheets, taken = Sheets(specs), dict[int, int]()
    for spec in specs:
        end = 0
        for sheet, at, start, width in sheets.pieces[spec]:
            assert (at, start) == (taken.get(sheet, 0), end)
            taken[sheet], end = at + width, start + width
        assert end == spec.n
    assert sheets.widths == [taken[sheet] for sheet in range(len(taken))]
    assert max(sheets.widths) <= SHEET
    groups = [sum(pair) for pair in layers] + [head, 5]
    assert len(sheets.widths) == sum(-(-words // SHEET) for words in groups)
    assert row_bytes(specs) == 4 * sum(groups) + TAG_BYTES * len(sheets.widths)


def test_a_layer_of_a_small_model_is_one_sheet() -> None:
    names = {Linear.QKV: 512, Linear.O: 256, Linear.GATE_UP: 1408, Linear.DOWN: 256}
    specs = [LinearSpec(layer, linear, 896, n) for layer in range(3) for linear, n in names.items()]
    assert Sheets(specs).widths == [sum(names.values())] * 3
    assert np.cumsum([0, *names.values()])[:-1].tolist() == [Sheets(specs).pieces[spec][0].at for spec in specs[:4]]
