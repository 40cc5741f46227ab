"""What every object of this package that runs on an engine has: its engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from langchain_core.load.serializable import Serializable
from pydantic import ConfigDict, Field, PrivateAttr, field_serializer, field_validator

from quire import __version__
from quire.config import EngineConfig, argument_names
from quire.errors import ConfigError, EngineClosedError
from quire.html import card
from quire.integrations.engines import (
    EngineLease,
    acquire,
    borrow,
    checkpoint_fingerprint,
    hub_commit,
)
from quire.integrations.langchain.identity import callable_name, digest
from quire.lora_request import LoRARequest
from quire.utils.suggest import unexpected_argument

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_ENGINE_FIELDS = (
    "model",
    "tensor_parallel_size",
    "trust_remote_code",
    "dtype",
    "download_dir",
    "vllm_kwargs",
)
"""Fields that say which engine is needed."""

_NOT_LISTED = frozenset({"model", "revision", "dtype", "download_dir", "hf_token"})
"""Engine arguments that change no answer, or that have an entry of their own."""


class EngineHolder(Serializable):
    """Fields that say which engine is needed, a hold on it, and its identity.

    A base beside LangChain's own. The fields are described in
    :class:`~quire.integrations.langchain.vllm.VLLM`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: str = Field(default="", frozen=True)
    tensor_parallel_size: int | None = Field(default=1, frozen=True)
    trust_remote_code: bool | None = Field(default=False, frozen=True)
    dtype: str = Field(default="auto", frozen=True)
    download_dir: str | None = Field(default=None, frozen=True)
    vllm_kwargs: dict[str, Any] = Field(default_factory=dict, frozen=True)
    client: Any = Field(default=None, frozen=True, exclude=True, repr=False)

    _lease: EngineLease | None = PrivateAttr(default=None)
    _engine_identity: dict[str, Any] = PrivateAttr(default_factory=dict)

    _OTHER_NAMES: ClassVar[frozenset[str]] = frozenset()
    """Arguments that are other names of fields; :meth:`_by_field` knows which."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs = self._by_field(type(self).__name__, kwargs)
        self._refuse_unknown(kwargs)
        if isinstance(kwargs.get("model"), os.PathLike):
            kwargs["model"] = os.fspath(kwargs["model"])
        super().__init__(**kwargs)
        self._check_fields()  # bad values are told before a model is loaded
        self._attach(kwargs)
        add_version = getattr(self, "_add_version", None)  # langchain-core 1.4 and newer
        if add_version is not None:
            add_version("quire", __version__)

    # -- arguments -------------------------------------------------------------------------------

    @field_validator("tensor_parallel_size", mode="before")
    @classmethod
    def _no_count(cls, value: Any) -> Any:
        return no_flag(value)

    @classmethod
    def _by_field(cls, owner: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments by the names of the fields that they are for."""
        return dict(kwargs)

    def _check_fields(self) -> None:
        """Refuse values that no call could be made with."""

    @classmethod
    def _refuse_unknown(cls, kwargs: Mapping[str, Any]) -> None:
        valid = {*cls.model_fields, *cls._OTHER_NAMES}
        valid |= {field.alias for field in cls.model_fields.values() if field.alias}
        for name in kwargs:
            if name in valid:
                continue
            if name in argument_names():
                raise TypeError(
                    f"{cls.__name__}() got an unexpected argument {name!r}: an engine argument "
                    f"goes into vllm_kwargs={_masked({name: kwargs[name]})!r}"
                )
            raise unexpected_argument(cls.__name__, name, valid)

    # -- engine ----------------------------------------------------------------------------------

    def _attach(self, given: Mapping[str, Any]) -> None:
        """Take hold of the engine that the fields ask for."""
        if self.client is None:
            if not self.model:
                raise ConfigError(
                    "model is empty: name a folder, a model of the hub or 'quire/demo', or give "
                    "client= an engine"
                )
            lease = acquire(self._engine_config())
        else:
            lease = self._attach_client(given)
        self._lease = lease
        self._engine_identity = _engine_identity(lease.llm.config)
        # The field is frozen for users: it goes with the others that say which engine this is.
        self.__dict__["client"] = lease.llm

    def _attach_client(self, given: Mapping[str, Any]) -> EngineLease:
        from quire.llm import LLM

        if not isinstance(self.client, LLM):
            raise ConfigError(f"client must be a quire.LLM, not {self.client!r}")
        lease = borrow(self.client)
        served = self.client.config.to_kwargs()
        asked = {name: given[name] for name in _ENGINE_FIELDS if given.get(name)}
        own = {name: value for name, value in asked.items() if name != "vllm_kwargs"}
        # Extra engine arguments are compared as a whole: leaving one out asks for its default.
        kept = [n for n in served if n in _ENGINE_FIELDS or "vllm_kwargs" not in given]
        wanted = EngineConfig.create(
            **{**{name: served[name] for name in kept}, **own, **self.vllm_kwargs}
        )
        if wanted != self.client.config:
            if lease.shared and self.model:
                # Another model object's engine came along, as with a configurable model.
                return acquire(self._engine_config())
            raise ConfigError(
                f"client runs {self.client.config!r}, and the arguments beside it ask for "
                f"{wanted!r}: leave them out, or leave out client"
            )
        default = EngineConfig.create(served["model"]).to_kwargs()
        changed = {
            k: v for k, v in sorted(served.items()) if k not in _ENGINE_FIELDS and v != default[k]
        }
        self.__dict__.update({k: v for k, v in served.items() if k in _ENGINE_FIELDS})
        self.__dict__["vllm_kwargs"] = changed
        return lease

    def _engine_config(self) -> EngineConfig:
        own = {name: getattr(self, name) for name in _ENGINE_FIELDS if name != "vllm_kwargs"}
        twice = sorted(own.keys() & self.vllm_kwargs.keys())
        if twice:
            raise TypeError(
                f"vllm_kwargs has {twice[0]!r}, which {type(self).__name__} takes as an argument "
                "of its own"
            )
        return EngineConfig.create(**own, **self.vllm_kwargs)

    def _open_lease(self) -> EngineLease:
        if self._lease is None:
            raise EngineClosedError(
                f"{self!r} was made without its engine, as by model_construct; make it by "
                f"{type(self).__name__}(...)"
            )
        if self._lease.closed:
            raise EngineClosedError(f"{self!r} was closed; make a new one")
        return self._lease

    def close(self) -> None:
        """Let go of the engine; the last user's closing frees its memory. May be called again.

        An engine that was given as ``client`` and not made by another model is left running.
        """
        self.__dict__["client"] = None
        if self._lease is not None:
            self._lease.close()

    def __enter__(self) -> Self:
        """Return self, which is closed at the end of the block."""
        self._open_lease()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    # -- copies ----------------------------------------------------------------------------------

    def _call_copy(self) -> Self:
        """Return a copy for one call: it has this object's lease, and ends with it."""
        return super().__copy__()

    def _forget_derived(self) -> None:
        # LangChain keeps the serialized form, and fields of a copy may change.
        self.__dict__.pop("_serialized", None)

    def _share_lease(self) -> None:
        if self._lease is not None and not self._lease.closed:
            self._lease = self._lease.share()

    def __copy__(self) -> Self:
        copied = super().__copy__()
        copied._forget_derived()
        copied._share_lease()
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        for whole in (self.client, self._lease):  # an engine is shared, never copied
            if whole is not None:
                memo[id(whole)] = whole
        copied = super().__deepcopy__(memo)
        copied._forget_derived()
        copied._share_lease()
        return copied

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy on the same engine, with some fields changed.

        Parameters
        ----------
        update : dict, optional
            Fields to change. A change of those that belong to the engine looks for the engine
            that they ask for.
        deep : bool
            Copy what the fields hold, except the engine.

        Raises
        ------
        TypeError
            For a field that does not exist.
        InvalidRequestError
            For sampling parameters that are wrong.
        """
        copied = super().model_copy(deep=deep)
        if not update:
            return copied
        values = self._by_field(f"{type(self).__name__}.model_copy", update)
        self._refuse_unknown(values)
        fields = {name: copied.__dict__[name] for name in type(self).model_fields}
        if values.keys() & {*_ENGINE_FIELDS, "client"}:
            return type(self)(**{**fields, **values})
        copied.__dict__.update(values)
        copied.__pydantic_fields_set__.update(values)
        copied._check_fields()
        return copied

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        fields = {k: v for k, v in state["__dict__"].items() if k != "_serialized"}
        private = {k: v for k, v in (state["__pydantic_private__"] or {}).items() if k != "_lease"}
        return {
            **state,
            "__dict__": {**fields, "client": None},
            "__pydantic_private__": {**private, "_lease": None},
        }

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self._attach({})

    # -- serialisation and display ---------------------------------------------------------------

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Return True: the constructor's arguments, secrets apart, are all there is to a model."""
        return True

    def to_json(self) -> Any:
        """Return the form that ``dumps`` writes; the hub token is left to the environment."""
        form = super().to_json()
        kwargs: dict[str, Any] = form.get("kwargs", {})  # type: ignore[assignment]
        if "vllm_kwargs" in kwargs:
            kwargs["vllm_kwargs"] = self._plain_arguments(kwargs["vllm_kwargs"])
        return form

    @field_serializer("vllm_kwargs")
    def _plain_arguments(self, value: dict[str, Any]) -> dict[str, Any]:
        plain = {k: v for k, v in value.items() if k != "hf_token"}
        modules = plain.get("lora_modules")
        if isinstance(modules, (list, tuple)):
            plain["lora_modules"] = [_plain_module(module) for module in modules]
        return plain

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            if name == "vllm_kwargs":
                if value:
                    yield name, _masked(value)
            elif name != "metadata" or set(value) != {"lc_versions"}:
                yield name, value
        if self._lease is not None and self._lease.closed:
            yield "closed", True

    def _repr_html_(self) -> str:
        shown = ((name or "", value) for name, value in self.__repr_args__())
        return card(type(self).__name__, shown)


