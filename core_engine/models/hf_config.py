"""What config.json and generation_config.json say, read as plain JSON.

Light on purpose: neither transformers nor torch is imported at module level.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.errors import ConfigError, ModelLoadError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Config = dict[str, Any]

_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length",
                "seq_length", "n_ctx")  # fmt: skip
_DEFAULT_LENGTH = 2048

_DTYPES = {
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}


def read_config(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read ``config.json`` of a model folder.

    A multimodal configuration is replaced by its ``text_config`` under the outer architecture
    name; rotary settings of older files are gathered under ``rope_parameters``.

    Parameters
    ----------
    path
        The folder.
    overrides
        Values that replace the file's, dictionaries key by key (``hf_overrides`` of an engine).

    Raises
    ------
    ModelLoadError
        The file is missing, is not JSON, or is not an object.
    """
    config = _read_object(path / "config.json")
    if config is None:
        raise ModelLoadError(
            f"{path} has no config.json; a model folder in Hugging Face's layout needs one "
            "beside its weights and tokenizer"
        )
    if isinstance(nested := config.get("text_config"), dict):
        outer = {key: value for key, value in config.items() if key != "text_config"}
        config = {**outer, **nested, "architectures": config.get("architectures")}
    if overrides:
        config = _merge(config, overrides)
    parameters = _rope_parameters(config)
    if parameters:
        config["rope_parameters"] = parameters
    return config


def read_generation_config(path: Path) -> Config:
    """Read ``generation_config.json`` of a model folder, or of the file itself; {} if absent.

    Raises
    ------
    ModelLoadError
        The file is not JSON or not an object.
    """
    file = path / "generation_config.json" if path.is_dir() else path
    return _read_object(file) or {}


def _read_object(file: Path) -> Config | None:
    if file.exists() and not file.is_file():
        raise ModelLoadError(f"{file} is not a regular file")
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{file} holds a JSON {type(content).__name__}, not an object")
    return content


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
    merged = dict(base)
    for key, value in overrides.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings under today's names, wherever the file has them."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ModelLoadError(f"rope_scaling in config.json is {given!r}; it must be an object")
    parameters = dict(given)
    if "type" in parameters:
        parameters.setdefault("rope_type", parameters.pop("type"))
    if parameters.get("rope_type") == "su":
        parameters["rope_type"] = "longrope"
    for name, keys in (
        ("rope_theta", ("rope_theta", "rotary_emb_base")),
        ("partial_rotary_factor", ("partial_rotary_factor", "rotary_pct")),
        ("original_max_position_embeddings", ("original_max_position_embeddings",)),
    ):
        for key in keys:
            if config.get(key) is not None:
                parameters.setdefault(name, config[key])
    return parameters


def eos_token_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Token ids that end a text: generation_config.json's, else config.json's; possibly none.

    Raises
    ------
    ModelLoadError
        ``eos_token_id`` is neither an id nor a list of ids.
    """
    for source in (generation_config or {}, config):
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(each) is int and each >= 0 for each in ids):
            raise ModelLoadError(f"eos_token_id is {value!r}; it must be a token id or a list")
        return tuple(ids)
    return ()


def max_length(config: Mapping[str, Any], wanted: int | None = None) -> int:
    """Tokens that a sequence of this model may have.

    The configuration's own number (2048 where it has none), multiplied where it says that position
    interpolation ("linear") or YaRN stretches it.

    Parameters
    ----------
    config
        What `read_config` returned.
    wanted
        The length asked for (``max_model_len``). It raises the result for "dynamic" scaling only,
        and up to what its factor allows: that changes the frequencies for all lengths, and so is
        done on demand.

    Raises
    ------
    ModelLoadError
        The number is not a positive integer.
    """
    length = _DEFAULT_LENGTH
    for key in _LENGTH_KEYS:
        if (value := config.get(key)) is not None:
            if type(value) is not int or value < 1:
                raise ModelLoadError(f"{key} in config.json is {value!r}; it must be at least 1")
            length = value
            break
    parameters = config.get("rope_parameters") or {}
    factor = parameters.get("factor") or 1.0
    trained = parameters.get("original_max_position_embeddings") or length
    rope_type = parameters.get("rope_type")
    if rope_type == "dynamic":
        return max(length, min(wanted or 0, int(length * factor)))
    if rope_type in ("linear", "yarn"):
        return max(length, int(trained * factor))
    return length


def resolve_dtype(
    config: Mapping[str, Any],
    requested: str | torch.dtype,
    device: torch.device,
    *,
    quantized: bool = False,
) -> torch.dtype:
    """Choose the dtype of weights and activations.

    Parameters
    ----------
    config
        What `read_config` returned.
    requested
        ``"auto"``, ``"half"``, ``"float16"``, ``"bfloat16"``, ``"float"``, ``"float32"`` or one of
        these torch dtypes. ``"auto"`` follows the configuration, where float32 (also what a
        configuration without a dtype has) becomes float16 on a GPU and, on a CPU that multiplies
        bfloat16 natively, bfloat16.
    device
        Where the model will run.
    quantized
        Whether its projections are in codes. Then float16, too, becomes bfloat16 on a CPU by
        ``"auto"``: the kernels for codes there do not compute in float16.

    Raises
    ------
    ConfigError
        `requested` is none of these.
    ModelLoadError
        "auto", and the configuration's dtype is none of these.
    """
    import torch

    name = str(requested).removeprefix("torch.")
    if name != "auto":
        if name not in _DTYPES:
            raise ConfigError(
                f"dtype is {requested!r}; it must be 'auto' or one of "
                + ", ".join(repr(each) for each in _DTYPES)
            )
        chosen = _DTYPES[name]
    else:
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        stored = stored.removeprefix("torch.")
        if stored not in _DTYPES:
            raise ModelLoadError(
                f"dtype in config.json is {stored!r}; choose one by dtype=, e.g. 'bfloat16'"
            )
        chosen = _DTYPES[stored]
        if chosen == "float32" and device.type != "cpu":
            chosen = "float16"
        elif chosen == "float32" and device.type == "cpu" and cpu_has_bfloat16():
            chosen = "bfloat16"
        elif chosen == "float16" and device.type == "cpu" and quantized:
            chosen = "bfloat16"
            logger.info("what is not quantized is kept in bfloat16, not in float16")
    dtype: torch.dtype = getattr(torch, chosen)
    return dtype


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX; BF16 on arm64)."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    is_arm = platform.machine() in ("aarch64", "arm64")
    wanted = {"bf16"} if is_arm else {"avx512_bf16", "amx_bf16"}
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not wanted.isdisjoint(value.split())
    return False
