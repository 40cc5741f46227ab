"""Work that nobody waits for any more is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from quire.server.errors import ApiError

T = TypeVar("T")

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


def client_gone() -> ApiError:
    """Return the error for a client that went away: nobody reads it but the access log."""
    return ApiError(499, "the client closed the connection", code="client_gone")


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work``, but cancel it when the client goes away.

    Parameters
    ----------
    receive : callable
        Of the ASGI request, whose body has been read.
    work : coroutine

    Raises
    ------
    ApiError
        499: the client went away; ``work`` has ended by now.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            watcher.result()  # it may have failed, which is not for us to hide
            raise client_gone()
        return task.result()
    finally:
        await _end(watcher)
        await _end(task)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()  # has been seen
