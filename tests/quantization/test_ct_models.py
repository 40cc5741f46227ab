"""Models in the formats of other tools: what their codes stand for, and what transformers reads."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ct_checkpoints import FORMS, quantized_folder
from paged import PagedRunner

from quire.kernels import get_backend
from quire.models.decoder import Decoder
from quire.models.hf_config import read_config
from quire.models.loader import load_model
from quire.quantization.registry import choose, config_of

CPU = torch.device("cpu")
PROMPTS = [[random.Random(length).randrange(300) for _ in range(length)] for length in (1, 9, 33)]
Make = Callable[[str], Path]
EXACT = sorted(form for form in FORMS if not form.endswith("w8a8"))
"""Those that leave inputs as they are."""


def load(folder: Path) -> Decoder:
    config = read_config(folder)
    weight_format, _ = choose(None, None, config_of(folder, config))
    return load_model(
        folder,
        config,
        device=CPU,
        dtype=torch.float32,
        kernels=get_backend(CPU, "reference"),
        weight_format=weight_format,
    )


def logits_of(decoder: Decoder) -> list[torch.Tensor]:
    runner = PagedRunner(decoder, get_backend(CPU), num_seqs=3, max_len=33)
    return runner.prefill(PROMPTS, seed=0)


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor], most: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).abs().max()) <= most * float(1 + other.abs().max())


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "phi3", "falcon-40b", "gpt-neox", "opt"])
def test_a_checkpoint_in_codes_is_the_model_of_its_values(
    name: str, form: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """Merged, grouped and biased projections, heads that are tied or stay as they are."""
    folders = quantized_folder(tiny_checkpoint(name), tmp_path, form)
    decoder = load(folders.quantized)
    assert decoder.code_kinds()
    assert_close(logits_of(decoder), logits_of(load(folders.dequantized)), 1e-4)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config` or equivalent:UserWarning")
@pytest.mark.parametrize("form", [form for form in sorted(FORMS) if "bitsandbytes" not in form])
def test_logits_are_those_of_transformers(form: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    """The same folder, as transformers and the format's package read it.

    Inputs of 8 bits are rounded there to steps of another size, by a part in 255.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    folder = quantized_folder(tiny_checkpoint("llama"), tmp_path, form).quantized
    options: dict[str, Any] = {}
    if form.endswith("zeros"):  # its modules have no room for packed zeros
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    with torch.inference_mode():
        theirs = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    assert_close(logits_of(load(folder)), theirs, 5e-2 if form.endswith("w8a8") else 1e-4)
