"""Caches are bounded per sequence and in all, and what is dropped is free again."""

from dataclasses import replace
from pathlib import Path

import pytest

from gpu_worker.cache import CacheBudget, CacheStore
from wire.errors import ContextError, ExhaustedError, InvalidArgumentError
from wire.model_config import ModelConfig


@pytest.fixture
def config(model_folders: dict[str, Path]) -> ModelConfig:
    return ModelConfig.from_hf(model_folders["llama-untied"])


def _bytes_per_token(config: ModelConfig) -> int:
    return 2 * 4 * config.layers * config.kv_heads * config.head_dim


def test_a_full_sequence_refuses_more_rows(config: ModelConfig) -> None:
    store = CacheStore(CacheBudget())
    store.reserve(5, config, 10, "cpu")
    [(sequence, rows)] = store.find([(5, 10)], config)
    sequence.advance(rows)
    with pytest.raises(ContextError):
        store.find([(5, 1)], config)


def test_unknown_and_doubled_numbers_are_refused(config: ModelConfig) -> None:
    store = CacheStore(CacheBudget())
    store.reserve(1, config, 4, "cpu")
    with pytest.raises(InvalidArgumentError):
        store.reserve(1, config, 4, "cpu")
    with pytest.raises(InvalidArgumentError):
        store.drop(2)
    with pytest.raises(InvalidArgumentError):
        store.find([(2, 1)], config)
    with pytest.raises(ContextError):
        store.reserve(3, config, config.max_context + 1, "cpu")


def test_a_sequence_of_a_replaced_model_is_unknown(config: ModelConfig) -> None:
    store = CacheStore(CacheBudget())
    store.reserve(1, config, 4, "cpu")
    with pytest.raises(InvalidArgumentError):
        store.find([(1, 1)], replace(config))


def test_stores_share_one_budget_and_give_it_back(config: ModelConfig) -> None:
    budget = CacheBudget(limit=20 * _bytes_per_token(config))
    first, second = CacheStore(budget), CacheStore(budget)
    first.reserve(1, config, 12, "cpu")
    with pytest.raises(ExhaustedError, match="would fit"):
        second.reserve(1, config, 9, "cpu")
    second.reserve(1, config, 8, "cpu")
    first.drop(1)
    second.clear()
    assert budget.left == 20 * _bytes_per_token(config)
