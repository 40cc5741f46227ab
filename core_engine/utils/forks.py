"""Forks: where a child process may compute."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_is_fork = False


def _note_fork() -> None:
    global _is_fork
    _is_fork = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def compute(function: Callable[[], T]) -> T:
    """Return what a function returns that computes with torch, in a fork, too.

    OpenMP waits for ever for the worker threads that the thread which forked had in the parent
    process; a new thread has none yet.
    """
    if not _is_fork:
        return function()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()
