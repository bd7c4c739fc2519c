"""The arena: exact accounts, no overlap, nothing left behind, nothing for a child to see."""

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trusted_worker.secure_memory import ALIGNMENT, Block, BudgetExceeded, Scratch, SecureMemory
from wire.errors import ExhaustedError

CASES = settings(deadline=None, max_examples=60, derandomize=True)
BUDGET = 64 * 1024


def _gaps(memory: SecureMemory) -> list[tuple[int, int]]:
    return list(memory._free)


def _check(memory: SecureMemory, blocks: list[Block]) -> None:
    """Blocks and gaps tile the arena, gaps are not adjacent, and the accounts say the same."""
    pieces = sorted([(b.offset, b.size) for b in blocks] + _gaps(memory))
    end = 0
    for offset, size in pieces:
        assert offset == end
        assert size > 0
        end = offset + size
    assert end == memory.budget
    gaps = _gaps(memory)
    assert all(a[0] + a[1] < b[0] for a, b in pairwise(gaps))
    owners: Counter[str] = Counter()
    for block in blocks:
        owners[block.owner] += block.size
    assert memory.by_owner() == dict(owners)
    assert memory.used == sum(owners.values())
    assert memory.used <= memory.peak <= memory.budget
    assert memory.largest_free() == max((size for _, size in gaps), default=0)


