"""Whole models of every format, lm_head and tables included, are their plain twins.

What the twins' weights are, plain definitions of the formats say that share no code with the
readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_decoders import BACKENDS, assert_close, load_decoder, most_off, prefill
from ct_checkpoints import FORMS, quantized_folder
from quantized_checkpoints import write_quantized

Make = Callable[[str], Path]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awq", {"ignored": ("layers.1.mlp", "v_proj")}),
        ("gptq", {"bits": 2, "sym": True}),
        ("gptq", {"bits": 3, "group_size": -1}),
        ("gptq", {"desc_act": True, "lm_head": True, "version": "gptq_v2"}),
        ("gptq", {"bits": 8, "sym": True, "desc_act": True}),
        ("squeezellm", {"torch_file": True}),
        ("squeezellm", {"bits": 3, "torch_file": True}),
    ],
)
@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2", "opt-350m"])
def test_formats_with_qweight(
    name: str,
    method: str,
    options: dict[str, Any],
    backend: str,
    tiny_checkpoint: Make,
    tmp_path: Path,
) -> None:
    """AWQ, GPTQ and SqueezeLLM, parts of projections unquantized."""
    if options.get("lm_head"):
        name = "llama"  # the others' output matrix is their embedding
    pair = write_quantized(tiny_checkpoint(name), tmp_path, method, **options)
    decoder = load_decoder(pair.quantized, backend)
    assert decoder.code_kinds()
    assert decoder.is_coded("lm_head") == bool(options.get("lm_head"))
    most = most_off(name, backend)
    assert_close(prefill(decoder), prefill(load_decoder(pair.plain)), most)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [form for form in FORMS if not form.endswith("w8a8")])
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "phi3"])
def test_formats_with_weight(
    name: str, form: str, backend: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """compressed-tensors, FP8 and bitsandbytes; fused and grouped modules."""
    folders = quantized_folder(tiny_checkpoint(name), tmp_path, form)
    decoder = load_decoder(folders.quantized, backend)
    assert (decoder.native is not None) == (backend == "cpu")
    assert decoder.code_kinds()
    most = most_off(name, backend)
    assert_close(prefill(decoder), prefill(load_decoder(folders.dequantized)), most)
