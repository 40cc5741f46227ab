"""What goes between the copies of an engine: requests one way, outputs and errors the other."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from quire import errors
from quire.engine.cache_map import KVBlock, KVCacheMap
from quire.engine.request import Request
from quire.errors import QuireError, RequestFailedError
from quire.executor.messages import Message, pack, unpack
from quire.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from quire.pooling_params import PoolingParams
from quire.sampling_params import SamplingParams
from quire.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from pathlib import Path

_PLAIN = ("request_id", "prompt_token_ids", "seed", "priority", "arrival_time", "cache_salt")


class StaysHereError(Exception):
    """A request has something that no message can say."""


# -- requests -------------------------------------------------------------------------------------


def request_to_message(request: Request, folder: Path | None) -> Message:
    """Say a request, but for its text, which only its outputs need.

    Parameters
    ----------
    request
    folder
        Where its adapter can be read.

    Raises
    ------
    StaysHereError
    """
    message: Message = {name: getattr(request, name) for name in _PLAIN}
    message["bad_words_ids"] = request.bad_words_ids
    message["params"] = _params_to_message(request.params)
    if request.pooling is not None:
        message["pooling"] = dataclasses.asdict(request.pooling)
    if request.adapter is not None:
        if folder is None:
            raise StaysHereError("nobody knows where its adapter came from")
        named = request.lora_request
        message["adapter"] = {
            "name": named if isinstance(named, str) else named.lora_name,
            "digest": request.adapter.digest,
            "folder": str(folder),
        }
    return message


def request_from_message(message: Message) -> Request:
    """Return the request that a message says, its adapter left out."""
    adapter, pooling = message.get("adapter"), message.get("pooling")
    return Request(
        prompt=None,
        params=_params_from_message(message["params"]),
        bad_words_ids=message["bad_words_ids"],
        pooling=None if pooling is None else PoolingParams(**pooling),
        lora_request=None if adapter is None else adapter["name"],
        **{name: message[name] for name in _PLAIN},
    )


def _params_to_message(params: SamplingParams) -> Message:
    if params.logits_processors:
        raise StaysHereError("its logits processors are functions of this process")
    message: Message = {}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if value != field.default:
            message[field.name] = value
    if params.structured_outputs is not None:
        message["structured_outputs"] = _constraint_to_message(params.structured_outputs)
    if params.extra_args is not None:
        try:
            kept = unpack(pack(params.extra_args))
        except (TypeError, ValueError, OverflowError) as error:
            raise StaysHereError(f"extra_args: {error}") from error
        if not _is_same(kept, params.extra_args):
            raise StaysHereError("extra_args has values of kinds that messages do not tell apart")
    message.pop("logits_processors", None)
    return message


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal, and of the same types all through."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other)


def _params_from_message(message: Message) -> SamplingParams:
    constraint = message.get("structured_outputs")
    if constraint is not None:
        message["structured_outputs"] = _constraint_from_message(constraint)
    return SamplingParams(**message)


def _constraint_to_message(constraint: StructuredOutputsParams) -> Message:
    return {
        **constraint.spec._asdict(),
        "canonical_tokens": constraint.canonical_tokens,
        "backend": constraint.backend,
    }


def _constraint_from_message(message: Message) -> StructuredOutputsParams:
    kind, value = message["kind"], message["text"]
    if kind == "choice":
        value = json.loads(value)
    elif kind == "json_object":
        value = True
    return StructuredOutputsParams(
        **{kind: value},
        whitespace_pattern=message["whitespace_pattern"],
        disable_any_whitespace=not message["any_whitespace"],
        drop_unsupported=message["drop_unsupported"],
        canonical_tokens=message["canonical_tokens"],
        backend=message["backend"],
    )


# -- outputs --------------------------------------------------------------------------------------


def output_to_message(output: RequestOutput) -> Message:
    """Say an output, but for what is known of the request."""
    metrics = output.metrics
    return {
        "outputs": [_completion_to_message(each) for each in output.outputs],
        "prompt_logprobs": _every_logprobs_to_message(output.prompt_logprobs),
        "finished": output.finished,
        "metrics": None if metrics is None else list(dataclasses.astuple(metrics)),
        "num_cached_tokens": output.num_cached_tokens,
        "embedding": output.embedding,
    }


def output_from_message(message: Message, request: Request) -> RequestOutput:
    """Return the output that a message says of a request."""
    metrics = message["metrics"]
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=list(request.prompt_token_ids),
        prompt_logprobs=_every_logprobs_from_message(message["prompt_logprobs"]),
        outputs=[
            _completion_from_message(each, request.lora_request) for each in message["outputs"]
        ],
        finished=message["finished"],
        metrics=None if metrics is None else RequestMetrics(*metrics),
        lora_request=request.lora_request,
        num_cached_tokens=message["num_cached_tokens"],
        embedding=message["embedding"],
    )


def _completion_to_message(each: CompletionOutput) -> list[Any]:
    return [
        each.index, each.text, each.token_ids, each.cumulative_logprob,
        _every_logprobs_to_message(each.logprobs), each.finish_reason, each.stop_reason,
    ]  # fmt: skip


def _completion_from_message(message: list[Any], lora_request: Any) -> CompletionOutput:
    index, text, token_ids, cumulative, logprobs, finish_reason, stop_reason = message
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=token_ids,
        cumulative_logprob=cumulative,
        logprobs=_every_logprobs_from_message(logprobs),
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        lora_request=lora_request,
    )


def _every_logprobs_to_message(every: Any) -> list[Any] | None:
    if every is None:
        return None
    return [
        None if each is None
        else [[id_, x.logprob, x.rank, x.decoded_token] for id_, x in each.items()]
        for each in every
    ]  # fmt: skip


def _every_logprobs_from_message(every: list[Any] | None) -> Any:
    if every is None:
        return None
    return [None if each is None else _logprobs(each) for each in every]


def _logprobs(entries: list[Any]) -> TokenLogprobs:
    return {id_: Logprob(logprob, rank, text) for id_, logprob, rank, text in entries}


# -- errors ---------------------------------------------------------------------------------------


def error_to_message(error: BaseException) -> Message:
    """Say what a request ended with, and what caused that."""
    text = error._message if isinstance(error, RequestFailedError) else str(error)
    cause = error.__cause__
    return {
        "kind": type(error).__name__,
        "text": text,
        "cause": None if cause is None else error_to_message(cause),
    }


def error_from_message(message: Message, request_id: str) -> RequestFailedError:
    """Return the failure of a request, with its cause as near to its type as there is one here."""
    if message["kind"] == RequestFailedError.__name__:
        failure = RequestFailedError(request_id, message["text"])
        cause = message["cause"]
        failure.__cause__ = None if cause is None else _error(cause)
        return failure
    error = _error(message)
    failure = RequestFailedError(request_id, str(error))
    failure.__cause__ = error
    return failure


def _error(message: Message) -> Exception:
    kind = getattr(errors, message["kind"], None)
    if isinstance(kind, type) and issubclass(kind, QuireError):
        try:
            return kind(message["text"])
        except TypeError:  # one that is made of other things than a text
            return RuntimeError(message["text"])
    return RuntimeError(f"{message['kind']}: {message['text']}")


# -- the rest -------------------------------------------------------------------------------------


def cache_map_to_message(found: KVCacheMap) -> Message:
    """Say which block of a KV cache holds what."""
    blocks = [[list(block.request_ids), block.is_cached] for block in found.blocks]
    return {"block_size": found.block_size, "blocks": blocks, "dtype": found.dtype}


def cache_map_from_message(message: Message) -> KVCacheMap:
    """Return the map that a message says."""
    blocks = [KVBlock(tuple(ids), is_cached) for ids, is_cached in message["blocks"]]
    return KVCacheMap(message["block_size"], blocks, message["dtype"])
