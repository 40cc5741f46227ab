"""The arguments of a call: what becomes sampling parameters, and what is for the call itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from quire.integrations.outlines.inputs import CHAT_OPTIONS
from quire.integrations.outlines.output_types import structured_outputs_for
from quire.sampling_params import SamplingParams
from quire.structured_outputs import StructuredOutputsParams
from quire.utils.checks import flag, refuse
from quire.utils.suggest import unexpected_argument

ALIASES: Final = {"max_new_tokens": "max_tokens", "stop_at": "stop"}
"""Names of sampling parameters that other models of Outlines have for them."""

_SAMPLING: Final = frozenset(item.name for item in fields(SamplingParams)) - {"output_kind"}
_OPTIONS: Final[tuple[str, ...]] = (
    "allow_incomplete",
    "backend",
    "chat",
    "sampling_params",
    "use_tqdm",
)
_ENGINE: Final[tuple[str, ...]] = ("lora_request", "priority")


@dataclass(frozen=True)
class Call:
    """What one call asks for.

    Attributes
    ----------
    params : SamplingParams
    chat : bool
        Whether a text is what a user says in a conversation.
    chat_options : dict
        See :data:`quire.integrations.outlines.inputs.CHAT_OPTIONS`.
    engine_options : dict
        ``lora_request`` and ``priority``, where given.
    use_tqdm : bool or callable
    allow_incomplete : bool
        Whether a text that was cut off before it matched is returned all the same.
    """

    params: SamplingParams
    chat: bool
    chat_options: dict[str, Any]
    engine_options: dict[str, Any]
    use_tqdm: Any
    allow_incomplete: bool


def read_call(
    owner: str,
    default: SamplingParams,
    output_type: Any,
    arguments: Mapping[str, Any],
    *,
    chat: bool = False,
    backend: str | None = None,
) -> Call:
    """Return what the arguments of a call ask for.

    Parameters
    ----------
    owner : str
        What was called, for messages.
    default : SamplingParams
        The model's own, where none are given.
    output_type : object
        As :func:`structured_outputs_for` takes it.
    arguments : mapping
    chat : bool
        What ``chat`` is where it is not among the arguments.
    backend : str, optional
        The engine's own, likewise.

    Raises
    ------
    TypeError
        An unknown argument; the message names the nearest.
    InvalidRequestError
        A value out of its range, or two constraints.
    """
    left = dict(arguments)
    options = {name: left.pop(name) for name in _OPTIONS if name in left}
    chat_options = {name: left.pop(name) for name in CHAT_OPTIONS if name in left}
    engine_options = {name: left.pop(name) for name in _ENGINE if name in left}
    asked = options.get("backend")
    structure = structured_outputs_for(output_type, backend=backend if asked is None else asked)
    return Call(
        params=request_params(
            owner, default, options.get("sampling_params"), left, structured_outputs=structure
        ),
        chat=flag("chat", options.get("chat", chat)),
        chat_options=chat_options,
        engine_options=engine_options,
        use_tqdm=options.get("use_tqdm", False),
        allow_incomplete=flag("allow_incomplete", options.get("allow_incomplete", False)),
    )


def request_params(
    owner: str,
    default: SamplingParams,
    given: SamplingParams | None,
    arguments: Mapping[str, Any],
    *,
    structured_outputs: StructuredOutputsParams | None = None,
) -> SamplingParams:
    """Return the sampling parameters of a call; no object that was handed in is changed.

    What ``given`` sets explicitly stands, then what the arguments say, then the defaults. A text
    with a structure has the room left in the context where nobody says how long it may be.

    Parameters
    ----------
    owner : str
        What was called, for messages.
    default : SamplingParams
        In place of ``given`` where there is none.
    given : SamplingParams or None
    arguments : mapping
        Fields of SamplingParams, also by the names of :data:`ALIASES`.
    structured_outputs : StructuredOutputsParams, optional
        What the output type stands for.

    Raises
    ------
    TypeError
        An unknown argument, or one under two names.
    InvalidRequestError
        A value out of its range, or two constraints.
    """
    if given is not None and not isinstance(given, SamplingParams):
        raise refuse("sampling_params", given, "a quire.SamplingParams or None")
    values: dict[str, Any] = {}
    for written, value in arguments.items():
        name = ALIASES.get(written, written)
        if name not in _SAMPLING:
            valid = {*_SAMPLING, *ALIASES, *_OPTIONS, *CHAT_OPTIONS, *_ENGINE}
            raise unexpected_argument(owner, written, valid)
        if name in values:
            raise TypeError(f"{owner}: {name} is given twice, the second time as {written!r}")
        values[name] = value
    base = default if given is None else given
    if structured_outputs is not None:
        for twice in (values.get("structured_outputs"), base.structured_outputs):
            if twice is not None:
                raise refuse(
                    "structured_outputs", twice, "None beside an output type, which is one"
                )
        values["structured_outputs"] = structured_outputs
    explicit = base.explicit_fields - {"structured_outputs"}  # there, None says nothing
    if given is not None:
        values = {name: value for name, value in values.items() if name not in explicit}
    constrained = values.get("structured_outputs", base.structured_outputs) is not None
    if constrained and "max_tokens" not in explicit:
        values.setdefault("max_tokens", None)
    params = replace(base, **values)
    if not params.detokenize:
        raise refuse("detokenize", False, "True: what is returned is text")
    return params
