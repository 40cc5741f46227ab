"""A decoder's whole step in the native library: what it computes, and that nothing else matters."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIGS, VOCAB_SIZE, build_config, build_model
from isas import rounds_activations, use_isa
from paged import PagedRunner

from quire.kernels import available_backends, get_backend
from quire.models.decoder import Decoder
from quire.models.hf_config import read_config
from quire.models.loader import load_model

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)

CPU = torch.device("cpu")
Make = Callable[[str], Path]
LENGTHS = [75, 30, 1]


def load(folder: Path, backend: str, dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = load_model(
        folder, read_config(folder), device=CPU, dtype=dtype, kernels=get_backend(CPU, backend)
    )
    assert (decoder.native is not None) == (backend == "cpu")
    return decoder


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def prefill(decoder: Decoder, prompts: list[list[int]], **options: Any) -> list[torch.Tensor]:
    runner = PagedRunner(
        decoder,
        get_backend(CPU),
        num_seqs=len(prompts),
        max_len=max(map(len, prompts)),
        block_size=options.pop("block_size", 8),
    )
    return runner.prefill(prompts, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers_in_exact_arithmetic(
    name: str, tiny_checkpoint: Make
) -> None:
    """Against transformers in float64: no further off than plain torch is in float32."""
    from transformers import AutoModelForCausalLM

    folder, prompts = tiny_checkpoint(name), prompts_of(LENGTHS)
    if name == "phi3-longrope":
        prompts = [prompt[:60] for prompt in prompts]
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # the others have no float64
    native = prefill(load(folder, "cpu"), prompts, seed=1)
    plain = prefill(load(folder, "reference"), prompts, seed=1)
    for prompt, ours, theirs in zip(prompts, native, plain, strict=True):
        with torch.inference_mode():
            expected = exact(torch.tensor([prompt])).logits[0]
        bound = 2 * (theirs - expected).abs().max().item() + 3e-5
        assert (ours - expected).abs().max().item() <= bound


def test_every_instruction_set_computes_the_same(isa: str, tiny_checkpoint: Make) -> None:
    """Up to rounding: windows, soft-caps, biases, ALiBi, learned positions, projections."""
    prompts = prompts_of([40, 9])
    for name in (
        "llama",
        "qwen2-tied",
        "gemma2",
        "mpt-6-heads",
        "gpt2",
        "falcon-7b",
        "opt-350m",
        "mixtral",
        "qwen2-moe",
    ):
        folder = tiny_checkpoint(name)
        ours = torch.cat(prefill(load(folder, "cpu"), prompts, seed=1))
        plain = torch.cat(prefill(load(folder, "reference"), prompts, seed=1))
        torch.testing.assert_close(ours, plain, atol=1e-3, rtol=0)
        decoder = load(folder, "cpu", torch.bfloat16)
        ours = torch.cat(prefill(decoder, prompts, seed=1))
        with use_isa("generic"):
            exact = torch.cat(prefill(decoder, prompts, seed=1))
        # Where activations are rounded as well: no further off than plain torch is.
        bound = 1e-3 * exact.norm()
        if rounds_activations(isa):
            plain = torch.cat(prefill(load(folder, "reference", torch.bfloat16), prompts, seed=1))
            bound = 1.25 * (plain - exact).norm()
        assert (ours - exact).norm() <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma2",
        "mpt",
        "gpt-neox",
        "qwen3",
        "opt-350m",
        "mixtral",
        "qwen2-moe-normalized",
        "qwen3-moe-sparse",
    ],
)
def test_a_sequence_has_the_same_bits_in_any_company(
    isa: str, name: str, dtype: torch.dtype, tiny_checkpoint: Make
) -> None:
    """Alone or among others, in whatever chunks and blocks, on however many threads."""
    decoder = load(tiny_checkpoint(name), "cpu", dtype)
    prompts = prompts_of([90, 41, 17, 64])
    expected = [prefill(decoder, [prompt], seed=0)[0] for prompt in prompts]
    before = torch.get_num_threads()
    try:
        for num_threads, seed, block_size in ((1, 1, 8), (2, 2, 16), (3, 3, 5)):
            torch.set_num_threads(num_threads)
            together = prefill(decoder, prompts, seed=seed, block_size=block_size)
            for ours, alone in zip(together, expected, strict=True):
                assert torch.equal(ours, alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sequences_have_the_same_bits_however_their_keys_are_shared_out(
    isa: str, dtype: torch.dtype, tiny_checkpoint: Make
) -> None:
    """Keys of one sequence are split among idle threads; one thread goes over them in order."""
    decoder = load(tiny_checkpoint("llama"), "cpu", dtype)
    prompts = prompts_of([1100, 700])
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 7):
            torch.set_num_threads(num_threads)
            runner = PagedRunner(decoder, get_backend(CPU), num_seqs=2, max_len=1200)
            runner.step([(0, prompts[0][:600]), (1, prompts[1])])
            rows = [runner.step([(0, prompts[0][600:1095])])[0][-1]]
            rows += [runner.step([(0, [token])])[0][0] for token in prompts[0][1095:]]
            results.append(torch.stack(rows))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_bfloat16_weights_are_multiplied_in_float32(
    isa: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """The same as a float32 model of the same rounded weights, but for what is rounded to 8 bits.

    That is the KV cache, and activations where the instruction set takes them so.
    """
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint("llama")
    rounded = tmp_path / "model"
    rounded.mkdir()
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (rounded / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {key: value.bfloat16().float() for key, value in tensors.items()},
        rounded / "model.safetensors",
        metadata={"format": "pt"},
    )
    prompt = prompts_of([1])
    ours = prefill(load(folder, "cpu", torch.bfloat16), prompt, seed=0)[0]
    exact = prefill(load(rounded, "cpu", torch.float32), prompt, seed=0)[0]
    # One token: attention returns its value, which the cache rounds.
    bound = 0.04 if rounds_activations(isa) else 0.02
    assert (ours - exact).abs().max() < bound * exact.abs().max()


def test_a_broken_number_stays_in_its_sequence(isa: str, tiny_checkpoint: Make) -> None:
    """NaN in the embedding of one token makes nothing of its neighbours' logits."""
    decoder = load(tiny_checkpoint("gpt2"), "reference")
    assert decoder.native is None
    folder = tiny_checkpoint("llama")
    native = load_model(
        folder,
        read_config(folder),
        device=CPU,
        dtype=torch.float32,
        kernels=get_backend(CPU, "cpu"),
    )
    prompts = prompts_of([20, 33])
    native.weights["embed.weight"][prompts[0][3]] = torch.nan
    prompts[1] = [token if token != prompts[0][3] else 0 for token in prompts[1]]
    expected = prefill(native, [prompts[1]], seed=0)[0]
    broken, whole = prefill(native, prompts, seed=4)
    assert torch.isnan(broken[3:]).all()
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_that_nobody_sees_are_not_read(
    isa: str, dtype: torch.dtype, tiny_checkpoint: Make
) -> None:
    """Behind a sliding window the block table may hold anything, and blocks be another's."""
    decoder = load(tiny_checkpoint("mistral"), "cpu", dtype)
    window = decoder.spec.layers[0].attention.sliding_window
    assert window is not None
    assert window < 60
    [prompt] = prompts_of([90])

    def last_rows(spoil: bool) -> torch.Tensor:
        runner = PagedRunner(decoder, get_backend(CPU), num_seqs=1, max_len=100)
        runner.step([(0, prompt)])
        rows = []
        for token in (3, 4, 5):
            if spoil:
                unseen = (runner.lengths[0] + 1 - window) // 8
                runner.tables[0, :unseen] = 1 << 27
            rows.append(runner.step([(0, [token])])[0][0])
        return torch.stack(rows)

    assert torch.equal(last_rows(spoil=True), last_rows(spoil=False))


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 9,001 tokens: several stretches of logits, the last of them no whole block."""
    folder = tmp_path_factory.mktemp("large_vocabulary")
    config = build_config("llama")
    config.vocab_size = 9001
    build_model(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["large", "llama", "qwen2-tied", "gemma2", "opt-350m"])
def test_the_likeliest_token_is_that_of_the_logits(
    name: str, dtype: torch.dtype, tiny_checkpoint: Make, large_vocabulary: Path
) -> None:
    """Bit for bit, though the logits are never all there; NaN shows in the row that has it."""
    folder = large_vocabulary if name == "large" else tiny_checkpoint(name)
    native = load(folder, "cpu", dtype).native
    assert native is not None
    config = read_config(folder)
    hidden = torch.randn(40, config["hidden_size"], generator=torch.Generator().manual_seed(1))
    hidden[7] = torch.nan
    indices = torch.randperm(40)[:35]
    ids, highest = native.likeliest(hidden, indices)
    logits = native.logits(hidden[indices])
    expected = logits.max(dim=1)
    assert torch.equal(highest.isnan(), indices == 7)
    rows = (indices != 7).nonzero()[:, 0]
    assert torch.equal(highest[rows], expected.values[rows])
    assert torch.equal(ids[rows], logits[rows].argmax(dim=1))


def run(program: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("QUIRE_")}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )


PROGRAM = """
from quire import LLM, SamplingParams
with LLM("quire/demo") as llm:
    params = SamplingParams(temperature=0, max_tokens=12)
    print(llm.generate("What is the capital of France ?", params)[0].outputs[0].text)
"""


def test_without_the_library_the_reference_kernels_run_and_say_so(tmp_path: Path) -> None:
    """An install without a compiler works, with one line that tells what it lacks."""
    done = run(PROGRAM, QUIRE_NATIVE_LIBRARY=str(tmp_path / "none.so"))
    assert "Paris" in done.stdout, done.stderr
    assert done.stderr.count("slower reference kernels run") == 1
    assert "reference kernels" in done.stderr


def test_a_library_that_must_be_there_is(tmp_path: Path) -> None:
    """QUIRE_REQUIRE_NATIVE=1 makes a missing library an error that names it."""
    missing = str(tmp_path / "none.so")
    done = run(PROGRAM, QUIRE_NATIVE_LIBRARY=missing, QUIRE_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert missing in done.stderr
    assert "LibraryError" in done.stderr
