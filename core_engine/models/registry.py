"""Which family a configuration belongs to: the built-in ones, and those of installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from quire.errors import ModelLoadError, QuireError, UnsupportedModelError
from quire.models.family import Family
from quire.models.spec import DecoderSpec

ENTRY_POINT_GROUP = "quire.models"
"""A package offers families by entry points of this group, each a `Family`."""

_BUILT_IN = {
    "FalconForCausalLM": "falcon",
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gpt_neox",
    "Gemma2ForCausalLM": "gemma2",
    "LLaMAForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "MPTForCausalLM": "mpt",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "MptForCausalLM": "mpt",
    "OPTForCausalLM": "opt",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}

_CLASSIFIERS = {
    (f"{base}ForSequenceClassification"): name
    for name in _BUILT_IN
    if (base := name.removesuffix("ForCausalLM").removesuffix("LMHeadModel"))
}
"""The same models with a head for classes in place of the one for tokens, by what they are else."""

_CLASSES_WEIGHT = r"^score\.weight$"

_REFUSED_KEYS = {
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
}
_READ_KEYS = {
    "mixtral": ("num_local_experts", "num_experts"),
    "qwen2_moe": ("num_local_experts", "num_experts"),
    "qwen3_moe": ("num_local_experts", "num_experts"),
}
"""Those of them that a family reads itself."""


def supported_architectures() -> list[str]:
    """Architecture names that can be loaded, sorted."""
    return sorted({*_BUILT_IN, *_CLASSIFIERS, *_installed()})


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a configuration's model has a head for classes, and none for tokens."""
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name) in _CLASSIFIERS for name in names)


def family_of(config: Mapping[str, Any]) -> tuple[str, Family]:
    """Return the architecture name of a configuration and the family that knows it.

    Installed packages are looked through only for an architecture that is not built in.

    Raises
    ------
    UnsupportedModelError
        No family knows the architecture; the message lists what is supported.
    ModelLoadError
        The configuration names no architecture.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise ModelLoadError(
            f"architectures in config.json is {names!r}; it must name the model's class, "
            'such as ["LlamaForCausalLM"]'
        )
    names = [str(name) for name in names]
    for name in names:
        if name in _BUILT_IN:
            module = import_module(f"quire.models.families.{_BUILT_IN[name]}")
            family: Family = module.FAMILY
            return name, family
    for name in names:
        if name in _CLASSIFIERS:
            _, family = family_of({"architectures": [_CLASSIFIERS[name]]})
            return name, replace(family, ignored=(*family.ignored, _CLASSES_WEIGHT))
    for name in names:
        if name in _installed():
            return name, _installed()[name]
    raise UnsupportedModelError(
        f"the architecture {', '.join(names)} is not supported; supported are: "
        + ", ".join(supported_architectures())
    )


def build_spec(config: Mapping[str, Any], max_model_len: int | None = None) -> DecoderSpec:
    """Describe the model of a configuration.

    Parameters
    ----------
    config
        What `quire.models.hf_config.read_config` returned.
    max_model_len
        The longest sequence that will be served; None: as long as the configuration allows.

    Raises
    ------
    UnsupportedModelError
        The architecture, or something that the configuration asks of it, is not supported.
    ModelLoadError
        A value is missing or makes no sense.
    """
    architecture, family = family_of(config)
    built_in = _CLASSIFIERS.get(architecture, architecture)
    if built_in in _BUILT_IN:
        read = _READ_KEYS.get(_BUILT_IN[built_in], ())
        for key, meaning in _REFUSED_KEYS.items():
            if config.get(key) and key not in read:
                raise UnsupportedModelError(
                    f"{key} in config.json asks for {meaning}, which {architecture} "
                    "does not support in this version of quire"
                )
    try:
        spec = family.spec(config, max_model_len)
        if architecture not in _CLASSIFIERS:
            return spec
        if spec.embedding_size not in (None, spec.hidden_size):
            raise UnsupportedModelError(
                f"{architecture} with embeddings of {spec.embedding_size} numbers and hidden "
                f"states of {spec.hidden_size} is not supported"
            )
        # There is no output matrix; the embedding stands in for what nobody asks for.
        return replace(spec, tie_word_embeddings=True)
    except QuireError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        # The file is outside data: whatever a family does not check itself ends here.
        raise ModelLoadError(
            f"config.json does not describe a {architecture}: a value there has the wrong type "
            f"or makes no sense ({str(error)[:200] or type(error).__name__})"
        ) from error


@cache
def _installed() -> dict[str, Family]:
    families: dict[str, Family] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            family = point.load()
        except Exception as error:
            raise ModelLoadError(
                f"the model family {point.name!r} ({point.value}) of an installed package "
                f"could not be loaded: {error}"
            ) from error
        if not isinstance(family, Family):
            raise ModelLoadError(
                f"the entry point {point.name!r} of {ENTRY_POINT_GROUP!r} is a "
                f"{type(family).__name__}; it must be a quire.models.family.Family"
            )
        families.update(dict.fromkeys(family.architectures, family))
    return families
