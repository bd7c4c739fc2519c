"""Tiny random model folders in Hugging Face layout, and a worker served in-process on a Unix socket."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import numba
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from gpu_worker.server import Compute, Servicer, make_server
from gpu_worker.worker import Worker
from wire.channel import client_options
from wire.v1 import gpu_worker_pb2_grpc

SIZES: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}

Serve = Callable[..., AbstractAsyncContextManager[Any]]


def _llama(**more: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **more))


def _qwen(**more: Any) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **more))


def _save(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Biases and norm gains start as 0 and 1: make them count. Then save."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    model.to(dtype).save_pretrained(folder)


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Tests of this folder may be coroutines."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), 60))
    return True


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """For the tests that calculate in the main thread."""
    one_thread_here()


def one_thread_here() -> None:
    """Tiny products gain nothing from a second core and lose much to its waking up. Counts are kept per thread."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name: GQA in all, with and without biases, tied and untied, float32 and bfloat16."""
    torch.manual_seed(7)
    root = tmp_path_factory.mktemp("models")
    made = {
        "qwen-tied": (_qwen(tie_word_embeddings=True), torch.float32),
        "qwen-untied-bf16": (_qwen(tie_word_embeddings=False, rope_theta=1e6), torch.bfloat16),
        "llama-untied": (_llama(tie_word_embeddings=False), torch.float32),
        "llama-biased-bf16": (_llama(attention_bias=True, mlp_bias=True, head_dim=16), torch.bfloat16),
    }
    for name, (model, dtype) in made.items():
        _save(model, root / name, dtype)
    return {name: root / name for name in made}


@pytest.fixture
def serve(model_folders: dict[str, Path], tmp_path: Path) -> Serve:
    """`async with serve(ring_only=False) as stub`: a worker in this process. `stub.raw_execute` sends bare bytes."""

    @asynccontextmanager
    async def start(ring_only: bool = False) -> AsyncIterator[Any]:
        def make_worker() -> Worker:
            one_thread_here()
            return Worker(model_folders, "cpu", ring_only)

        compute = Compute(make_worker)
        server = make_server(Servicer(compute, list(model_folders), ring_only))
        address = f"unix:{tmp_path}/worker"
        server.add_insecure_port(address)
        await server.start()
        async with grpc.aio.insecure_channel(address, options=client_options()) as channel:
            stub = gpu_worker_pb2_grpc.GpuWorkerServiceStub(channel)
            stub.raw_execute = channel.stream_stream("/wire.v1.GpuWorkerService/Execute")  # type: ignore[attr-defined]
            yield stub
        await server.stop(0)
        compute.stop()

    return start
