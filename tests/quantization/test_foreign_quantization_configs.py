"""Configurations come from outside: whatever is in one, it is read, or refused with a message."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ModelLoadError
from quire.quantization import bitsandbytes, compressed_tensors, fp8

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**20), 10**20),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(
            ["group", "block", "int", "float", "nf4", "Linear", "re:.*", "lm_head", "token",
             "pack-quantized", "int-quantized", "mixed-precision", "128x128", "9" * 5_000]
        ),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)  # fmt: skip
ARGUMENTS = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure",
             "dynamic", "actorder", "scale_dtype")  # fmt: skip
GOOD: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "channel"}


def some(names: tuple[str, ...], good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """`good` with a few of these fields replaced."""
    changes = st.dictionaries(st.sampled_from(names), VALUES, max_size=3)
    return changes.map(lambda each: {**good, **each})


GROUPS = some(
    ("targets", "weights", "input_activations", "output_activations", "format"),
    {"targets": ["Linear"]},
)


@given(group=GROUPS, weights=some(ARGUMENTS, GOOD), inputs=some(ARGUMENTS, GOOD), data=st.data())
def test_any_compressed_tensors_configuration(
    group: dict[str, Any], weights: dict[str, Any], inputs: dict[str, Any], data: st.DataObject
) -> None:
    """No error but the engine's own."""
    group = {"weights": weights, **group}
    if data.draw(st.booleans()):
        group = {"input_activations": inputs, **group}
    fields = ("format", "ignore", "config_groups", "kv_cache_scheme", "sparsity_config", "other")
    good = {"format": "int-quantized", "config_groups": {"group_0": group}}
    with contextlib.suppress(ModelLoadError):
        compressed_tensors.from_config(data.draw(some(fields, good))).kinds("lm_head")


@pytest.mark.parametrize(
    ("module", "fields"),
    [
        (
            fp8,
            ("activation_scheme", "fmt", "scale_fmt", "weight_block_size", "ignored_layers",
             "modules_to_not_convert", "modules_to_convert"),
        ),
        (
            bitsandbytes,
            ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "llm_int8_skip_modules",
             "llm_int8_has_fp16_weight"),
        ),
    ],
)  # fmt: skip
@given(data=st.data())
def test_any_configuration_of_fp8_and_bitsandbytes(
    module: Any, fields: tuple[str, ...], data: st.DataObject
) -> None:
    """No error but the engine's own."""
    with contextlib.suppress(ModelLoadError):
        module.from_config(data.draw(some(fields, {}))).kinds("model.layers.0.mlp.up_proj")
