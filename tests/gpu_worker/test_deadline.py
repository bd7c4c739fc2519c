"""Deadlines of a stream: over within one wait, not by many, and not mistaken for the end of everything."""

import asyncio

import pytest

from gpu_worker.deadline import Deadline
from wire.errors import DeadlineError


async def test_a_wait_that_is_too_long_ends() -> None:
    deadline = Deadline(0.05, "too long")
    with pytest.raises(DeadlineError, match="too long"), deadline:
        await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task
    assert not task.cancelling()
    await asyncio.sleep(0)  # nothing is left to be cancelled
    deadline.close()


async def test_short_waits_may_add_up_and_between_them_is_no_deadline() -> None:
    deadline = Deadline(0.2, "too long")
    for _ in range(10):
        with deadline:
            await asyncio.sleep(0.03)
    await asyncio.sleep(0.5)
    with deadline:
        await asyncio.sleep(0)
    deadline.close()


async def test_errors_pass_and_so_does_a_cancellation_by_others() -> None:
    deadline = Deadline(10.0, "too long")
    with pytest.raises(ZeroDivisionError), deadline:
        raise ZeroDivisionError
    deadline.close()

    async def wait() -> None:
        own = Deadline(10.0, "too long")
        with own:
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_who_is_cancelled_by_others_too_is_cancelled() -> None:
    async def wait() -> None:
        with Deadline(0.02, "too long"):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                task = asyncio.current_task()
                assert task
                task.cancel()
                raise

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(wait())
