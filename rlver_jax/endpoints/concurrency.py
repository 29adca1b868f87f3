"""Many conversations with endpoints at a time, from code that isn't asynchronous."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def as_finished(
    work: Sequence[Callable[[], Coroutine[Any, Any, T]]], at_once: int, close: Callable[[], Coroutine[Any, Any, None]]
) -> Iterator[list[T]]:
    """Runs tasks in an event loop of their own, and yields results as they come, a few at a time.

    Whoever stops iterating, or is interrupted, cancels the rest.

    Args:
        at_once: tasks that run at the same time; the first ones begin first.
        close: runs last, in the same event loop.

    Raises:
        the first exception of a task, after the results that came with it have been yielded.
    """
    with asyncio.Runner() as runner:
        slots = asyncio.Semaphore(at_once)

        async def in_slot(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
            async with slots:
                return await start()

        async def settle() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # others may have failed as well
            await close()

        tasks = {runner.get_loop().create_task(in_slot(start)) for start in work}
        try:
            while tasks:
                done, tasks = runner.run(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))
                errors = [task.exception() for task in done]
                results = [task.result() for task, error in zip(done, errors, strict=True) if not error]
                if results:
                    yield results
                for error in filter(None, errors):
                    raise error
        finally:
            runner.run(settle())