def no_flag(value: Any) -> Any:
    """Return a value for a field that is a number; pydantic would take a flag for 0 or 1."""
    if isinstance(value, bool):
        raise ValueError(f"it must be a number, not {value}")
    return value


def _engine_identity(config: EngineConfig) -> dict[str, Any]:
    """Return what of an engine changes its answers; memory and scheduling do not."""

    def relevant(config: EngineConfig) -> dict[str, Any]:
        return {
            **vars(config.model),
            "seed": config.seed,
            "device": config.device,
            "lora_dtype": config.lora.lora_dtype,
            "logits_processors": [callable_name(p) for p in config.logits_processors],
        }

    default = relevant(EngineConfig.create(config.model.model))
    files = checkpoint_fingerprint(config)
    return {
        "model": config.model.model,
        "revision": config.model.revision,
        "checkpoint": digest(files) if "model" in files else hub_commit(config),
        "dtype": config.model.dtype,
        "engine": {
            name: value
            for name, value in relevant(config).items()
            if name not in _NOT_LISTED and value != default[name]
        },
    }


def _plain_module(module: Any) -> Any:
    """Return an entry of ``lora_modules`` in the words of JSON."""
    if not isinstance(module, LoRARequest):
        return module
    entry = {"name": module.lora_name, "path": module.lora_path}
    base = module.base_model_name
    return entry if base is None else {**entry, "base_model_name": base}


def _masked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return engine arguments as a person is shown them, the hub token hidden."""
    token = arguments.get("hf_token")
    if token is None or isinstance(token, bool):  # True: the stored token, which is not shown
        return {**arguments}
    return {**arguments, "hf_token": "***"}