class Arena(RuleBasedStateMachine):
    """Any order of allocate and free, with each block filled by a pattern of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = SecureMemory(BUDGET)
        self.blocks: list[Block] = []
        self.patterns: dict[int, int] = {}
        self.count = 0

    @rule(
        owner=st.sampled_from(["kv", "weights", "pads"]),
        size=st.one_of(st.integers(0, 200), st.integers(0, BUDGET // 2)),
        dtype=st.sampled_from([np.uint8, np.int32, np.float64]),
    )
    def allocate(self, owner: str, size: int, dtype: Any) -> None:
        shape = (size,)
        size *= np.dtype(dtype).itemsize
        free = self.memory.largest_free()
        before = self.memory.by_owner()
        if max(-(-size // ALIGNMENT), 1) * ALIGNMENT > free:
            with pytest.raises(BudgetExceeded) as caught:
                self.memory.allocate(owner, shape, dtype)
            assert caught.value.free == free
            assert +Counter(caught.value.by_owner) == before == self.memory.by_owner()
            return
        block = self.memory.allocate(owner, shape, dtype)
        assert block.array.shape == shape
        assert block.array.nbytes <= block.size < block.array.nbytes + ALIGNMENT + (block.array.nbytes == 0)
        assert not block.array.view(np.uint8).any()  # never a byte of whoever was here before
        self.count = (self.count + 1) % 255
        block.array.view(np.uint8)[...] = self.count + 1
        self.blocks.append(block)
        self.patterns[id(block)] = self.count + 1

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        start, end = block.offset, block.offset + block.size
        block.free()
        assert not self.memory._bytes[start:end].any()
        block.free()

    @invariant()
    def accounts_are_exact(self) -> None:
        _check(self.memory, self.blocks)

    @invariant()
    def nobody_writes_into_anothers_block(self) -> None:
        for block in self.blocks:
            assert (block.array.view(np.uint8) == self.patterns[id(block)]).all()

    def teardown(self) -> None:
        for block in self.blocks:
            block.free()
        assert self.memory.by_owner() == {}
        self.memory.allocate("all", (BUDGET,), np.uint8)


TestArena = Arena.TestCase
TestArena.settings = settings(deadline=None, max_examples=30, stateful_step_count=40, derandomize=True)


def test_ten_thousand_mixed_operations_leave_one_whole_gap() -> None:
    draw, memory = random.Random(7), SecureMemory(1 << 20)
    blocks: list[Block] = []
    for step in range(10_000):
        if blocks and draw.random() < 0.5:
            blocks.pop(draw.randrange(len(blocks))).free()
        else:
            try:
                blocks.append(memory.allocate(draw.choice("abc"), (int(2 ** draw.uniform(0, 17)),), np.uint8))
            except BudgetExceeded:
                blocks.pop(draw.randrange(len(blocks))).free()
        if step % 500 == 0:
            _check(memory, blocks)
    draw.shuffle(blocks)
    for block in blocks:
        block.free()
    _check(memory, [])
    whole = memory.allocate("all", (1 << 20,), np.uint8)
    assert not whole.array.any()
    assert memory.largest_free() == 0


def test_the_whole_budget_can_be_had_and_not_a_byte_more() -> None:
    memory = SecureMemory(BUDGET)
    with pytest.raises(BudgetExceeded):
        memory.allocate("kv", (BUDGET + 1,), np.uint8)
    block = memory.allocate("kv", (BUDGET // 4,), np.float32)
    with pytest.raises(BudgetExceeded):
        memory.allocate("kv", (0,), np.uint8)
    block.free()
    assert (memory.used, memory.peak) == (0, BUDGET)


def test_the_first_gap_that_is_large_enough_is_taken() -> None:
    memory = SecureMemory(BUDGET)
    first, second, third = (memory.allocate("kv", (1024,), np.uint8) for _ in range(3))
    kept = memory.allocate("kv", (64,), np.uint8)
    first.free()
    third.free()
    assert memory.allocate("kv", (1025,), np.uint8).offset > kept.offset
    assert memory.allocate("kv", (1024,), np.uint8).offset == first.offset
    assert second.size == 1024


@pytest.mark.parametrize("freed_first", [0, 1, 2])
def test_neighbouring_gaps_become_one(freed_first: int) -> None:
    memory = SecureMemory(BUDGET)
    blocks = [memory.allocate("kv", (BUDGET // 4,), np.uint8) for _ in range(4)]
    order = [blocks[freed_first], *(b for i, b in enumerate(blocks[:3]) if i != freed_first)]
    for block in order:
        block.free()
    assert memory.largest_free() == 3 * BUDGET // 4


def test_exceeding_the_budget_tells_owners_to_the_log_only() -> None:
    memory = SecureMemory(BUDGET)
    memory.allocate("sessions of somebody", (1000,), np.uint8)
    with pytest.raises(BudgetExceeded) as caught:
        memory.allocate("kv", (BUDGET,), np.uint8)
    assert isinstance(caught.value, ExhaustedError)
    assert caught.value.by_owner == {"sessions of somebody": 1024}
    text = str(caught.value)
    assert "somebody" not in text
    assert "1024" not in text
    assert str(BUDGET) in text
    assert str(BUDGET - 1024) in text


@pytest.mark.parametrize("shape", [(2**40, 2**40), (2**32, 2**32), (2**62, 4), (2**31, 2**31, 2**31)])
def test_absurd_shapes_exceed_the_budget_and_leave_no_trace(shape: tuple[int, ...]) -> None:
    memory = SecureMemory(BUDGET)
    with pytest.raises(BudgetExceeded):
        memory.allocate("kv", shape, np.uint8)
    assert memory.used == 0
    assert memory.by_owner() == {}


def test_a_budget_below_one_page_is_refused() -> None:
    with pytest.raises(ExhaustedError, match="page"):
        SecureMemory(4095)


def test_arrays_are_aligned_and_typed() -> None:
    memory = SecureMemory(BUDGET)
    for dtype in (np.int8, np.int16, np.int32, np.float32, np.float64):
        array = memory.allocate("kv", (3, 5), dtype).array
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.ctypes.data % ALIGNMENT == 0


def test_protections_are_reported_one_by_one() -> None:
    protections = SecureMemory(BUDGET).protections
    assert set(protections) == {"wiped on fork", "not dumped", "locked"}
    assert all(isinstance(holds, bool) for holds in protections.values())


def test_a_forked_child_sees_zeros(in_child: Callable[[Callable[[], bool]], bool]) -> None:
    memory = SecureMemory(BUDGET)
    block = memory.allocate("keys", (BUDGET,), np.uint8)
    block.array[...] = 0xA5
    seen_wiped = in_child(lambda: not memory._bytes.any())
    assert seen_wiped == memory.protections["wiped on fork"]
    assert (block.array == 0xA5).all()


def _scratch(size: int = 4096) -> tuple[SecureMemory, Scratch]:
    memory = SecureMemory(BUDGET)
    return memory, Scratch(memory, size)


def test_scratch_is_accounted_as_one_block() -> None:
    memory, _ = _scratch()
    assert memory.by_owner() == {"scratch": 4096}


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([np.uint8, np.int32, np.float64])), max_size=12))
@CASES
def test_scratch_arrays_are_aligned_and_do_not_overlap(wanted: list[tuple[int, Any]]) -> None:
    memory, scratch = _scratch(1 << 14)
    with scratch.frame():
        arrays = [scratch.empty((count,), dtype) for count, dtype in wanted]
        for number, array in enumerate(arrays):
            array.view(np.uint8)[...] = number + 1
        for number, array in enumerate(arrays):
            assert (array.view(np.uint8) == number + 1).all()
            assert array.size == 0 or array.ctypes.data % ALIGNMENT == 0
    assert not memory._bytes.any()


def test_inner_frames_give_room_back_and_the_outermost_wipes() -> None:
    memory, scratch = _scratch()
    with scratch.frame():
        kept = scratch.empty((10,), np.uint8)
        kept[...] = 1
        for _ in range(100):
            with scratch.frame():
                scratch.empty((3000,), np.uint8)[...] = 2
        again = scratch.empty((3000,), np.uint8)
        assert again.ctypes.data == kept.ctypes.data + ALIGNMENT
        assert (kept == 1).all()
        assert memory._bytes.any()
    assert not memory._bytes.any()


def test_the_high_water_of_an_inner_frame_is_wiped_too() -> None:
    memory, scratch = _scratch()
    with scratch.frame():
        with scratch.frame():
            scratch.empty((4096,), np.uint8)[...] = 9
        scratch.empty((1,), np.uint8)[...] = 9
    assert not memory._bytes.any()


def test_an_error_passes_through_frames_and_leaves_nothing() -> None:
    memory, scratch = _scratch()

    def step() -> None:
        with scratch.frame():
            scratch.empty((100,), np.uint8)[...] = 5
            with scratch.frame():
                scratch.empty((100,), np.uint8)[...] = 6
                raise ValueError("a step failed")

    with pytest.raises(ValueError, match="a step failed"):
        step()
    assert not memory._bytes.any()
    with scratch.frame():
        assert scratch.empty((4096,), np.uint8).size == 4096


def test_scratch_that_is_full_raises_and_goes_on() -> None:
    _, scratch = _scratch(128)
    with scratch.frame():
        scratch.empty((65,), np.uint8)
        with pytest.raises(BudgetExceeded) as caught:
            scratch.empty((1,), np.uint8)
        assert (caught.value.asked, caught.value.free) == (1, 0)
        assert "65" not in str(caught.value)
    with scratch.frame():
        scratch.empty((128,), np.uint8)


@pytest.mark.parametrize("size", [1, 63, 65, 100, 127])
def test_scratch_of_an_odd_size_never_promises_more_than_it_has(size: int) -> None:
    _, scratch = _scratch(size)
    with scratch.frame():
        assert scratch.empty((size,), np.uint8).size == size
    rounded = -(-size // ALIGNMENT) * ALIGNMENT
    with scratch.frame(), suppress(BudgetExceeded):
        assert scratch.empty((rounded,), np.uint8).size == rounded


def test_a_million_mixed_allocations_leave_no_trace_of_fragmentation() -> None:
    """What long-lived sessions do to an arena: sizes over four orders of magnitude, freed in any order.

    Whenever everything but a few blocks is free again, the arena gives what a fresh one with these blocks would give;
    and at the end it is one gap.
    """
    choose, memory = random.Random(7), SecureMemory(1 << 20)
    blocks: list[Block] = []
    allocations = 0
    while allocations < 1_000_000:
        most = choose.choice((8, 64, 256))
        for _ in range(most):
            size = 1 << choose.randrange(5, 17)
            with suppress(BudgetExceeded):
                blocks.append(memory.allocate("mixed", (choose.randrange(1, size),), np.uint8))
        allocations += most
        choose.shuffle(blocks)
        while len(blocks) > most // 8:
            blocks.pop().free()
        assert memory.largest_free() >= (memory.budget - memory.used) // (len(blocks) + 1)
        if choose.random() < 0.001:
            _check(memory, blocks)
    for block in blocks:
        block.free()
    assert memory.largest_free() == memory.budget
    assert memory.used == 0
    assert memory.by_owner() == {}
