"""SqueezeLLM's tensors become the weight that the format's definition gives; bad ones are named."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import plain_packing
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ModelLoadError, UnsupportedModelError
from quire.kernels.reference.quantized import dequantize
from quire.quantization import squeezellm

MODULE = "model.layers.0.self_attn.q_proj"


def drawn(
    seed: int, bits: int, out: int, count: int, sparse: bool, full: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A module's tensors, and the weight that they are by definition.

    Values are multiples of 1/8, so that sums are exact in whichever order they are made.
    """
    random = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return (random.integers(-64, 65, shape) / 8).astype(np.float32)

    codes, table = random.integers(0, 1 << bits, (out, count)), values(out, 1 << bits)
    tensors = plain_packing.squeezellm(codes, table, bits)
    weight = np.empty((out, count), dtype=np.float32)
    for row in range(out):
        for column in range(count):
            weight[row, column] = table[row, codes[row, column]]
    if sparse:
        first, columns, added = [0], [], []
        for row in range(out):
            chosen = random.permutation(count)[: random.integers(0, min(4, count) + 1)]
            for column, value in zip(chosen.tolist(), values(len(chosen)), strict=True):
                columns.append(column)
                added.append(value)
                weight[row, column] += value
            first.append(len(columns))
        tensors["rows"] = torch.tensor(first, dtype=torch.int32)
        tensors["cols"] = torch.tensor(columns, dtype=torch.int32)
        tensors["vals"] = torch.tensor(added, dtype=torch.float32)
        tensors["startrows"] = torch.zeros(128, dtype=torch.int32)
    if full:
        outputs, rows = random.integers(0, out, full), values(count, full)
        for index, output in enumerate(outputs):
            weight[output] += rows[:, index]
        tensors["full_rows"] = torch.tensor(rows)
        tensors["full_row_indices"] = torch.tensor(outputs, dtype=torch.int32)
    return tensors, torch.tensor(weight)


@given(
    st.integers(0, 1 << 32),
    st.sampled_from([3, 4]),
    st.sampled_from([1, 5, 16]),
    st.sampled_from([1, 7, 32, 64]),
    st.booleans(),
    st.integers(0, 3),
)
def test_weights_are_what_the_definition_says(
    seed: int, bits: int, out: int, count: int, sparse: bool, full: int
) -> None:
    """Bit for bit: the table's values, plus what is in rows, plus whole outputs, also twice."""
    tensors, expected = drawn(seed, bits, out, count, sparse, full)
    reader = squeezellm.from_config({"quant_method": "squeezellm", "wbits": bits})
    weight = reader.read(MODULE, tensors, (out, count))
    assert torch.equal(dequantize(weight), expected)
    outliers = weight.outliers
    if outliers is not None:  # in order, and each place once
        rows = torch.arange(out).repeat_interleave(outliers.first.diff())
        assert bool((torch.diff(rows * count + outliers.columns) > 0).all())
    mine = {each.data_ptr() for each in weight.tensors().values() if each.numel()}
    assert not mine & {each.data_ptr() for each in tensors.values()}


def test_outputs_of_one_word_are_read() -> None:
    """Turned, such words count as contiguous with strides that cannot be viewed as bytes."""
    tensors, expected = drawn(3, 4, 8, 8, False, 0)
    # Strides as a file's tensors have them.
    tensors["qweight"] = tensors["qweight"].clone(memory_format=torch.contiguous_format)
    weight = squeezellm.from_config({"wbits": 4}).read(MODULE, tensors, (8, 8))
    assert torch.equal(dequantize(weight), expected)


def test_tables_of_halves_are_widened() -> None:
    """As another engine keeps them."""
    tensors, expected = drawn(1, 4, 8, 32, False, 0)
    tensors["lookup_table"] = tensors["lookup_table"].half()
    weight = squeezellm.from_config({"bits": 4}).read(MODULE, tensors, (8, 32))
    assert torch.equal(dequantize(weight), expected)


def test_which_modules_are_quantized() -> None:
    """Those in layers."""
    reader = squeezellm.from_config({"wbits": 4})
    kinds = reader.kinds(MODULE)
    assert kinds is not None
    assert kinds.required == {"qweight", "lookup_table"}
    assert reader.kinds("lm_head") is None


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, ModelLoadError, r"has no 'wbits' \(or 'bits'\): 3 or 4"),
        ({"wbits": 2}, UnsupportedModelError, r"wbits .* is 2; 3 or 4 bits"),
        ({"wbits": "4"}, ModelLoadError, r"wbits .* is '4'"),
    ],
)
def test_a_configuration_that_cannot_be_read_says_why(
    config: dict[str, Any], error: type[Exception], message: str
) -> None:
    """It names the field, the value, and what would be right."""
    with pytest.raises(error, match=message):
        squeezellm.from_config(config)


def wrapped(rows: torch.Tensor) -> torch.Tensor:
    """Rows whose differences are all positive in 64 bits, where some of them wrap around."""
    rows = rows.long()
    rows[1:4] = torch.tensor([2**63 - 1, -(2**63), -1])
    return rows


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qweight", lambda t: t[1:], "qweight has the shape [3, 8]; it must be [4, 8]"),
        ("qweight", lambda t: t.float(), "qweight is of type float32; it must be int32"),
        ("lookup_table", lambda t: t[:, :8], "lookup_table has the shape [8, 8]; it must be [8,"),
        ("lookup_table", lambda t: t / 0, "values that are infinite or not a number"),
        ("lookup_table", lambda t: t.int(), "lookup_table is of type int32"),
        ("rows", lambda t: t[1:], "rows has the shape [8]; it must be [9]"),
        ("rows", lambda t: t + 1, "rows goes from 1"),
        ("rows", lambda t: t.flip(0), "it must ascend from 0"),
        ("rows", lambda t: wrapped(t), "it must ascend from 0"),
        ("rows", None, "rows missing; cols, vals mean nothing without"),
        ("cols", lambda t: t + 32, "with 32 inputs they must be from 0 to 31"),
        ("cols", lambda t: t - 32, "cols has values from"),
        ("cols", lambda t: t[1:], "cols has the shape"),
        ("vals", lambda t: t * float("nan"), "vals has"),
        ("full_rows", lambda t: t[:, :1], "full_rows has the shape [32, 1]; it must be [32, 2]"),
        ("full_rows", lambda t: t + float("inf"), "full_rows has 64 of 64 values"),
        ("full_row_indices", lambda t: t + 8, "with 8 outputs they must be from 0 to 7"),
        ("full_row_indices", None, "full_row_indices missing; full_rows mean nothing"),
    ],
)
def test_tensors_that_make_no_weight_are_named(kind: str, change: Any, message: str) -> None:
    """With what they have and what they need."""
    tensors, _ = drawn(2, 4, 8, 32, True, 2)
    if change is None:
        del tensors[kind]
    else:
        tensors[kind] = change(tensors[kind])
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        squeezellm.from_config({"wbits": 4}).read(MODULE, tensors, (8, 32))
