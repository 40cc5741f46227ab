"""A model on several processes, whose native steps meet in shared memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIGS, VOCAB_SIZE
from coded_decoders import assert_close, load_decoder
from isas import instruction_sets
from rank_parts_models import compute, put_adapters
from rank_processes import RankProcess, run_ranks

from quire.kernels import available_backends
from quire.parallel.shared_memory import SharedMemory

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)

Make = Callable[[str], Path]

PROMPTS = [
    [random.Random(length).randrange(VOCAB_SIZE) for _ in range(length)] for length in (33, 7, 1)
]
NAMES = (
    "llama",
    "falcon-7b",
    "falcon-rw",
    "gpt2",
    "gemma2",
    "opt-350m",
    "qwen2-tied",
    "mixtral",
    "qwen2-moe",
)


def run(
    tmp_path: Path,
    cases: list[dict[str, Any]],
    tensor_size: int = 1,
    num_stages: int = 1,
    **sizes: int,
) -> list[list[torch.Tensor]]:
    """Run models on ranks, and return the logits of each.

    Hidden states are the same on all ranks of a stage, to the last bit.
    """
    for number, case in enumerate(cases):
        case["out"] = str(tmp_path / f"{number}.pt")
        case["folder"] = str(case["folder"])
    with SharedMemory.create(tensor_size, num_stages, **sizes) as memory:
        digests = run_ranks(
            memory,
            "rank_parts_models:run_models",
            range(tensor_size * num_stages),
            cases=cases,
            prompts=PROMPTS,
        )
    for stage in range(num_stages):
        own = digests[stage * tensor_size : (stage + 1) * tensor_size]
        assert all(each == own[0] for each in own)
    return [torch.load(case["out"], weights_only=True) for case in cases]


@pytest.mark.parametrize("ways", [(2, 1), (1, 2), (2, 2)], ids="{0[0]}x{0[1]}".format)
def test_ranks_compute_what_one_does(
    ways: tuple[int, int], tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """Heads, groups, biases, parallel residuals, post-norms, projections, tied or not."""
    folders = [tiny_checkpoint(name) for name in NAMES]
    cases = [{"folder": folder, "threads": 1 + number % 2} for number, folder in enumerate(folders)]
    for folder, logits in zip(folders, run(tmp_path, cases, *ways), strict=True):
        expected = compute(load_decoder(folder, "cpu"), PROMPTS, None)
        assert_close(logits, expected, 1e-4)


def test_what_does_not_fit_a_slot_is_summed_piece_by_piece(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """A row of hidden states takes several exchanges, too."""
    folders = [tiny_checkpoint(name) for name in ("llama", "gemma2", "mixtral", "opt-350m")]
    cases = [{"folder": folder, "threads": 2} for folder in folders]
    results = run(tmp_path, cases, 2, capacity=33)
    for folder, logits in zip(folders, results, strict=True):
        assert_close(logits, compute(load_decoder(folder, "cpu"), PROMPTS, None), 1e-4)


def test_experts_are_shared_out(tiny_checkpoint: Make, tmp_path: Path) -> None:
    """Each is whole on one rank; a token's experts may all be elsewhere."""
    folders = [tiny_checkpoint(name) for name in CONFIGS if "mixtral" in name or "moe" in name]
    cases = [{"folder": folder, "expert_parallel": True} for folder in folders]
    for folder, logits in zip(folders, run(tmp_path, cases, 2), strict=True):
        assert_close(logits, compute(load_decoder(folder, "cpu"), PROMPTS, None), 1e-4)


@pytest.mark.parametrize("ways", [(2, 1), (1, 2), (2, 2)], ids="{0[0]}x{0[1]}".format)
def test_adapters_have_a_share_on_each_rank(
    ways: tuple[int, int], tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """Embeddings, output matrices and biases of theirs, too; one sequence has none."""
    slots = [0, -1, 1]
    folders = [tiny_checkpoint(name) for name in ("llama", "gpt2", "falcon-7b", "qwen2-tied")]
    cases = [{"folder": folder, "slots": slots} for folder in folders]
    for folder, logits in zip(folders, run(tmp_path, cases, *ways), strict=True):
        whole = load_decoder(folder, "cpu", max_adapters=2)
        put_adapters(whole, folder)
        assert_close(logits, compute(whole, PROMPTS, slots), 1e-4)


def test_stages_compute_the_same_bits_as_one_rank(tiny_checkpoint: Make, tmp_path: Path) -> None:
    """Nothing is summed over ranks there, also of bfloat16."""
    folders = [tiny_checkpoint(name) for name in ("llama", "mixtral", "opt-350m")]
    cases = [{"folder": folder, "dtype": "bfloat16"} for folder in folders]
    for folder, logits in zip(folders, run(tmp_path, cases, 1, 2), strict=True):
        whole = load_decoder(folder, "cpu", dtype=torch.bfloat16)
        expected = compute(whole, PROMPTS, None)
        for ours, theirs in zip(logits, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_every_instruction_set_sums_over_ranks(tiny_checkpoint: Make, tmp_path: Path) -> None:
    """Up to rounding the same, whatever the kernels round activations to."""
    folder = tiny_checkpoint("llama")
    names = instruction_sets()
    cases = [{"folder": folder, "isa": name} for name in names]
    results = run(tmp_path, cases, 2)
    expected = compute(load_decoder(folder, "cpu"), PROMPTS, None)
    for logits in results:
        assert_close(logits, expected, 1e-4)


def test_a_step_ends_when_a_rank_is_killed(tiny_checkpoint: Make) -> None:
    """Within the native library, too, nobody waits for who is gone."""
    folder = str(tiny_checkpoint("llama"))
    with SharedMemory.create(2) as memory:
        part = "rank_parts_models:step_for_ever"
        first, second = (
            RankProcess(memory, rank, part, folder=folder, lost=1) for rank in range(2)
        )
        found = first.result()
        second.process.communicate()
    assert (found["lost"], found["why"]) == (1, "ended: its process is gone")
