"""Models in codes compute what the same models do with what the codes stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from coded_checkpoints import RECIPES, write_pair
from coded_decoders import BACKENDS, assert_close, load_decoder, most_off, plain_twin, prefill

from quire.kernels.cpu.packed_codes import PackedCodes
from quire.models.decoder import Decoder

Make = Callable[[str], Path]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


MODELS = ["llama", "qwen2-tied", "gpt2", "gpt-neox", "falcon-40b", "phi3", "opt"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_checkpoint_is_the_model_of_its_values(
    name: str, recipe: str, backend: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """Logits are those of the dequantized weights; of inputs in 8 bits, those of the reference."""
    quantized, plain = write_pair(tiny_checkpoint(name), tmp_path, RECIPES[recipe])
    decoder = load_decoder(quantized, backend)
    assert (decoder.native is not None) == (backend == "cpu")
    assert decoder.code_kinds()
    if recipe == "w8a8":
        # An input that lies between two steps is rounded to either, by a last bit.
        assert_close(prefill(decoder), prefill(load_decoder(quantized)), 3e-2)
    else:
        most = most_off(name, backend)
        assert_close(prefill(decoder), prefill(load_decoder(plain)), most)


LOAD_TIME = [
    ("int8", None),
    ("int8", {"lm_head": None}),
    ("int4", None),
    ("int4", {"lm_head": "int4", "group_size": 16, "symmetric": True}),
    ("int4", {"ignore": ["*.qkv.v", "*.gate_up.up", "layers.1.mlp.down"], "group_size": 16}),
    ("fp8", None),
    ("nf4", {"lm_head": "nf4"}),
    ("bitsandbytes", None),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("quantization", "options"), LOAD_TIME)
@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2", "falcon-40b", "phi3", "opt-350m"])
def test_a_model_quantized_while_loading_is_the_model_of_its_values(
    name: str, quantization: str, options: dict | None, backend: str, tiny_checkpoint: Make
) -> None:
    """Fused, grouped and turned weights, a tied embedding, and whatever is left as it is."""
    folder = tiny_checkpoint(name)
    decoder = load_decoder(folder, backend, quantization, options)
    assert decoder.code_kinds()
    twin = plain_twin(decoder, folder)
    most = most_off(name, backend)
    assert_close(prefill(decoder), prefill(twin), most)
    assert decoder.weight_bytes() < twin.weight_bytes()


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_rounded_inputs_are_the_same_for_every_kernel(name: str, tiny_checkpoint: Make) -> None:
    """W8A8 natively is what the operations compute, up to inputs between two steps."""
    one, other = (load_decoder(tiny_checkpoint(name), each, "w8a8") for each in BACKENDS)
    assert_close(prefill(one), prefill(other), 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantization", ["int8", "int4", "w8a8", "fp8", "fp8 in bfloat16"])
def test_rows_do_not_depend_on_their_company(
    quantization: str, backend: str, tiny_checkpoint: Make
) -> None:
    """Natively, chunks and batches of any kind give the same bits; else the same to rounding."""
    quantization, _, short = quantization.partition(" in ")
    dtype = torch.bfloat16 if short else torch.float32
    decoder = load_decoder(tiny_checkpoint("qwen2-tied"), backend, quantization, dtype=dtype)
    if decoder.native is not None:  # of fp8, the kernels may round inputs as of plain weights
        assert all(each.rounds_inputs == bool(short) for each in packed_codes(decoder))
    whole = prefill(decoder, seed=0)
    for seed in range(1, 4):
        for one, other in zip(prefill(decoder, seed=seed), whole, strict=True):
            if decoder.native is not None:
                assert torch.equal(one, other)
            else:
                assert_close([one], [other], 3e-2 if short or quantization == "w8a8" else 1e-3)


def packed_codes(decoder: Decoder) -> list[PackedCodes]:
    """All codes of a decoder that runs natively."""
    matrices = [each.matrices() or [] for each in decoder.weights.all_coded().values()]
    found = [each for some in matrices for each in some if isinstance(each, PackedCodes)]
    assert found
    return found
