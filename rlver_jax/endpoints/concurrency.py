"""Many conversations with endpoints at a time, from code that isn't asynchronous."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def as_finished(
    work: Sequence[Callable[[], Coroutine[Any, Any, T]]], at_once: int, close: Callable[[], Coroutine[Any, Any, None]]
) -> Iterator[list[T]]:
    """Runs pieces of work in an event loop of their own, and yields results as they come, some at a time.

    Whoever stops iterating, or is interrupted, cancels the rest.

    Args:
        at_once: pieces that run at the same time; the first ones begin first.
        close: runs last, in the same event loop.

    Raises:
        the first exception of a piece, after the results that came with it have been yielded.
    """
    with asyncio.Runner() as runner:
        places = asyncio.Semaphore(at_once)

        async def placed(piece: Callable[[], Coroutine[Any, Any, T]]) -> T:
            async with places:
                return await piece()

        async def settle() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # others may have failed as well
            await close()

        tasks = {runner.get_loop().create_task(placed(piece)) for piece in work}
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
