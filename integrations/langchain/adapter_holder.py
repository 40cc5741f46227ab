"""The LoRA adapter of an object: which it is, what tells it apart, and how to have another."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quire.errors import ConfigError, QuireError
from quire.integrations.adapters import (
    Wanted,
    adapter_at,
    as_wanted,
    found_adapter,
    plain_form,
)
from quire.integrations.langchain.engine_holder import EngineHolder
from quire.lora_request import LoRARequest
from quire.utils.checks import shown

if TYPE_CHECKING:
    from typing_extensions import Self

    from quire.request_maker import FoundAdapter


class AdapterHolder(EngineHolder):
    """An engine, and the adapter that requests to it run with; a base beside LangChain's own."""

    lora_request: Any = None

    @classmethod
    def _by_field(cls, owner: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        values = super()._by_field(owner, kwargs)
        if "lora_request" in values:
            values["lora_request"] = as_wanted(values["lora_request"])
        return values

    def _check_fields(self) -> None:
        super()._check_fields()
        if self.lora_request is None:
            return
        if self.client is None:
            enabled = bool(self.vllm_kwargs.get("enable_lora"))
        else:
            config = getattr(self.client, "config", None)
            enabled = config is None or config.lora.enable_lora  # what is no engine is told later
        if not enabled:
            raise ConfigError(
                f"lora_request={shown(self.lora_request)} needs an engine with adapters: give "
                "vllm_kwargs={'enable_lora': True}, or a client that was made with enable_lora=True"
            )

    def _attach(self, given: Mapping[str, Any]) -> None:
        super()._attach(given)
        # One that is called by name alone may be loaded later.
        if isinstance(self.lora_request, LoRARequest) and self.lora_request.lora_path:
            self._found_own()

    def with_lora(
        self, path: str | os.PathLike[str] | LoRARequest | None, name: str | None = None
    ) -> Self:
        """Return a second model on the same engine, with an adapter or without.

        Both may be used at once, and their requests run in one batch. The engine lives until the
        last of them is closed or dropped.

        Parameters
        ----------
        path : str, path, LoRARequest or None
            A folder in peft's format, or a name on the hub. What lies there when a call begins is
            what the call runs with, also after it was changed. None is the base model, or with a
            name the adapter that is loaded under it.
        name : str, optional
            What the adapter is called; by default what its folder is.

        Raises
        ------
        ConfigError
            The engine was made without ``enable_lora``.
        InvalidRequestError
            There is no such adapter (AdapterError), or it does not fit the model.
        """
        self._open_lease()
        copied = self.model_copy(update={"lora_request": adapter_at(path, name)})
        try:
            copied._found_own()
        except BaseException:
            copied.close()
            raise
        return copied

    def _found(self, wanted: Wanted) -> FoundAdapter:
        """Return an adapter as it is now."""
        return found_adapter(self._open_lease().llm, wanted)

    def _found_own(self) -> FoundAdapter | None:
        """Return the object's adapter as it is now; None where it has none."""
        return None if self.lora_request is None else self._found(self.lora_request)

    async def _afound_own(self) -> FoundAdapter | None:
        if self.lora_request is None:
            return None
        return await asyncio.to_thread(self._found, self.lora_request)

    @property
    def _adapter_name(self) -> Any:
        """What tells the adapter from others: its content; where there is none, its names."""
        try:
            found = self._found_own()
        except QuireError:  # a call will say so; to be looked at, a model need not be in order
            return plain_form(self.lora_request)
        if found is None or found.adapter is None:
            return None
        return found.adapter.digest

    def to_json(self) -> Any:
        """Return the form that ``dumps`` writes."""
        form = super().to_json()
        kwargs: dict[str, Any] = form.get("kwargs", {})
        if "lora_request" in kwargs:
            kwargs["lora_request"] = plain_form(kwargs["lora_request"])
        return form
