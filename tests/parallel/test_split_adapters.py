"""Adapters on several ranks: each computes with its share, and together they do the whole."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_decoders import assert_close, load_decoder, prefill
from peft_adapters import read, write_adapter
from random_adapters import random_adapter
from ranks import Ranks

from quire.errors import AdapterError

Make = Callable[[str], Path]
SLOTS = [0, 2, -1, 1, 2]
LENGTHS = (9, 1, 14, 20, 3)


@pytest.mark.parametrize("ways", [(2, 1), (4, 1), (1, 2), (2, 2)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-mha-bias-tied",
        "gpt2",
        "falcon-7b",
        "falcon-rw",
        "phi3",
        "gemma2",
        "opt-350m",
    ],
)
def test_adapters_compute_what_they_do_on_one_rank(
    name: str, ways: tuple[int, int], tiny_checkpoint: Make
) -> None:
    """Any ranks, subsets, biases, DoRA, embeddings and heads, in one batch with the base."""
    load = partial(load_decoder, tiny_checkpoint(name), max_adapters=3)
    whole, ranks = load(), Ranks(load, *ways)
    for round_of in range(3):
        for slot in range(3):
            seed = random.Random(f"{name} {round_of} {slot}").randrange(1 << 30)
            whole.set_adapter(slot, whole.prepare_adapter(random_adapter(whole, seed)))
            ranks.put(slot, random_adapter(whole, seed))
        expected = prefill(whole, LENGTHS, SLOTS)
        assert_close(prefill(ranks, LENGTHS, SLOTS), expected, 1e-4)


def test_a_share_of_an_adapter_takes_its_share_of_memory(tiny_checkpoint: Make) -> None:
    load = partial(load_decoder, tiny_checkpoint("llama"), max_adapters=1)
    whole, ranks = load(), Ranks(load, 2, 2)
    adapter = random_adapter(whole, 3)
    assert adapter.linears
    size = whole.prepare_adapter(adapter).num_bytes
    shares = [each.prepare_adapter(adapter).num_bytes for each in ranks.decoders]
    assert sum(shares) < 2 * size
    assert max(shares) < 0.6 * size


def test_an_adapter_that_does_not_fit_is_refused_by_every_rank(tiny_checkpoint: Make) -> None:
    """By the whole model's shapes, also where its layer is on another stage."""
    load = partial(load_decoder, tiny_checkpoint("llama"), max_adapters=1)
    other = partial(load_decoder, tiny_checkpoint("gpt2"), max_adapters=1)
    adapter = random_adapter(other(), 1)
    for each in Ranks(load, 2, 2).decoders:
        with pytest.raises(AdapterError, match="the projection's 128, each in one"):
            each.prepare_adapter(adapter)


LLAMA = ["q_proj", "v_proj", "o_proj", "down_proj", "gate_proj"]


def write(base: Path, folder: Path, **config: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write_adapter(base, folder, **config)


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
def test_every_rank_can_read_an_adapter(name: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    """Of the layers of all stages, with rows in whatever order the checkpoint has them."""
    pytest.importorskip("peft")
    base = tiny_checkpoint(name)
    targets = LLAMA if name == "llama" else ["query_key_value", "dense_4h_to_h"]
    folder = write(base, tmp_path, r=4, target_modules=targets)
    load = partial(load_decoder, base, max_adapters=1)
    whole, ranks = load(), Ranks(load, 2, 2)
    whole.set_adapter(0, whole.prepare_adapter(read(base, folder, decoder=whole)))
    plain = prefill(ranks, (5, 12), [-1, -1])
    for each in ranks.decoders:
        each.set_adapter(0, each.prepare_adapter(read(base, folder, decoder=each)))
    found = prefill(ranks, (5, 12), [0, 0])
    assert_close(found, prefill(whole, (5, 12), [0, 0]), 1e-4)
    assert not torch.equal(found[1], plain[1])


@pytest.mark.parametrize(
    ("ways", "config", "named"),
    [
        ((2, 1), {"use_dora": True}, r"layers\.0\.attention\.qkv\.weight"),
        ((2, 1), {"modules_to_save": ["lm_head"]}, r"lm_head\.weight"),
        ((1, 2), {"modules_to_save": ["lm_head"]}, r"lm_head\.weight"),
        ((2, 1), {"bias": "all"}, r"attention\.qkv\.bias"),
    ],
)
def test_an_adapter_that_needs_the_model_s_weights_is_refused(
    ways: tuple[int, int],
    config: dict[str, Any],
    named: str,
    tiny_checkpoint: Make,
    tmp_path: Path,
) -> None:
    """They are on no rank, and the message says what to do about it."""
    pytest.importorskip("peft")
    base = tiny_checkpoint("qwen2")
    folder = write(base, tmp_path, r=4, target_modules=["q_proj"], **config)
    ranks = Ranks(partial(load_decoder, base, max_adapters=1), *ways)
    expected = rf"{named} .* need tensor_parallel_size=1 and pipeline_parallel_size=1"
    with pytest.raises(AdapterError, match=expected):
        read(base, folder, decoder=ranks.decoders[0])
