"""From a request's body to the engine's parameters, and from the engine's errors to its fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from quire.engine.processor import MAX_SEQUENCES
from quire.errors import InvalidRequestError
from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.server.errors import ApiError
from quire.server.protocol.sampling import SamplingBody
from quire.server.response_format import structure_field, structured_outputs

if TYPE_CHECKING:
    from quire.server.fields import RequestBody
    from quire.server.service import Service

_SAME_NAME: Final = (
    "n",
    "best_of",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "bad_words",
    "include_stop_str_in_output",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "logit_bias",
    "allowed_token_ids",
    "truncate_prompt_tokens",
    "use_beam_search",
    "length_penalty",
    "early_stopping",
)

_DRAWING: Final = ("temperature", "top_p", "top_k", "min_p")

_SUBJECT: Final = re.compile(r"(?:each (?:token )?id of )?'?((\w+)(?:\[\d+\]|\.\w+)*)")


def sampling_params(
    service: Service, body: SamplingBody, defaults: SamplingParams, **overrides: Any
) -> SamplingParams:
    """Return the engine's parameters.

    Parameters
    ----------
    service : Service
    body : SamplingBody
        What it gives wins over the defaults.
    defaults : SamplingParams
        What the model's makers recommend.
    **overrides
        Fields that the endpoint decides; these win over all.

    Raises
    ------
    ApiError
        400, with the field's name.
    """
    values = {name: getattr(defaults, name) for name in defaults.explicit_fields}
    if body.use_beam_search:
        for name in _DRAWING:  # nothing is drawn
            values.pop(name, None)
    for name in _SAME_NAME:
        value = getattr(body, name)
        if value is not None:
            values[name] = value
    backend = service.llm.config.structured.structured_outputs_backend
    values["structured_outputs"] = structured_outputs(body, backend)
    values["extra_args"] = body.vllm_xargs
    if body.stream:
        whole = bool(body.use_beam_search)  # beams are compared first, and come in one piece
        kind = RequestOutputKind.FINAL_ONLY if whole else RequestOutputKind.DELTA
    else:
        kind = RequestOutputKind.FINAL_ONLY
    values["output_kind"] = kind
    values.update(overrides)
    try:
        params = SamplingParams(**values)
    except InvalidRequestError as error:
        raise field_error(error, body) from None
    if params.n > MAX_SEQUENCES:  # the server, too, keeps something for each
        raise ApiError(400, f"n must be at most {MAX_SEQUENCES}, got {params.n}", param="n")
    return params


def field_error(
    error: InvalidRequestError, body: RequestBody, other: str | None = None
) -> ApiError:
    """Return an error of the engine with the field that it is about.

    Parameters
    ----------
    error : InvalidRequestError
        Whose message begins with a parameter's name where it is about one.
    body : RequestBody
        For the names that its fields have.
    other : str, optional
        The field that it is about if the message names none: the prompt.
    """
    message = str(error)
    match = _SUBJECT.match(message)
    path, name = match.groups() if match else ("", "")
    if name == "max_tokens" and getattr(body, "max_completion_tokens", None) is not None:
        path = name = "max_completion_tokens"
        message = message.replace("max_tokens", name, 1)
    if name == "logprobs" and isinstance(getattr(body, "top_logprobs", None), int):
        path = name = "top_logprobs"  # logprobs is a switch where there is such a field
        message = message.replace("logprobs", name, 1)
    if name == "structured_outputs" and not getattr(body, name, None):
        path = name = structure_field(body) if isinstance(body, SamplingBody) else name
    code = "context_length_exceeded" if "max_model_len" in message else None
    known: Mapping[str, Any] = type(body).model_fields
    return ApiError(400, message, param=path if name in known else other, code=code)


def check_stream_fields(body: SamplingBody) -> None:
    """Refuse what goes with a stream only, or not with one.

    Raises
    ------
    ApiError
        400, with the field's name.
    """
    if not body.stream:
        if body.stream_options is not None:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options")
        return
    if (body.best_of or 0) > (body.n or 1) and not body.use_beam_search:
        raise ApiError(
            400,
            f"best_of must be at most n ({body.n or 1}) with stream: what is compared at the end "
            f"cannot be sent before, got {body.best_of}",
            param="best_of",
        )
    if body.prompt_logprobs is not None:
        raise ApiError(
            400,
            "prompt_logprobs cannot be streamed: leave one of the two out",
            param="prompt_logprobs",
        )
