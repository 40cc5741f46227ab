"""AdapterConfig: what an adapter_config.json asks for, checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quire.errors import AdapterError
from quire.lora.content import CONFIG_FILE, METADATA
from quire.utils.patterns import MOST_WAYS, compiled, num_ways

MERGE = (
    "merge it into its model with peft (PeftModel.from_pretrained(...).merge_and_unload()), save "
    "that, and load it as the model"
)

# Fields of peft's that are read here.
_READ = frozenset(
    {
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    }
)

# Fields that concern the training alone, or a method that another field asks for.
_TRAINING = frozenset(
    {
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_dropout",
        "lora_dtype",
        "lora_ga_config",
        "lorap_emb_lr",
        "lorap_lr_ratio",
        "megatron_core",
        "merge_weights",
        "qalora_group_size",
        "velora_config",
    }
)

# Fields that make something else of the adapter than a product of two matrices per module. For
# those of the first group, peft takes even an empty object for a yes.
_METHODS = {
    "arrow_config": "routing between adapters (Arrow)",
    "kasa_config": "a truncated base model (KaSA)",
    "monteclora_config": "sampled weights (MonteCLoRA)",
    "use_bdlora": "block-diagonal matrices (BD-LoRA)",
}
_OTHER_METHODS = {
    "alora_invocation_tokens": "an adapter that begins to work within a prompt (aLoRA)",
    "layer_replication": "layers that the model does not have",
    "megatron_config": "Megatron's layers",
    "target_parameters": "parameters that are no module's weight",
    "trainable_token_indices": "single rows of the embedding",
    "use_qalora": "pooled inputs (QA-LoRA)",
}

_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


class AdapterConfig:
    """What an adapter's configuration says, as far as it has to do with the numbers.

    Parameters
    ----------
    content
        The configuration as it was read.
    folder
        Where, for messages.

    Attributes
    ----------
    path : Path
    use_dora, lora_bias, ensure_weight_tying : bool
    modules_to_save : tuple of str
    canonical : bytes
        All of the content that matters, the same for the same meaning.

    Raises
    ------
    AdapterError
        A field makes no sense, or asks for what is not offered.
    """

    def __init__(self, content: Mapping[str, Any], folder: Path) -> None:
        self.path = folder / CONFIG_FILE
        self._content = content
        self._ways = 0
        self._check_kind()
        self._check_methods()
        self._check_init()
        self._rank = self._positive("r", content.get("r", 8))
        self._alpha = self._number("lora_alpha", content.get("lora_alpha", 8))
        self._rslora = self._flag("use_rslora")
        self.use_dora = self._flag("use_dora")
        self.lora_bias = self._flag("lora_bias")
        self.ensure_weight_tying = self._flag("ensure_weight_tying")
        self._flag("fan_in_fan_out")  # peft goes by the layer's kind, and so does the reader
        if content.get("bias") not in (None, "none", "all", "lora_only"):
            raise self._refused("bias", "'none', 'all' or 'lora_only'")
        if self.use_dora and self.lora_bias:
            raise AdapterError(
                f"{self.path} has both use_dora and lora_bias, which exclude each other"
            )
        self._ranks = self._patterns("rank_pattern", self._positive)
        self._rank_of: dict[str, int] = {}
        self._alphas = self._patterns("alpha_pattern", self._number)
        self.modules_to_save = tuple(self._names("modules_to_save") or ())
        self._read_targets()
        self.canonical = self._canonical()

    def rank(self, module: str) -> int:
        """Rank of the adapter at a module."""
        if (rank := self._rank_of.get(module)) is None:
            matching = (rank for pattern, rank in self._ranks if pattern.match(module))
            rank = self._rank_of[module] = next(matching, self._rank)
        return rank

    def scale(self, module: str) -> float:
        """Factor on the product of the two matrices of a module.

        Raises
        ------
        AdapterError
            It is too large to be a float32.
        """
        matching = (alpha for pattern, alpha in self._alphas if pattern.match(module))
        alpha, rank = next(matching, self._alpha), self.rank(module)
        scale = alpha / (math.sqrt(rank) if self._rslora else rank)
        if abs(scale) > 1e38:
            raise AdapterError(f"lora_alpha of {module!r} in {self.path} is {alpha}: too large")
        return scale

    def targets(self, module: str, *, output: bool = False) -> bool | None:
        """Whether the module is to have an adapter; None: the configuration does not say.

        `output` says that the module is the output matrix.
        """
        if self._excludes(module) or self.saves(module):
            return False
        if self._target_pattern is not None:
            return self._target_pattern.fullmatch(module) is not None
        if self._target_names is None:
            return None
        if self._all_linear:
            return not output
        # As in peft, a whole name counts whatever layers_to_transform says.
        return module in self._target_names or (
            _named(module, self._target_names) and self._in_layers(module)
        )

    def saves(self, module: str) -> bool:
        """Whether the module is one of those that were trained as a whole."""
        return any(f".{name}." in f".{module}." for name in self.modules_to_save)

    def _excludes(self, module: str) -> bool:
        if isinstance(self._excluded, re.Pattern):
            return self._excluded.fullmatch(module) is not None
        return _named(module, self._excluded)

    def _in_layers(self, module: str) -> bool:
        if not self._layers:
            return True
        for pattern in self._layer_patterns:
            if (match := pattern.match(module)) is not None:
                return int(match["index"]) in self._layers
        return False

    def _check_kind(self) -> None:
        kind = self._content.get("peft_type")
        if kind != "LORA":
            known = isinstance(kind, str)
            raise AdapterError(
                f"peft_type in {self.path} is {kind!r:.100}; only 'LORA' is supported"
                + (f". For another method: {MERGE}" if known else "")
            )

    def _check_methods(self) -> None:
        for field, meaning in {**_METHODS, **_OTHER_METHODS}.items():
            value = self._content.get(field)
            asked = value not in (None, False) if field in _METHODS else bool(value)
            if asked:
                raise AdapterError(
                    f"{field} in {self.path} is {value!r:.100}, which asks for {meaning}; that is "
                    f"not supported: {MERGE}"
                )
        known = _READ | _TRAINING | METADATA | _METHODS.keys() | _OTHER_METHODS.keys()
        for field, value in self._content.items():
            if field not in known and value not in (None, False, "", [], {}):
                raise AdapterError(
                    f"{field!r:.100} in {self.path} is {value!r:.100}; this field is not known. If "
                    "it has to do with the training alone, take it out of the file; if not, "
                    f"{MERGE}"
                )

    def _check_init(self) -> None:
        value = self._content.get("init_lora_weights")
        if value is None or isinstance(value, bool):
            return
        name = value.lower() if isinstance(value, str) else ""
        if name.startswith(_CHANGES_BASE):
            raise AdapterError(
                f"init_lora_weights in {self.path} is {value!r:.100}: training began with a base "
                "model that this changed, so that the adapter is wrong on the plain one. Save it "
                "with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), "
                "which makes a plain adapter of it; or, where the changed model was saved and is "
                "the one in use here, set the field to true"
            )
        if name not in _KEEPS_BASE:
            raise self._refused(
                "init_lora_weights", "true, false or the name of a method of peft's"
            )

    def _read_targets(self) -> None:
        targets, layers = self._content.get("target_modules"), "layers_to_transform"
        self._target_pattern = None
        self._target_names: Sequence[str] | None = None
        self._all_linear = targets == "all-linear"
        if self._all_linear:
            self._target_names = ()
        elif isinstance(targets, str):
            self._target_pattern = self._compiled("{}", targets, "target_modules")
        else:
            self._target_names = self._names("target_modules")
        excluded = self._content.get("exclude_modules")
        self._excluded: re.Pattern[str] | Sequence[str] = (
            self._compiled("{}", excluded, "exclude_modules")
            if isinstance(excluded, str) and excluded
            else self._names("exclude_modules") or ()
        )
        indices = self._content.get(layers)
        indices = [indices] if isinstance(indices, int) else indices or []
        if not isinstance(indices, list) or {*map(type, indices)} - {int}:
            raise self._refused(layers, "a number or a list of numbers")
        self._layers = frozenset(indices)
        patterns = self._content.get("layers_pattern") or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
            raise self._refused("layers_pattern", "a name or a list of names")
        self._layer_patterns = [
            self._compiled(r"(?:^|.*?\.)(?:{})\.(?P<index>\d+)\.", each, "layers_pattern")
            for each in patterns
        ] or [re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")]

    def _canonical(self) -> bytes:
        kept: dict[str, Any] = {}
        for field, value in self._content.items():
            if field in METADATA or field in _TRAINING or value is None or value is False:
                continue
            if isinstance(value, dict) and field in ("rank_pattern", "alpha_pattern"):
                value = list(value.items())  # which comes first matters
            elif field in ("target_modules", "exclude_modules") and isinstance(value, list):
                value = sorted(value)  # peft writes these sets in any order
            kept[field] = value
        return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()

    def _patterns(self, field: str, check: Any) -> list[tuple[re.Pattern[str], Any]]:
        value = self._content.get(field) or {}
        if not isinstance(value, dict):
            raise self._refused(field, "an object of numbers by module names")
        return [
            (self._compiled(r"(?:.*\.)?(?:{})$", key, field), check(f"{field}[{key!r:.100}]", each))
            for key, each in value.items()
        ]

    def _compiled(self, around: str, pattern: str, field: str) -> re.Pattern[str]:
        found = compiled(around, pattern, f"{field} in {self.path}", AdapterError)
        self._ways += num_ways(pattern)
        if self._ways > MOST_WAYS and num_ways(pattern) > 1:
            raise AdapterError(
                f"{self.path} has too many expressions up to {pattern!r:.100} of {field}, which "
                "may take forever to match; write plainer ones, or names"
            )
        return found

    def _names(self, field: str) -> list[str] | None:
        value = self._content.get(field)
        if value is None:
            return None
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self._refused(field, "a list of module names")
        return value

    def _flag(self, field: str) -> bool:
        value = self._content.get(field)
        if value is not None and not isinstance(value, bool):
            raise self._refused(field, "true or false")
        return bool(value)

    def _positive(self, field: str, value: Any) -> int:
        if type(value) is not int or not 0 < value < 2**31:
            raise self._refused(field, "a whole number from 1 up", value)
        return value

    def _number(self, field: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise self._refused(field, "a finite number", value)
        return value

    def _refused(self, field: str, right: str, value: Any = ...) -> AdapterError:
        value = self._content.get(field) if value is ... else value
        return AdapterError(f"{field} in {self.path} is {value!r:.100}; it must be {right}")


def _named(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)
