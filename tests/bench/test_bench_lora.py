"""`quire bench lora`: adapters as peft knows them, and figures of what was asked for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from quire import LLM
from quire.bench import adapter_runs, cli, lora
from quire.bench.adapter_runs import VS_BASE, Mode
from quire.bench.limit import ModelSize
from quire.bench.random_adapters import TARGETS, AdapterShape
from quire.bench.workload import uniform


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_random_adapter_is_one_that_peft_takes(tiny_llama, tmp_path):
    """Every target of every layer is changed, by matrices of the rank, and the model with them."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = AdapterShape.of(tiny_llama, TARGETS, 3, "float32").write(tmp_path / "one", seed=0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        before = base(ids).logits
        model = peft.PeftModel.from_pretrained(base, folder)
        assert not torch.allclose(before, model(ids).logits, atol=1e-4)
    given, taken = load_file(folder / "adapter_model.safetensors"), model.state_dict()
    for name, tensor in given.items():
        assert torch.equal(taken[name.replace(".weight", ".default.weight")], tensor)
    assert len(given) == sum("lora_" in name for name in taken)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_seed_is_a_content_of_a_known_size(tiny_llama, tmp_path, dtype):
    """The same seed gives the same bytes, another gives others; the ceiling counts all of them."""
    shape = AdapterShape.of(tiny_llama, TARGETS, 4, dtype)
    one, same, other = (
        shape.write(tmp_path / name, seed) / "adapter_model.safetensors"
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert one.read_bytes() == same.read_bytes()
    assert one.read_bytes() != other.read_bytes()
    assert sum(t.nbytes for t in load_file(one).values()) == shape.num_bytes


def test_targets_are_found_by_name(tiny_llama):
    """Some can be left out; a name that the checkpoint has not is an error."""
    shape = AdapterShape.of(tiny_llama, ["q_proj"], 2, "float32")
    assert all(name.endswith(".q_proj") for name in shape.targets)
    with pytest.raises(ValueError, match="'c_attn'"):
        AdapterShape.of(tiny_llama, ["q_proj", "c_attn"], 2, "float32")


def test_prompts_take_adapters_in_turns():
    """Each adapter has as many prompts as any other, and no adapter is none at all."""
    workload = uniform(32, 2, 2, vocab_size=100)
    assert Mode("base", workload, []).lora_requests() is None
    requests = Mode("mixed", workload, list("abcdefgh")).lora_requests()
    assert requests is not None
    assert [requests.count(name) for name in "abcdefgh"] == [4] * 8


def test_the_ceiling_is_that_of_the_bytes():
    """141 MB of adapters beside 0.99 GB of weights allow 0.875 of the speed."""
    targets = {}
    for i in range(24):
        sizes = [(896, 896), (128, 896), (128, 896), (896, 896)]
        sizes += [(4864, 896), (4864, 896), (896, 4864)]
        targets |= {f"layers.{i}.{name}": s for name, s in zip(TARGETS, sizes, strict=True)}
    shape = AdapterShape(None, targets, 16, "bfloat16")  # type: ignore[arg-type]
    assert shape.num_bytes == pytest.approx(17.6e6, rel=0.01)
    ceilings = lora.ceilings(ModelSize(0, 0, 988_000_000), shape, [0, 1, 8])
    assert ceilings[0] == 1
    assert ceilings[1] == pytest.approx(0.983, abs=0.001)
    assert ceilings[2] == pytest.approx(0.875, abs=0.001)


def test_every_other_first_token_waits_for_a_swap(tiny_llama, tmp_path):
    """Of each pair, one request finds its adapter in the slot, and the other has it put there."""
    shape = AdapterShape.of(tiny_llama, TARGETS, 2, "float32")
    with LLM(tiny_llama, dtype="float32", enable_lora=True, max_loras=1, max_cpu_loras=2) as llm:
        adapters = [llm.load_lora(shape.write(tmp_path / str(i), i)) for i in range(2)]
        placed = []
        put = llm.llm_engine._runner.set_adapter
        llm.llm_engine._runner.set_adapter = lambda *given: (placed.append(given), put(*given))
        done = adapter_runs.measure_swap(
            llm, adapters, vocab_size=300, input_len=3, repeats=5, say=lambda line: None
        )
    assert len(placed) == 2 + 5
    runs = done.runs
    pairs = zip(runs["swapped_seconds"], runs["resident_seconds"], strict=True)
    assert runs["swap_seconds"] == [a - b for a, b in pairs]
    assert len(runs["placing_seconds"]) == 5


@pytest.fixture
def bench(tiny_llama, monkeypatch):
    """Run the command on a tiny checkpoint."""
    monkeypatch.setattr(adapter_runs, "_SETTLED_SECONDS", 0.0)

    def run(*arguments):
        words = ["lora", "--model", str(tiny_llama), "--dtype", "float32", *map(str, arguments)]
        return CliRunner().invoke(cli.app, words)

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parts", "throughput,speed"), "'speed'"),
        (("--adapters", 9, "--batch", 8), "--batch 8"),
        (("--targets", "c_attn"), "'c_attn'"),
        (("--output-len", 100_000), "--output-len"),
        (("--dtype", "int8"), "int8"),
    ],
)
def test_what_is_wrong_is_an_error_of_usage(bench, arguments, message):
    """The value that is wrong is named, and nothing is measured."""
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


def test_every_part_has_its_figures(bench, tmp_path):
    """Rates beside those of the same turn, a swap for each pair, loads of each kind."""
    file = tmp_path / "figures.json"
    sizes = ("--adapters", 2, "--batch", 4, "--input-len", 4, "--output-len", 3, "--rank", 2)
    result = bench(*sizes, "--repeats", 2, "--json", file)
    assert result.exit_code == 0, result.output
    done = json.loads(file.read_text())
    four, one = "4 x (4 in, 3 out)", "1 x (4 in, 3 out)"
    assert list(done["throughput"][four]) == ["base", "1 adapter", "2 adapters"]
    assert list(done["throughput"][one]) == ["base", "1 adapter"]
    for name in (four, one):
        rates = {label: mode["runs"] for label, mode in done["throughput"][name].items()}
        assert rates["base"][VS_BASE] == [1.0, 1.0]
        for runs in rates.values():
            base = rates["base"]["decode_tokens_per_second"]
            ratios = [a / b for a, b in zip(runs["decode_tokens_per_second"], base, strict=True)]
            assert runs[VS_BASE] == pytest.approx(ratios)
    ceilings = [mode["ceiling"] for mode in done["throughput"][four].values()]
    assert ceilings == sorted(ceilings, reverse=True)
    assert len(done["swap"]["swap_seconds"]) == 2 * lora.SWAPS
    assert {name: len(runs) for name, runs in done["load"].items()} == {
        "first_seconds": 2,
        "again_seconds": 2,
    }
    for told in ("2 adapters", "what swapping adds", "again, unchanged"):
        assert told in result.output
