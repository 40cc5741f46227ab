"""What a LangChain model of a server is made of: a connection and the parameters of a request."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.load.serializable import Serializable
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, field_validator

from quire import __version__
from quire.errors import ConfigError
from quire.integrations.langchain.connection import (
    Connection,
    Settings,
    connection_for,
    connection_of,
    require_openai,
    shown_url,
)
from quire.integrations.langchain.remote_arguments import (
    EXTRA_FIELDS,
    OPENAI_FIELDS,
    REQUEST_ARGUMENTS,
    by_field_name,
    check_key,
    check_timeout,
    settled_arguments,
    shown_headers,
    without_secrets,
)
from quire.integrations.langchain.stops import merged_stop
from quire.sampling_params import SamplingParams
from quire.structured_outputs import StructuredOutputsParams
from quire.utils.checks import refuse
from quire.utils.suggest import unexpected_argument

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_URL = "http://localhost:8000/v1"
"""Where ``quire serve`` answers if nothing else is said."""

_KEY_VARIABLES = ("QUIRE_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY")
_URL_VARIABLES = ("OPENAI_API_BASE", "OPENAI_BASE_URL")
_ORGANIZATION_VARIABLES = ("OPENAI_ORG_ID", "OPENAI_ORGANIZATION")

_HEADERS = ("extra_headers", "extra_query")

_NUMBERS = (
    "temperature",
    "max_tokens",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "n",
    "best_of",
    "batch_size",
    "logprobs",
    "seed",
    "max_retries",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "length_penalty",
)
"""Fields in which True is no 1."""


class RemoteModel(Serializable):
    """Fields, connection and identity; a base beside LangChain's own.

    The fields are described in :class:`~quire.integrations.langchain.vllm_openai.VLLMOpenAI`.
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True, populate_by_name=True, protected_namespaces=()
    )

    client: Any = Field(default=None, frozen=True, exclude=True, repr=False)
    async_client: Any = Field(default=None, frozen=True, exclude=True, repr=False)
    model_name: str = Field(default="", alias="model")

    openai_api_key: SecretStr | None = Field(default=None, alias="api_key", frozen=True)
    openai_api_base: str | None = Field(default=None, alias="base_url", frozen=True)
    openai_organization: str | None = Field(default=None, alias="organization", frozen=True)
    openai_proxy: str | None = Field(default=None, frozen=True, repr=False)
    request_timeout: float | tuple[float, float] | Any | None = Field(
        default=None, alias="timeout", frozen=True
    )
    max_retries: int = Field(default=2, frozen=True, ge=0)
    default_headers: Mapping[str, str] | None = Field(default=None, frozen=True)
    default_query: Mapping[str, object] | None = Field(default=None, frozen=True)
    http_client: Any = Field(default=None, frozen=True, exclude=True, repr=False)
    http_async_client: Any = Field(default=None, frozen=True, exclude=True, repr=False)

    temperature: float = 0.7
    max_tokens: int | None = 256
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    n: int = 1
    best_of: int | None = 1
    stop: list[str] | str | None = None
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: dict[str | int, float] | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: Any = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None

    batch_size: int = Field(default=20, ge=1)
    streaming: bool = False
    stream_usage: bool = True
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    extra_body: Mapping[str, Any] | None = None
    tiktoken_model_name: str | None = None
    allowed_special: Literal["all"] | Collection[str] = frozenset()
    disallowed_special: Literal["all"] | Collection[str] = "all"

    _connection: Connection | None = PrivateAttr(default=None)
    _key_source: str = PrivateAttr(default="")

    def __init__(self, **kwargs: Any) -> None:
        require_openai()
        fields = type(self).model_fields
        super().__init__(**settled_arguments(type(self).__name__, kwargs, fields))
        self._read_environment()
        self._check()
        self._attach()
        add_version = getattr(self, "_add_version", None)  # langchain-core 1.4 and newer
        if add_version is not None:
            add_version("quire", __version__)

    # -- arguments -------------------------------------------------------------------------------

    @field_validator(*_NUMBERS, mode="before")
    @classmethod
    def _no_number(cls, value: Any) -> Any:
        # Pydantic would take it for 0 or 1.
        if isinstance(value, bool):
            raise ValueError(f"it must be a number, not {value}")
        return value

    def _read_environment(self) -> None:
        """Fill in what was not given: the fields are frozen for users, so it is done here."""
        values = self.__dict__
        self._key_source = "given as openai_api_key"
        if self.openai_api_key is None or not self.openai_api_key.get_secret_value():
            name, key = _first_set(_KEY_VARIABLES)
            self._key_source = f"from {name}" if name else "none was given, 'EMPTY' was sent"
            values["openai_api_key"] = SecretStr(key or "EMPTY")
        values["openai_api_base"] = (
            self.openai_api_base or _first_set(_URL_VARIABLES)[1] or DEFAULT_URL
        )
        values["openai_organization"] = (
            self.openai_organization or _first_set(_ORGANIZATION_VARIABLES)[1]
        )
        if self.http_client is None and self.http_async_client is None:
            values["openai_proxy"] = self.openai_proxy or os.environ.get("OPENAI_PROXY") or None

    def _check(self) -> None:
        """Refuse what no request could be made of.

        Raises
        ------
        ConfigError, InvalidRequestError
            A value out of its range, or two that contradict each other.
        """
        if not self.model_name:
            raise ConfigError(
                "model_name is empty: name a model that the server has, as in "
                f"{shown_url(self._url)}/models"
            )
        if self.openai_api_key is not None:
            check_key(self.openai_api_key.get_secret_value(), self._key_source)
        check_timeout(self.request_timeout)
        if self.streaming:
            for name in ("n", "best_of"):
                if (getattr(self, name) or 1) > 1:
                    raise refuse(name, getattr(self, name), "1 with streaming, which shows one")
        self._sampling_params(None)
        body = self.extra_body or {}
        for name in EXTRA_FIELDS:
            if name in body and getattr(self, name) is not None:
                raise ConfigError(f"{name} is given as an argument and in extra_body")
        if self.logit_bias and not all(map(math.isfinite, self.logit_bias.values())):
            raise refuse("logit_bias", self.logit_bias, "finite: -100 forbids a token")

    def _call_values(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments by field name.

        Raises
        ------
        TypeError
            For a name that no call takes.
        """
        owner = f"a call of {type(self).__name__}"
        kwargs = dict(kwargs)
        own: dict[str, Any] = {}
        for name in REQUEST_ARGUMENTS & kwargs.keys():
            own[name] = kwargs.pop(name)
        values = by_field_name(owner, kwargs, type(self).model_fields)
        allowed = {*OPENAI_FIELDS, *EXTRA_FIELDS, "model_name", "stop", "extra_body", "streaming"}
        for name in values:
            if name in allowed:
                continue
            if name in type(self).model_fields:
                raise TypeError(
                    f"{owner} cannot change {name!r}: make another {type(self).__name__}"
                )
            raise unexpected_argument(owner, name, allowed | REQUEST_ARGUMENTS | {"model"})
        body = dict(self.extra_body or {})
        for name in EXTRA_FIELDS & values.keys():
            body.pop(name, None)
        given = values.get("extra_body") or {}
        for name in EXTRA_FIELDS & given.keys():
            values.setdefault(name, None)
        if body or given:
            values["extra_body"] = {**body, **given}
        if own:
            values["model_kwargs"] = {**self.model_kwargs, **own}
        return values

    def _merged_stop(self, stop: Any) -> list[str] | None:
        """Return the constructor's stop strings and a call's, each once."""
        return merged_stop(self.stop, stop)

    def _sampling_params(self, stop: Any) -> SamplingParams:
        """Return what the engine would be told, which checks it before a server is asked."""
        names = {field.name for field in dataclasses.fields(SamplingParams)}
        names &= {*OPENAI_FIELDS, *EXTRA_FIELDS}
        values = {name: getattr(self, name) for name in names}
        values = {name: value for name, value in values.items() if value is not None}
        if self._leaves_temperature_open:
            del values["temperature"]
        if self._best_of is None:
            values.pop("best_of", None)
        if self.max_tokens in (None, -1):
            values["max_tokens"] = None
        return SamplingParams(**values, stop=self._merged_stop(stop))

    @property
    def _leaves_temperature_open(self) -> bool:
        """Whether the default temperature is in the way, of a beam search, which has none."""
        return bool(self.use_beam_search) and "temperature" not in self.model_fields_set

    @property
    def _best_of(self) -> int | None:
        """What a request says: 1 is for compatibility, and as good as unset."""
        return None if self.best_of in (None, 1) else self.best_of

    # -- requests --------------------------------------------------------------------------------

    def _request(self, stop: Any) -> dict[str, Any]:
        """Return the arguments for the client's ``completions.create``, but the prompt.

        Raises
        ------
        InvalidRequestError
            A value out of its range, or two that contradict each other.
        """
        self._check()
        return {"model": self.model_name, **self._parameters(stop), **self.model_kwargs}

    def _parameters(self, stop: Any) -> dict[str, Any]:
        request = {name: getattr(self, name) for name in OPENAI_FIELDS}
        request["best_of"] = self._best_of
        request["stop"] = self._merged_stop(stop)
        if self._leaves_temperature_open:
            del request["temperature"]
        extra = {name: getattr(self, name) for name in EXTRA_FIELDS}
        extra["structured_outputs"] = _as_json(self.structured_outputs)
        body = {k: v for k, v in extra.items() if v is not None}
        body = {**(self.extra_body or {}), **body}
        request["extra_body"] = body or None
        return {k: v for k, v in request.items() if v is not None}

    # -- connection ------------------------------------------------------------------------------

    @property
    def _url(self) -> str:
        return (self.openai_api_base or DEFAULT_URL).rstrip("/")

    def _settings(self) -> Settings:
        key = self.openai_api_key
        return Settings(
            api_key="EMPTY" if key is None else key.get_secret_value(),
            base_url=self._url,
            organization=self.openai_organization,
            proxy=self.openai_proxy,
            timeout=self.request_timeout,
            max_retries=self.max_retries,
            default_headers=self.default_headers,
            default_query=self.default_query,
            http_client=self.http_client,
            http_async_client=self.http_async_client,
        )

    def _attach(self) -> None:
        """Take the clients that came along, where they fit, or make others."""
        connection = self._connection = connection_for(self._settings())
        fields = self.__dict__
        # Another model object's clients came along, as with a configurable model: these are no
        # wish, unlike clients of the user's own.
        if self.client is None or connection_of(self.client) is not None:
            fields["client"] = connection.completions
        else:
            fields["client"] = getattr(self.client, "completions", self.client)
        if self.async_client is None or connection_of(None, self.async_client) is not None:
            fields["async_client"] = connection.async_completions
        else:
            fields["async_client"] = getattr(self.async_client, "completions", self.async_client)

    # -- identity --------------------------------------------------------------------------------

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that changes the answer: LangChain's cache tells models apart by it."""
        shown: dict[str, Any] = {
            "model_name": self.model_name,
            "openai_api_base": shown_url(self._url),
        }
        if self.default_headers:
            shown["default_headers"] = shown_headers(self.default_headers)
        if self.default_query:
            shown["default_query"] = shown_headers(self.default_query)
        return {**shown, **self._default_params}

    @property
    def _default_params(self) -> dict[str, Any]:
        """The parameters of a request to which a call adds none of its own."""
        shown = {**self._parameters(None), **self.model_kwargs}
        return _without_headers(shown)

    # -- copies ----------------------------------------------------------------------------------

    def _call_copy(self) -> Self:
        """Return a copy for one call."""
        return super().__copy__()

    def _forget_derived(self) -> None:
        # LangChain keeps the serialized form, and fields of a copy may change.
        self.__dict__.pop("_serialized", None)

    def __copy__(self) -> Self:
        copied = super().__copy__()
        copied._forget_derived()
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        for whole in (
            self.client,
            self.async_client,
            self.http_client,
            self.http_async_client,
            self._connection,
        ):  # sockets are shared, never copied
            if whole is not None:
                memo[id(whole)] = whole
        copied = super().__deepcopy__(memo)
        copied._forget_derived()
        return copied

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields changed.

        Parameters
        ----------
        update : dict, optional
            Fields to change, as the constructor takes them.
        deep : bool
            Copy what the fields hold, except clients.

        Raises
        ------
        TypeError
            For a field that does not exist.
        ConfigError, InvalidRequestError
            For values that are wrong.
        """
        copied = super().model_copy(deep=deep)
        if not update:
            return copied
        names = type(self).model_fields
        values = by_field_name(f"{type(self).__name__}.model_copy", update, names)
        given = {name: copied.__dict__[name] for name in copied.model_fields_set}
        clients = {"client": self.client, "async_client": self.async_client}
        return type(self)(**{**given, **clients, **values})

    def __getstate__(self) -> dict[Any, Any]:
        # Clients of the user's own stay, and are for pickle to refuse.
        state = super().__getstate__()
        fields = {k: v for k, v in state["__dict__"].items() if k != "_serialized"}
        if connection_of(self.client) is not None:
            fields["client"] = None
        if connection_of(None, self.async_client) is not None:
            fields["async_client"] = None
        private = {**(state["__pydantic_private__"] or {}), "_connection": None}
        return {**state, "__dict__": fields, "__pydantic_private__": private}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self._attach()

    # -- serialisation and display ---------------------------------------------------------------

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Fields that are read from the environment when a written model is loaded."""
        return {"openai_api_key": "OPENAI_API_KEY"}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Return True: the constructor's arguments, secrets apart, are all there is to a model."""
        return True

    def to_json(self) -> Any:
        """Return the form that ``dumps`` writes, without keys and clients."""
        form = super().to_json()
        kwargs: dict[str, Any] = form.get("kwargs", {})  # type: ignore[assignment]
        for name in ("client", "async_client", "http_client", "http_async_client"):
            kwargs.pop(name, None)
        kwargs["openai_api_base"] = shown_url(self._url)
        if self.openai_proxy:
            kwargs["openai_proxy"] = shown_url(self.openai_proxy)
        for holder in (kwargs, kwargs.get("model_kwargs", {})):
            for name in ("default_headers", "default_query", "extra_headers", "extra_query"):
                if holder.get(name):
                    holder[name] = without_secrets(holder[name])
        return form

    def __repr_args__(self) -> Any:
        defaults = type(self).model_fields
        for name, value in super().__repr_args__():
            if name == "metadata" and set(value) == {"lc_versions"}:
                continue
            if name in ("default_headers", "default_query") and value:
                yield name, shown_headers(value)
            elif name == "model_kwargs" and value:
                yield name, _without_headers(value)
            elif name == "openai_api_base" and value:
                yield name, shown_url(value)
            elif name not in defaults or value != defaults[name].get_default(
                call_default_factory=True
            ):
                yield name, value


def _without_headers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of a request with what may hold credentials made unreadable."""
    hidden = {k: shown_headers(arguments[k] or {}) for k in _HEADERS if k in arguments}
    return {**arguments, **hidden}


def _as_json(constraint: Any) -> dict[str, Any] | None:
    """Return structured outputs as a request has them."""
    if constraint is None:
        return None
    if not isinstance(constraint, StructuredOutputsParams):
        constraint = StructuredOutputsParams(**constraint)
    return {
        field.name: getattr(constraint, field.name)
        for field in dataclasses.fields(constraint)
        if field.init and getattr(constraint, field.name) != field.default
    }


def _first_set(variables: tuple[str, ...]) -> tuple[str, str] | tuple[None, None]:
    """Return the first variable of the environment that is set, and what it says."""
    for name in variables:
        value = os.environ.get(name, "").strip()
        if value:
            return name, value
    return None, None
