"""A model on several ranks computes what it does on one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIGS
from coded_decoders import assert_close, load_decoder, prefill
from ranks import Ranks

Make = Callable[[str], Path]

WHOLE_HEADS = ("gpt2-scaled", "mpt-6-heads")
"""Whose heads four ranks cannot share."""
MIXTURES = [name for name in CONFIGS if "mixtral" in name or "moe" in name]


@pytest.mark.parametrize("ways", [(2, 1), (4, 1), (1, 2), (2, 2)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_compute_what_one_does(
    name: str, ways: tuple[int, int], tiny_checkpoint: Make
) -> None:
    """Every family: heads, groups, biases, norms, windows, soft-caps, tied or not, mixtures."""
    tensor_size, num_stages = ways
    if tensor_size == 4 and name in WHOLE_HEADS:
        pytest.skip("2 and 6 heads are not shared by 4 ranks")
    load = partial(load_decoder, tiny_checkpoint(name))
    ranks = Ranks(load, tensor_size, num_stages)
    assert_close(prefill(ranks), prefill(load()), 1e-4)


@pytest.mark.parametrize("ways", [(2, 1), (4, 1), (2, 3)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", MIXTURES)
def test_ranks_with_an_expert_each_compute_what_one_does(
    name: str, ways: tuple[int, int], tiny_checkpoint: Make
) -> None:
    """Also where their number is none that the ranks divide, and beside layers without any."""
    load = partial(load_decoder, tiny_checkpoint(name))
    ranks = Ranks(load, *ways, expert_parallel=True)
    assert_close(prefill(ranks), prefill(load()), 1e-4)


@pytest.mark.parametrize("name", ["llama", "opt-350m", "gemma2", "qwen2-moe"])
def test_stages_hand_on_exactly_what_they_computed(name: str, tiny_checkpoint: Make) -> None:
    """Of bfloat16, too: a model in stages is the same to the last bit."""
    load = partial(load_decoder, tiny_checkpoint(name), dtype=torch.bfloat16)
    for ours, theirs in zip(prefill(Ranks(load, 1, 2)), prefill(load()), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-tied"])
def test_a_share_takes_its_share_of_memory(name: str, tiny_checkpoint: Make) -> None:
    """But for norms and biases, nothing is on two ranks, unless it is tied over two stages."""
    load = partial(load_decoder, tiny_checkpoint(name))
    whole = load()
    four = sum(each.weight_bytes() for each in Ranks(load, 2, 2).decoders)
    extra = whole.weights["embed.weight"].nbytes if whole.spec.tie_word_embeddings else 0
    if name == "gpt2":
        extra += whole.weights["embed_positions.weight"].nbytes
    vectors = sum(
        whole.weights[each].nbytes
        for each in whole.weights.names()
        if whole.weights[each].dim() == 1
    )
    assert whole.weight_bytes() + extra <= four <= whole.weight_bytes() + extra + vectors
