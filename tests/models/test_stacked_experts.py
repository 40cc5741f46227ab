"""Experts whose weights lie side by side: who has them so, and that one operation computes all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from folders import Load, Make
from paged import PagedRunner
from random_adapters import merged_decoder, random_adapter

from quire.kernels import get_backend
from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.backend import ReferenceBackend
from quire.kernels.triton.backend import TritonBackend
from quire.models.decoder import Decoder
from quire.models.hf_config import read_config
from quire.models.loader import load_model
from quire.models.weights import Weights
from quire.parallel.place import Place
from quire.quantization.registry import quantizer_of

CPU = torch.device("cpu")
REFERENCE = get_backend("cpu", "reference")
NAMES = ["mixtral", "qwen2-moe", "qwen3-moe-sparse"]


class TritonOnCpu(ReferenceBackend):
    """Triton's mixtures and adapters in its interpreter, everything else by plain torch."""

    name = "triton-on-cpu"
    mixes_without_waiting = True
    route = staticmethod(TritonBackend.route)
    mix_stacked_experts = staticmethod(TritonBackend.mix_stacked_experts)
    lora_shrink = staticmethod(TritonBackend.lora_shrink)
    lora_expand = staticmethod(TritonBackend.lora_expand)


def of_triton() -> TritonOnCpu:
    pytest.importorskip("triton", reason="triton is in the extra 'gpu'")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("it needs TRITON_INTERPRET=1")
    return TritonOnCpu()


def logits_of(decoder: Decoder, adapter: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 300, (each,), generator=generator).tolist() for each in (9, 4)]
    slots = None if adapter is None else [adapter, -1]
    runner = PagedRunner(decoder, REFERENCE, num_seqs=2, max_len=9, adapters=slots)
    return runner.prefill(prompts, seed=3)


def with_kernels(folder: Path, kernels: ReferenceBackend, **options: int) -> Decoder:
    return load_model(
        folder, read_config(folder), device=CPU, dtype=torch.float32, kernels=kernels, **options
    )


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str, tiny_checkpoint: Make, load: Load) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(name)
    decoder = load(folder, backend="reference")
    layer = "layers.1" if name == "qwen3-moe-sparse" else "layers.0"
    alike = [each for each in decoder.weights.names() if f"{layer}.mlp.experts." in each]
    assert decoder.weights.stacked([each for each in alike if "gate_up" in each]) is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1))
    runner = PagedRunner(decoder, REFERENCE, num_seqs=1, max_len=40)
    [ours] = runner.prefill([prompt.tolist()], seed=0)
    with torch.inference_mode():
        theirs = model(prompt[None]).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe-sparse"])
def test_logits_by_triton_are_those_of_the_reference(name: str, tiny_checkpoint: Make) -> None:
    kernels, folder = of_triton(), tiny_checkpoint(name)
    ours, theirs = with_kernels(folder, kernels), with_kernels(folder, ReferenceBackend())
    assert not ours.waits_for_device
    assert theirs.waits_for_device
    for one, other in zip(logits_of(ours), logits_of(theirs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_adapters_by_triton_change_what_they_should(tiny_checkpoint: Make) -> None:
    """Also beside stacked experts, which they leave alone; and when one takes another's slot."""
    kernels, folder = of_triton(), tiny_checkpoint("qwen2-moe")
    decoder = with_kernels(folder, kernels, max_adapters=2)
    assert not decoder.waits_for_device
    plain = logits_of(with_kernels(folder, ReferenceBackend()))
    for seed in (3, 4):
        adapter = random_adapter(decoder, seed)
        merged = logits_of(
            merged_decoder(with_kernels(folder, ReferenceBackend()), REFERENCE, adapter)
        )
        decoder.set_adapter(1, decoder.prepare_adapter(adapter))
        ours = logits_of(decoder, 1)
        torch.testing.assert_close(ours[0], merged[0], atol=2e-3, rtol=0)
        torch.testing.assert_close(ours[1], plain[1], atol=1e-4, rtol=0)


def test_weights_are_in_memory_once(tiny_checkpoint: Make, load: Load) -> None:
    """Each expert's weight is a view, and one that can be read and written as ever."""
    decoder = load(tiny_checkpoint("mixtral"), backend="reference")
    weights = decoder.weights
    names = [f"layers.0.mlp.experts.{number}.down.weight" for number in range(6)]
    stack = weights.stacked(names)
    assert stack is not None
    assert [weights[name].data_ptr() for name in names] == [each.data_ptr() for each in stack]
    assert weights.stacked(names[1:]) is None
    other = load(tiny_checkpoint("mixtral"))
    assert decoder.weight_bytes() == other.weight_bytes()
    before = logits_of(decoder)
    weights[names[2]].zero_()
    assert not torch.equal(logits_of(decoder)[0], before[0])


def test_experts_in_codes_are_not_stacked(tiny_checkpoint: Make, load: Load) -> None:
    """They are computed one by one, as the host says."""
    decoder = load(tiny_checkpoint("mixtral"), backend="reference", quantizer=quantizer_of("int8"))
    names = [f"layers.0.mlp.experts.{number}.down.weight" for number in range(6)]
    assert decoder.weights.stacked(names) is None
    assert decoder.waits_for_device


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_stacks_the_experts_that_it_has(rank: int, tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("mixtral")
    spec = with_kernels(folder, ReferenceBackend()).spec
    place = Place(tensor_rank=rank, tensor_size=2, expert_parallel=True)

    class Group:
        rank, size = place.tensor_rank, 2

    decoder = Decoder(
        spec, device=CPU, dtype=torch.float32, kernels=REFERENCE, place=place, group=Group()
    )
    names = [name for name in decoder.weights.names() if "layers.2.mlp.experts" in name]
    assert len(names) == 6
    stack = decoder.weights.stacked([name for name in names if "down" in name])
    assert stack is not None
    assert stack.shape == (3, 64, 112)


def test_what_cannot_be_stacked() -> None:
    """Of other shapes, or with values already."""
    weights = Weights(CPU, torch.float32)
    weights.create("a", (2, 3))
    weights.create("b", (3, 2))
    weights.create("c", (2, 3))
    with pytest.raises(ValueError, match="differ in shape"):
        weights.stack(["a", "b"])
    weights["c"].zero_()
    with pytest.raises(ValueError, match="have values"):
        weights.stack(["a", "c"])
    assert weights.stacked(["a"]) is None


def test_what_comes_in_codes_leaves_the_others_by_themselves() -> None:
    """With the values that they have, and without the memory that was for all."""
    weights = Weights(CPU, torch.float32)
    for name in "abc":
        weights.create(name, (2, 4))
    weights.stack(["a", "b", "c"])
    values = torch.arange(8.0).view(2, 4)
    weights.fill("b", "", "plain", values)
    codes = torch.ones(2, 4, dtype=torch.int8)
    weights.put_codes("c", "", QuantizedWeight("int8", codes, torch.ones(2, 1), 4, 4))
    assert weights.stacked(["a", "b", "c"]) is None
    assert torch.equal(weights["b"], values)
    assert weights["b"].untyped_storage().nbytes() == 32
    weights.fill("a", "", "plain", values)
    assert weights["a"].untyped_storage().nbytes() == 32
    assert weights.settle_codes("c") is not None
