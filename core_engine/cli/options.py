"""The options that several subcommands share, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from quire.cli.remote import RemoteSpeaker
from quire.cli.speaker import LocalSpeaker

if TYPE_CHECKING:
    from quire.cli.speaker import Speaker
    from quire.llm import LLM
    from quire.sampling_params import SamplingParams

T = TypeVar("T")

DEFAULT_MODEL = "quire/demo"

# None is an option that was not given, for its general one may be; help tells the default.
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A folder, a name on the hub, or quire/demo.",
        show_default=DEFAULT_MODEL,
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="auto, float16, bfloat16 or float32.", show_default="auto")
]
MaxModelLen = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of one request, prompt and answer.")
]
EngineArgs = Annotated[
    list[str] | None,
    typer.Option("--engine-arg", metavar="NAME=VALUE", help="Any other argument of quire.LLM."),
]
Lora = Annotated[
    str | None,
    typer.Option(
        "--lora", metavar="PATH", help="Answer with this LoRA adapter: a folder, or on the hub."
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Most tokens to generate.", show_default="the room left")
]
Temperature = Annotated[float | None, typer.Option(min=0, help="0 takes the likeliest token.")]
TopP = Annotated[float | None, typer.Option(help="Sample from this share of the probability.")]
TopK = Annotated[int | None, typer.Option(help="Sample from this many tokens.")]
Seed = Annotated[int | None, typer.Option(help="Makes the samples repeat.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]
SamplingArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--sampling-arg", metavar="NAME=VALUE", help="Any other field of quire.SamplingParams."
    ),
]

Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="A server to ask, as http://localhost:8000/v1, and load no model here."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(help="For the server.", envvar="QUIRE_API_KEY", show_envvar=True),
]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the command line says of the engine; None leaves the default."""

    model: str | None
    dtype: str | None
    max_model_len: int | None
    engine_args: Sequence[str] | None
    lora: str | None = None
    lora_modules: Sequence[str] | None = None

    def make_llm(self) -> LLM:
        """Load the model.

        Raises
        ------
        typer.BadParameter
            An argument that :class:`quire.LLM` does not have, or one given twice.
        QuireError
            What making an :class:`quire.LLM` raises.
        """
        from quire.config import EngineConfig
        from quire.llm import LLM

        named = {
            "model": self.model,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "lora_modules": list(self.lora_modules) if self.lora_modules else None,
        }
        arguments = {"model": DEFAULT_MODEL, **_given("--engine-arg", named, self.engine_args)}
        if self.lora is not None or self.lora_modules:
            arguments = {"enable_lora": True, **arguments}
        # Made ahead of the model's loading, in which a TypeError would be a defect.
        _make("--engine-arg", lambda: EngineConfig.create(**arguments))
        return LLM(**arguments)

    def refuse_for(self, url: str) -> None:
        """Refuse what is said of an engine, where a server is asked.

        Raises
        ------
        typer.BadParameter
            An option other than the model's name was given.
        """
        given = {
            "--dtype": self.dtype,
            "--max-model-len": self.max_model_len,
            "--engine-arg": self.engine_args,
        }
        if self.lora is not None:
            raise typer.BadParameter(
                f"--lora is for an engine here, and --url asks {url}: --model is the name that the "
                "server has for an adapter"
            )
        for name, value in given.items():
            if value:
                raise typer.BadParameter(f"{name} is for an engine here, and --url asks {url}")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What the command line says of the sampling; None leaves the model's default."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: Sequence[str] | None
    sampling_args: Sequence[str] | None
    n: int | None = None
    default_max_tokens: int | None = None  # in the engine's own terms, None is the room left

    def make_params(self, llm: LLM) -> SamplingParams:
        """Return the model's default parameters with the given ones put in.

        Raises
        ------
        typer.BadParameter
            A field that :class:`quire.SamplingParams` does not have, or one given twice.
        InvalidRequestError
            A value that is out of range.
        """
        fields = self.fields()
        defaults = llm.get_default_sampling_params()
        return _make("--sampling-arg", lambda: replace(defaults, **fields))

    def fields(self) -> dict[str, Any]:
        """Return what was given, and what a command has a default of its own for."""
        named = {
            "n": self.n,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "stop": list(self.stop) if self.stop else None,
        }
        return {
            "max_tokens": self.default_max_tokens,
            **_given("--sampling-arg", named, self.sampling_args),
        }


def make_speaker(
    engine: EngineOptions, sampling: SamplingOptions, url: str | None, api_key: str | None
) -> Speaker:
    """Return the server at a URL, or without one an engine that is loaded here.

    Raises
    ------
    typer.BadParameter
        Options that do not go together, or that there are none of.
    QuireError
        The model cannot be had.
    """
    if url is None:
        llm = engine.make_llm()
        try:
            params = sampling.make_params(llm)
            adapter = None if engine.lora is None else llm.load_lora(engine.lora).lora_name
            return LocalSpeaker(llm, params, adapter)
        except BaseException:
            llm.close()
            raise
    engine.refuse_for(url)
    fields = sampling.fields()
    if fields["max_tokens"] is None:
        del fields["max_tokens"]  # the server's default is the room left, too
    # A misspelt name is a usage error here as it is there; values are the server's to check.
    _make("--sampling-arg", lambda: _check_names(fields))
    return RemoteSpeaker(url, engine.model, fields, api_key)


def _check_names(fields: Mapping[str, Any]) -> None:
    from quire.sampling_params import SamplingParams

    SamplingParams(**fields)


def parse_assignments(option: str, assignments: Sequence[str] | None) -> dict[str, Any]:
    """Return ``NAME=VALUE`` texts as a dict; a value is read as JSON where it is JSON.

    Parameters
    ----------
    option : str
        The option they were given by, for messages.
    assignments : sequence of str or None

    Raises
    ------
    typer.BadParameter
        For a text without ``=`` or without a name.

    Examples
    --------
    >>> parse_assignments("--engine-arg", ["block-size=32", "device=cpu"])
    {'block_size': 32, 'device': 'cpu'}
    """
    values: dict[str, Any] = {}
    for assignment in assignments or ():
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{option} takes NAME=VALUE, not {assignment!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = {"True": True, "False": False, "None": None}.get(text, text)
        values[name.strip().replace("-", "_")] = value
    return values


def _given(
    option: str, named: Mapping[str, Any], assignments: Sequence[str] | None
) -> dict[str, Any]:
    """Return what was given, by the fields' own options and by the general one."""
    fields = {name: value for name, value in named.items() if value is not None}
    others = parse_assignments(option, assignments)
    for name in fields.keys() & others:
        raise typer.BadParameter(
            f"{option} {name} and --{name.replace('_', '-')} are one field; give one"
        )
    return fields | others


def _make(option: str, make: Callable[[], T]) -> T:
    """Return what ``make`` makes; a name it does not know is an error of usage."""
    try:
        return make()
    except TypeError as error:
        raise typer.BadParameter(f"{option}: {error}") from error
