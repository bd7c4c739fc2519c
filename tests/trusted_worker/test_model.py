"""What the decoder asks of a scheme and of the GPU worker, step by step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import build, forward
from trusted_worker.model import Batch, Run
from wire.errors import ContextError

SCHEMES = [("split", "float32"), ("split", "int8"), ("secure-infer", "int8"), ("tee-only", "int8")]


@pytest.mark.parametrize(("scheme", "precision"), SCHEMES)
def test_a_prefill_chunk_that_wants_no_logits_makes_no_empty_call(
    model_folder: Callable[[str], Path], scheme: str, precision: str
) -> None:
    rig = build(model_folder("llama"), scheme, precision)
    cache = rig.scheme.open(4)
    ids = np.array([1, 2, 3], np.int32)
    cache.wake(4)
    logits = forward(rig.scheme, Batch(ids, (Run(cache, 0, 3, 0),), np.empty(0, np.int32)))
    assert len(logits) == 0
    assert cache.length == 3
    last = forward(rig.scheme, Batch(ids[:1], (Run(cache, 0, 1, 3),), np.zeros(1, np.int32)))
    np.testing.assert_allclose(last, rig.logits([1, 2, 3, 1])[-1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scheme", "precision"), SCHEMES)
def test_a_context_that_is_full_leaves_the_cache_as_it_was(
    model_folder: Callable[[str], Path], scheme: str, precision: str
) -> None:
    rig = build(model_folder("llama"), scheme, precision)
    cache = rig.scheme.open(2)
    assert cache.wake(3) == 2
    forward(rig.scheme, Batch(np.array([1, 2], np.int32), (Run(cache, 0, 2, 0),), np.array([1], np.int32)))
    with pytest.raises(ContextError):
        cache.wake(1)
    assert cache.length == 2


@pytest.mark.parametrize(("scheme", "precision"), SCHEMES)
def test_a_step_of_the_most_rows_fits_its_scratch_and_leaves_nothing(
    model_folder: Callable[[str], Path], scheme: str, precision: str
) -> None:
    rig = build(model_folder("llama"), scheme, precision)
    caches = [rig.scheme.open(4) for _ in range(16)]
    for cache in caches:
        cache.wake(4)
    runs = tuple(Run(cache, 4 * i, 4 * i + 4, 0) for i, cache in enumerate(caches))
    ids = np.arange(64, dtype=np.int32)
    used = rig.memory.used
    logits = forward(rig.scheme, Batch(ids, runs, np.arange(3, 64, 4, dtype=np.int32)))
    assert logits.shape == (16, rig.config.vocabulary)
    assert rig.memory.used == used
    assert not rig.scratch._block.array.any()
