"""What callers of vLLM write for prompts and parameters, in the forms that quire takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quire.errors import NotSupportedError
from quire.integrations.vllm.exceptions import VLLMValidationError
from quire.integrations.vllm.pooling_params import PoolingParams
from quire.integrations.vllm.sampling_params import SamplingParams
from quire.utils.checks import shown

_OTHER_INPUTS = ("multi_modal_data", "mm_processor_kwargs", "prompt_embeds", "multi_modal_uuids")


def one_prompt(prompt: Any) -> Any:
    """Return a prompt without the fields that say nothing here.

    Raises
    ------
    NotSupportedError
        It has an image, a sound, or embeddings in place of tokens.
    """
    if not isinstance(prompt, dict):
        return prompt
    for name in _OTHER_INPUTS:
        value = prompt.get(name)
        if value is not None and not (isinstance(value, (dict, list, tuple)) and not value):
            raise NotSupportedError(
                f"{name}: models here read text, and nothing else; leave it out"
            )
    names = ("prompt", "prompt_token_ids", "cache_salt")
    unknown = set(prompt) - {*names, *_OTHER_INPUTS, "type", "priority"}
    if unknown:
        raise VLLMValidationError(
            f"a prompt has {', '.join(names)}, and not {', '.join(sorted(map(str, unknown)))}"
        )
    return {name: prompt[name] for name in names if prompt.get(name) is not None}


def all_prompts(prompts: Any, prompt_token_ids: Any = None) -> Any:
    """Return prompts, one or several, as `one_prompt` does.

    Parameters
    ----------
    prompts
    prompt_token_ids : list of int, or list of these, optional
        As calls before vLLM 0.10 gave them beside, or in place of, texts.
    """
    if prompt_token_ids is not None:
        ids = _lists(prompt_token_ids)
        texts = [None] * len(ids) if prompts is None else prompts
        texts = [texts] if isinstance(texts, str) else texts
        if len(texts) != len(ids):
            raise VLLMValidationError(
                f"prompt_token_ids has {len(ids)} entries, and there are {len(texts)} prompts"
            )
        return [
            {"prompt_token_ids": own, **({} if text is None else {"prompt": text})}
            for text, own in zip(texts, ids, strict=True)
        ]
    if isinstance(prompts, (list, tuple)):
        return [one_prompt(each) for each in prompts]
    return one_prompt(prompts)


def _lists(prompt_token_ids: Any) -> list[list[Any]]:
    """Return token ids, of one prompt or of several, arrays too, as a list per prompt."""
    found: list[Any] = []
    is_list = isinstance(prompt_token_ids, Iterable) and not isinstance(prompt_token_ids, str)
    if is_list:
        found = [list(e) if _is_sized(e) else e for e in prompt_token_ids]
        if found and not any(isinstance(each, list) for each in found):
            found = [found]
    if not is_list or not all(isinstance(each, list) for each in found):
        raise VLLMValidationError(
            "prompt_token_ids must be a list of token ids, or a list of these, got "
            f"{shown(prompt_token_ids)}"
        )
    return found


def _is_sized(value: Any) -> bool:
    # An array's numbers are none, though their class has what sized things have.
    return not isinstance(value, (str, dict)) and hasattr(value, "__len__")


def params_for_quire(params: Any) -> Any:
    """Return sampling parameters, one or several, as the engine is told of them."""
    if isinstance(params, SamplingParams):
        return params.to_quire()
    if isinstance(params, (list, tuple)):
        made: dict[int, Any] = {}  # by identity: requests that share one go on sharing it
        return [made.setdefault(id(each), params_for_quire(each)) for each in params]
    return params


def pooling_for_quire(params: Any) -> Any:
    """Return pooling parameters, one or several, as the engine is told of them."""
    if isinstance(params, PoolingParams):
        return params.to_quire()
    if isinstance(params, (list, tuple)):
        return [pooling_for_quire(each) for each in params]
    return params


def token_limit(tokenization_kwargs: Any) -> int | None:
    """Return ``truncate_prompt_tokens`` of ``tokenization_kwargs``.

    Raises
    ------
    NotSupportedError
        It has something else.
    """
    if not tokenization_kwargs:
        return None
    if not isinstance(tokenization_kwargs, Mapping):
        raise VLLMValidationError(
            f"tokenization_kwargs must be a dict, got {shown(tokenization_kwargs)}"
        )
    others = set(tokenization_kwargs) - {"truncate_prompt_tokens"}
    if others:
        raise NotSupportedError(
            f"tokenization_kwargs has {', '.join(sorted(map(str, others)))}; quire takes "
            "truncate_prompt_tokens, and token ids for all else"
        )
    limit: int | None = tokenization_kwargs.get("truncate_prompt_tokens")
    return limit
