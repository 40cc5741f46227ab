"""ProgressBar: a bar over requests, with tokens per second in and out."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from quire.outputs import RequestOutput


def auto_tqdm() -> Callable[..., Any]:
    """Return ``tqdm.auto.tqdm``, imported without a word.

    In a notebook without ipywidgets it is the bar of text, and its first import warns of that.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        from tqdm.auto import tqdm

    return tqdm  # type: ignore[no-any-return]


def quiet_tqdm() -> None:
    """In a notebook, import tqdm before another library does so with a warning."""
    if "ipykernel" in sys.modules:
        auto_tqdm()


class ProgressBar:
    """Counts finished requests and their tokens on a tqdm bar, or does nothing.

    Parameters
    ----------
    total : int
        Requests to come.
    use_tqdm : bool or callable
        True for ``tqdm.auto.tqdm``, False for nothing, or what is called in tqdm's place.
    """

    def __init__(self, total: int, use_tqdm: bool | Callable[..., Any]) -> None:
        self._bar: Any = None
        self._start = time.perf_counter()
        self._tokens_in = self._tokens_out = 0
        if not use_tqdm:
            return
        if callable(use_tqdm):
            make = use_tqdm
        else:
            make = auto_tqdm()
        self._bar = make(total=total, desc="Processed prompts", dynamic_ncols=True)

    def advance(self, result: RequestOutput | BaseException) -> None:
        """Count one request that has ended."""
        if self._bar is None:
            return
        if isinstance(result, RequestOutput):
            self._tokens_in += len(result.prompt_token_ids)
            self._tokens_out += sum(len(output.token_ids) for output in result.outputs)
        seconds = max(time.perf_counter() - self._start, 1e-9)
        self._bar.set_postfix_str(
            f"in {self._tokens_in / seconds:.1f} tok/s, out {self._tokens_out / seconds:.1f} tok/s",
            refresh=False,
        )
        self._bar.update(1)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
