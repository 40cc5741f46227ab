"""Mixtures of experts: their weights in files, what is said of them, and who computes what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folders import Load, Make, copy_of, rewrite
from mixtures import MIXTRAL, stack
from paged import PagedRunner
from peft_adapters import plain_files, read, write_files
from random_adapters import merged_decoder, random_adapter

from quire.errors import AdapterError, ModelLoadError
from quire.kernels import available_backends, get_backend
from quire.models.decoder import Decoder
from quire.models.mlp import is_expert
from quire.models.spec import ExpertsSpec

KERNELS, REFERENCE = get_backend("cpu"), get_backend("cpu", "reference")
CPU = torch.device("cpu")


def prefill(decoder: Decoder, lengths: list[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 300, (each,), generator=generator).tolist() for each in lengths]
    runner = PagedRunner(decoder, KERNELS, num_seqs=len(prompts), max_len=max(lengths))
    return runner.prefill(prompts, seed=seed)


def test_specs_say_what_configurations_say(tiny_checkpoint: Make, load: Load) -> None:
    specs = {
        name: [(each.mlp.intermediate_size, each.mlp.experts) for each in load(folder).spec.layers]
        for name in ("mixtral", "qwen2-moe", "qwen2-moe-normalized", "qwen3-moe-sparse")
        for folder in [tiny_checkpoint(name)]
    }
    assert specs["mixtral"] == [(112, ExpertsSpec(6, 2, True))] * 3
    with_shared = (48, ExpertsSpec(6, 3, False, shared_size=80, shared_gate=True))
    assert specs["qwen2-moe"] == [with_shared, (112, None), with_shared]
    normalized = (48, ExpertsSpec(6, 3, True, shared_size=80, shared_gate=True))
    assert specs["qwen2-moe-normalized"] == [normalized] * 3
    sparse = (20, ExpertsSpec(20, 4, False))
    assert specs["qwen3-moe-sparse"] == [(112, None), sparse, (112, None), (112, None)]


def test_stacked_experts_are_the_same_experts(
    tiny_checkpoint: Make, load: Load, tmp_path: Path
) -> None:
    """Tensors of three axes, as in memory, and one for each expert and projection, as in files."""
    folder = copy_of(tiny_checkpoint("mixtral"), tmp_path)
    rewrite(folder, stack)
    one, other = load(folder), load(tiny_checkpoint("mixtral"))
    assert one.weights.names() == other.weights.names()
    for name in other.projections():
        assert torch.equal(one.read_weight(name), other.read_weight(name))


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("mixtral", MIXTRAL.format(1, 4, "w2")),
        ("mixtral", MIXTRAL.format(2, 0, "w3")),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
        ("qwen2-moe", "model.layers.0.mlp.experts.5.gate_proj.weight"),
        ("qwen2-moe", "model.layers.2.mlp.shared_expert.down_proj.weight"),
        ("qwen2-moe", "model.layers.2.mlp.shared_expert_gate.weight"),
        ("qwen3-moe", "model.layers.1.mlp.experts.3.up_proj.weight"),
    ],
)
def test_a_missing_tensor_is_named(
    name: str, missing: str, tiny_checkpoint: Make, load: Load, tmp_path: Path
) -> None:
    folder = copy_of(tiny_checkpoint(name), tmp_path)
    rewrite(folder, lambda tensors: tensors.pop(missing))
    with pytest.raises(ModelLoadError) as caught:
        load(folder)
    assert f"1 missing: {missing}" in str(caught.value)


def test_an_expert_that_is_not_in_the_configuration_is_named(
    tiny_checkpoint: Make, load: Load, tmp_path: Path
) -> None:
    folder = copy_of(tiny_checkpoint("qwen3-moe"), tmp_path)
    extra = "model.layers.0.mlp.experts.6.down_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({extra: torch.zeros(64, 48)}))
    with pytest.raises(ModelLoadError, match="1 unexpected: ") as caught:
        load(folder)
    assert extra in str(caught.value)


@pytest.mark.parametrize("stacked", [False, True])
def test_an_expert_of_another_shape_is_named(
    stacked: bool, tiny_checkpoint: Make, load: Load, tmp_path: Path
) -> None:
    folder = copy_of(tiny_checkpoint("mixtral"), tmp_path)
    if stacked:
        rewrite(folder, stack)
    with pytest.raises(ModelLoadError, match=r"experts\.0\..*configuration needs \["):
        load(folder, {"intermediate_size": 96})


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe-sparse"])
def test_rows_are_near_the_same_in_any_company(
    name: str, tiny_checkpoint: Make, load: Load
) -> None:
    decoder = load(tiny_checkpoint(name))
    lengths = [40, 17, 23]
    together = prefill(decoder, lengths, seed=1)
    again = prefill(decoder, lengths, seed=9)
    for one, other in zip(together, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


# Native kernels


@pytest.mark.parametrize("per_token", [1, 2, 3, 5])
def test_equal_scores_are_chosen_as_torch_chooses(
    per_token: int, tiny_checkpoint: Make, load: Load
) -> None:
    """A router of zeros leaves the choice to how equal numbers are sorted, everywhere the same."""
    made = []
    for backend in ("reference", None):
        folder = tiny_checkpoint("qwen3-moe-sparse")
        decoder = load(folder, {"num_experts_per_tok": per_token}, backend="reference")
        decoder = Decoder(
            decoder.spec, device=CPU, dtype=torch.float32, kernels=get_backend("cpu", backend)
        )
        whole = load(folder, backend="reference").weights
        for name in whole.names():
            decoder.weights[name].copy_(whole[name])
        decoder.weights["layers.1.mlp.router.weight"].zero_()
        decoder.weights["layers.1.mlp.router.weight"][3:9] = 0.125  # more or less than the others
        decoder.bind()
        made.append(torch.cat(prefill(decoder, [20, 3], seed=0)))
    torch.testing.assert_close(made[0], made[1], atol=1e-3, rtol=0)


@pytest.mark.skipif("cpu" not in available_backends(), reason="the native kernels were not built")
def test_experts_without_rows_are_not_computed_with(tiny_checkpoint: Make, load: Load) -> None:
    """One token has 2 of 6 experts: the weights of the others may be anything."""
    decoder = load(tiny_checkpoint("mixtral"), backend="cpu")
    assert decoder.native is not None
    before = prefill(decoder, [1], seed=0)[0]
    unread = 0
    for index in range(3):
        for number in range(6):
            weight = decoder.weights[f"layers.{index}.mlp.experts.{number}.down.weight"]
            kept = weight.clone()
            weight.fill_(torch.nan)
            if torch.equal(prefill(decoder, [1], seed=0)[0], before):
                unread += 1  # and stays spoiled: so others are, when the next is
            else:
                weight.copy_(kept)
    assert unread == 3 * 4
    assert torch.equal(prefill(decoder, [1], seed=0)[0], before)


# Adapters


def test_adapters_of_attention_and_shared_experts_change_what_they_should(
    tiny_checkpoint: Make, load: Load
) -> None:
    folder = tiny_checkpoint("qwen2-moe")
    for backend in ("reference", None):
        decoder = load(folder, backend=backend, max_adapters=1)
        assert not any(is_expert(name) for name in decoder.linears())
        assert any(name.endswith("shared.gate_up") for name in decoder.linears())
        adapter = random_adapter(decoder, 3)
        merged = merged_decoder(load(folder, backend="reference"), REFERENCE, adapter)
        decoder.set_adapter(0, decoder.prepare_adapter(adapter))
        runner = PagedRunner(decoder, KERNELS, num_seqs=1, max_len=30, adapters=[0])
        [ours] = runner.prefill([list(range(5, 35))], seed=2)
        runner = PagedRunner(merged, KERNELS, num_seqs=1, max_len=30)
        [theirs] = runner.prefill([list(range(5, 35))], seed=2)
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "module", "shape"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1", (112, 64)),
        ("qwen3-moe", "model.layers.0.mlp.experts.0.down_proj", (64, 48)),
    ],
)
def test_an_adapter_of_an_expert_is_refused(
    name: str, module: str, shape: tuple[int, int], tiny_checkpoint: Make, tmp_path: Path
) -> None:
    config, tensors = plain_files({"model.layers.0.self_attn.q_proj": (64, 64), module: shape})
    folder = write_files(tmp_path / "adapter", config, tensors)
    with pytest.raises(AdapterError, match="single experts of a mixture") as caught:
        read(tiny_checkpoint(name), folder)
    assert repr(module) in str(caught.value)
