"""LangChain's cache, kept from storing failures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.caches import BaseCache
from langchain_core.globals import get_llm_cache
from langchain_core.outputs import Generation

from quire.integrations.langchain.results import failure_in


class SuccessesOnly(BaseCache):
    """Passes everything on to another cache, except the results of prompts that failed."""

    def __init__(self, inner: BaseCache) -> None:
        self._inner = inner

    def lookup(self, prompt: str, llm_string: str) -> Sequence[Generation] | None:
        """Look up as the other cache does."""
        return self._inner.lookup(prompt, llm_string)

    def update(self, prompt: str, llm_string: str, return_val: Sequence[Generation]) -> None:
        """Store a result that is not a failure."""
        if failure_in(return_val) is None:
            self._inner.update(prompt, llm_string, return_val)

    def clear(self, **kwargs: Any) -> None:
        """Clear the other cache."""
        self._inner.clear(**kwargs)

    async def alookup(self, prompt: str, llm_string: str) -> Sequence[Generation] | None:
        """Look up as the other cache does."""
        return await self._inner.alookup(prompt, llm_string)

    async def aupdate(self, prompt: str, llm_string: str, return_val: Sequence[Generation]) -> None:
        """Store a result that is not a failure."""
        if failure_in(return_val) is None:
            await self._inner.aupdate(prompt, llm_string, return_val)

    async def aclear(self, **kwargs: Any) -> None:
        """Clear the other cache."""
        await self._inner.aclear(**kwargs)


def without_failures(cache: BaseCache | bool | None) -> BaseCache | bool | None:
    """Return a model's ``cache`` setting such that no failure is stored.

    Parameters
    ----------
    cache : BaseCache, bool or None
        As LangChain's models have it: None and True stand for the global cache.
    """
    if cache is False:
        return cache
    inner = cache if isinstance(cache, BaseCache) else get_llm_cache()
    # True without a global cache is for LangChain to refuse.
    return cache if inner is None else SuccessesOnly(inner)
