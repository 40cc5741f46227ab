"""Mixtures of experts in codes: every expert is a projection like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from coded_checkpoints import RECIPES, write_pair
from coded_decoders import BACKENDS, assert_close, load_decoder, most_off, plain_twin, prefill
from ct_checkpoints import quantized_folder
from folders import copy_of, rewrite
from mixtures import stack

from quire.converter.folder import convert
from quire.converter.targets import Target
from quire.errors import ModelLoadError

Make = Callable[[str], Path]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", [each for each in RECIPES if each != "w8a8"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_a_quantized_checkpoint_is_the_model_of_its_values(
    name: str, recipe: str, backend: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    quantized, plain = write_pair(tiny_checkpoint(name), tmp_path, RECIPES[recipe])
    decoder = load_decoder(quantized, backend)
    assert (decoder.native is not None) == (backend == "cpu")
    assert decoder.is_coded("layers.2.mlp.experts.5.gate_up")
    assert decoder.is_coded("layers.0.mlp.experts.0.down")
    most = most_off(name, backend)
    assert_close(prefill(decoder), prefill(load_decoder(plain)), most)


@pytest.mark.parametrize("form", ["compressed-tensors-fp8", "bitsandbytes-nf4"])
def test_a_router_in_codes_is_made_plain(form: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    """Some tools quantize whatever is a matrix."""
    folders = quantized_folder(tiny_checkpoint("qwen2-moe"), tmp_path, form)
    decoder = load_decoder(folders.quantized)
    twin = load_decoder(folders.dequantized)
    for name in ("layers.0.mlp.router.weight", "layers.2.mlp.shared_gate.weight"):
        assert torch.equal(decoder.weights[name], twin.weights[name])
    assert_close(prefill(decoder), prefill(twin), 1e-4)


SHARED = "qwen2-moe-normalized"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "quantization", "options"),
    [
        *((name, each, None) for name in ("mixtral", SHARED) for each in ("int8", "fp8", "nf4")),
        ("qwen3-moe-sparse", "int8", None),
        ("mixtral", "int4", {"group_size": 16}),
        (SHARED, "int4", {"ignore": ["*.experts.1.*", "*.experts.2.gate_up.up", "*.shared.down"]}),
    ],
)
def test_a_model_quantized_while_loading_is_the_model_of_its_values(
    name: str, quantization: str, options: dict | None, backend: str, tiny_checkpoint: Make
) -> None:
    folder = tiny_checkpoint(name)
    decoder = load_decoder(folder, backend, quantization, options)
    twin = plain_twin(decoder, folder)
    assert decoder.weight_bytes() < twin.weight_bytes()
    if options and "ignore" in options:
        assert not decoder.is_coded("layers.0.mlp.experts.1.down")
        assert decoder.is_coded("layers.0.mlp.experts.2.gate_up")
    most = most_off(name, backend)
    assert_close(prefill(decoder), prefill(twin), most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", ["int8", "w8a8", "int4", "fp8", "nf4"])
def test_rows_do_not_depend_on_their_company(
    isa: str, quantization: str, dtype: torch.dtype, tiny_checkpoint: Make
) -> None:
    decoder = load_decoder(tiny_checkpoint(SHARED), "cpu", quantization, dtype=dtype)
    assert decoder.native is not None
    together = prefill(decoder, (33, 7, 1), seed=1)
    assert all(
        torch.equal(one, other)
        for one, other in zip(together, prefill(decoder, (33, 7, 1), seed=8), strict=True)
    )
    assert torch.equal(prefill(decoder, (33,), seed=3)[0], together[0])


def test_a_missing_tensor_of_an_expert_in_codes_is_named(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    quantized, _ = write_pair(tiny_checkpoint("mixtral"), tmp_path, RECIPES["awq"])
    missing = "model.layers.1.block_sparse_moe.experts.3.w2.scales"
    rewrite(quantized, lambda tensors: tensors.pop(missing))
    with pytest.raises(ModelLoadError, match="1 missing: ") as caught:
        load_decoder(quantized)
    assert missing in str(caught.value)


@pytest.mark.parametrize("to", ["awq", "gptq", "int8"])
def test_a_folder_can_be_quantized(to: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    """Also where no token of the texts chooses some of the experts."""
    source = tiny_checkpoint("qwen2-moe")
    target = Target(to) if to == "int8" else Target(to, group_size=-1)
    convert(source, tmp_path / "out", target, texts=["the fox"])
    decoder = load_decoder(tmp_path / "out")
    assert all(decoder.is_coded(name) for name in decoder.projections() if name != "lm_head")
    ours, plain = prefill(decoder), prefill(load_decoder(source))
    error = torch.cat(ours) - torch.cat(plain)
    assert error.norm() < (0.1 if to == "int8" else 0.6) * torch.cat(plain).norm()


def test_stacked_experts_get_the_codes_of_single_ones(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """While loading, and in a folder that is quantized."""
    plain = tiny_checkpoint("mixtral")
    stacked = copy_of(plain, tmp_path)
    rewrite(stacked, stack)
    decoders = [load_decoder(folder, quantization="int8") for folder in (plain, stacked)]
    for number, folder in enumerate((plain, stacked)):
        convert(folder, tmp_path / str(number), Target("int8"))
        decoders.append(load_decoder(tmp_path / str(number)))
    for name in decoders[0].projections():
        if name != "lm_head":
            one, other, *converted = (each.read_weight(name) for each in decoders)
            assert torch.equal(one, other)
            assert torch.equal(*converted)
