"""What the decoder asks of a scheme and of the GPU worker, step by step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import build
from trusted_worker.model import Batch, Run, scratch_bytes
from wire.errors import ContextError

SCHEMES = [("split", "float32"), ("split", "int8"), ("secure-infer", "int8"), ("tee-only", "int8")]


@pytest.mark.parametrize(("scheme", "precision"), SCHEMES)
def test_a_prefill_chunk_that_wants_no_logits_makes_no_empty_call(
    model_folder: Callable[[str], Path], scheme: str, precision: str
) -> None:
    rig = build(model_folder("llama"), scheme, precision)
    cache = rig.scheme.open(4)
    ids = np.array([1, 2, 3], np.int32)
    logits = rig.scheme.forward(Batch(ids, (Run(cache, 0, 3, 0),), np.empty(0, np.int32)))
    assert logits.shape == (0, rig.config.vocabulary)
    assert cache.length == 3
    last = rig.scheme.forward(Batch(ids[:1], (Run(cache, 0, 1, 3),), np.zeros(1, np.int32)))
    np.testing.assert_allclose(last, rig.logits([1, 2, 3, 1])[-1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scheme", "precision"), SCHEMES)
def test_a_context_that_is_full_leaves_the_cache_as_it_was(
    model_folder: Callable[[str], Path], scheme: str, precision: str
) -> None:
    rig = build(model_folder("llama"), scheme, precision)
    cache = rig.scheme.open(2)
    with pytest.raises(ContextError):
        rig.scheme.forward(Batch(np.array([1, 2, 3], np.int32), (Run(cache, 0, 3, 0),), np.array([2], np.int32)))
    assert cache.length == 0


@pytest.mark.parametrize(("scheme", "precision"), SCHEMES)
def test_a_step_of_the_most_rows_fits_its_scratch_and_leaves_nothing(
    model_folder: Callable[[str], Path], scheme: str, precision: str
) -> None:
    rig = build(model_folder("llama"), scheme, precision)
    caches = [rig.scheme.open(4) for _ in range(16)]
    runs = tuple(Run(cache, 4 * i, 4 * i + 4, 0) for i, cache in enumerate(caches))
    ids = np.arange(64, dtype=np.int32)
    used = rig.memory.used
    logits = rig.scheme.forward(Batch(ids, runs, np.arange(3, 64, 4, dtype=np.int32)))
    assert logits.shape == (16, rig.config.vocabulary)
    assert rig.memory.used == used
    scratch = getattr(rig.scheme, "_scratch")  # noqa: B009  (schemes are a protocol without it)
    assert not scratch._block.array.any()
    assert scratch_bytes(rig.weights, 64) <= scratch._block.size
