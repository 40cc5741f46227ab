"""Folders that are written: read again bit for bit, and nothing but rounding between the two."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quire.converter import rounds as rounds_module
from quire.converter.folder import convert
from quire.converter.rounds import Rounds
from quire.converter.source import Source
from quire.converter.targets import NAMES, WHOLE, Target
from quire.errors import ConfigError, ModelLoadError, UnsupportedModelError
from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.quantized import dequantize
from quire.models.tensor_files import TensorFiles
from quire.quantization.activation_aware import Found
from quire.quantization.registry import format_of
from quire.quantization.rounding import Grid, round_int4

TEXTS = ("the quick brown fox jumps", "What is the capital of France ?", "hello world")
MODELS = (
    "llama-mha-bias-tied",
    "qwen2-tied",
    "gemma2",
    "phi3",
    "opt-350m",
    "gpt-neox",
    "falcon-40b",
)


def target_of(name: str, **options: Any) -> Target:
    if name in ("awq", "gptq", "int4"):
        options = {"group_size": WHOLE, **options}
    return Target(name, **options)


def read_again(folder: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """The dequantized weights of a folder, by module, read as an engine reads it."""
    config = json.loads((folder / "config.json").read_text())
    weight_format = format_of(config["quantization_config"])
    found = {}
    with TensorFiles(folder) as files:
        names = set(files.names())
        for module, shape in shapes.items():
            kinds = weight_format.kinds(module)
            assert kinds is not None
            tensors = {
                kind: files.tensor(f"{module}.{kind}")
                for kind in kinds.required | kinds.optional
                if f"{module}.{kind}" in names
            }
            assert kinds.required <= tensors.keys()
            found[module] = dequantize(weight_format.read(module, tensors, shape))
    return found


# Every target and every model, and of both together those where something is folded or grouped.
PAIRS = [(name, "gpt-neox") for name in NAMES]
PAIRS += [("int8", model) for model in MODELS if model != "gpt-neox"]
PAIRS += [("awq", "gemma2"), ("awq", "phi3"), ("gptq", "falcon-40b"), ("gptq", "qwen2-tied")]


@pytest.mark.parametrize(("name", "model"), PAIRS)
def test_what_is_read_is_what_was_made(
    name: str, model: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Bit for bit, scales rounded to their type and all; other tensors keep their values."""
    folder, target = tiny_checkpoint(model), target_of(name)
    out = tmp_path / "made"
    summary = convert(folder, out, target, texts=TEXTS)
    with Source(folder) as source:
        from quire.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(folder)
        prompts = [tokenizer.encode(text) for text in TEXTS]
        rounds = Rounds(source, target, WHOLE, prompts)
        made = {module.name: dequantize(weight) for module, weight in rounds.run()}
        shapes = {module.name: source.shape(module) for module in source.modules()}
        plain = [each for each in source.places if each.removesuffix(".weight") not in made]
        kept = {name: source.files.tensor(name).clone() for name in plain}
    again = read_again(out, shapes)
    assert made.keys() == again.keys()
    assert summary.num_modules == len(made)
    for module, weight in made.items():
        assert torch.equal(weight, again[module]), module
    written = load_file(out / "model.safetensors")
    for each, tensor in kept.items():
        expected = rounds.changed.get(each, tensor)
        assert torch.equal(written[each], expected.to(written[each].dtype)), each
    assert summary.codes_after + summary.plain_after == sum(t.nbytes for t in written.values())


@pytest.mark.parametrize(
    "target",
    [
        Target("gptq", group_size=32, by_importance=True),
        Target("gptq", group_size=32, symmetric=False),
        Target("awq", group_size=32, symmetric=True),
        Target("int4", group_size=32, symmetric=False),
        Target("int4", calibrated=True),
    ],
    ids=str,
)
def test_groups_orders_and_zeros_are_read_again(
    target: Target, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("gpt-neox")
    summary = convert(folder, tmp_path / "made", target, texts=TEXTS)
    assert summary.group_size == 32
    with Source(folder) as source:
        shapes = {module.name: source.shape(module) for module in source.modules()}
        plain = {each: source.files.tensor(f"{each}.weight").clone() for each in shapes}
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    if target.name == "gptq":
        assert (config["desc_act"], config["sym"]) == (target.by_importance, target.is_symmetric)
    for module, weight in read_again(tmp_path / "made", shapes).items():
        error = (weight - plain[module]).norm() / plain[module].norm()
        # Factors in norms apart, where 4 bits lose about a tenth.
        assert error < (0.3 if target.name == "gptq" or not target.needs_inputs else 2), module


@pytest.mark.parametrize(
    "model", [*MODELS, "llama", "mpt", "opt", "falcon-rw", "falcon-7b", "gpt-neox-serial"]
)
def test_factors_are_taken_out_where_they_are_put_in(
    model: str, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers: without rounding, the model with any factors computes what it did."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    exact: list[torch.Tensor] = []
    num_factors = 0

    def any_factors(
        weights: Sequence[torch.Tensor], inputs: torch.Tensor, grid: Grid, num_alphas: int = 2
    ) -> Found:
        nonlocal num_factors
        if num_alphas == 1:
            return Found()
        num_factors += 1
        return Found(torch.rand(inputs.shape[1], generator=generator) + 0.5)

    def unrounded(
        weight: torch.Tensor, grid: Grid, factors: torch.Tensor | None, _: object
    ) -> QuantizedWeight:
        # A copy: the file is closed before they are looked at.
        exact.append(weight.float() / (torch.ones(1) if factors is None else factors))
        return round_int4(weight, grid)

    monkeypatch.setattr(rounds_module, "search", any_factors)
    monkeypatch.setattr(rounds_module, "round_int4", unrounded)
    folder = tiny_checkpoint(model)
    with Source(folder) as source:
        rounds = Rounds(source, target_of("awq"), WHOLE, [[5, 9, 200, 31]])
        names = [f"{module.name}.weight" for module, _ in rounds.run()]
    changed = {**dict(zip(names, exact, strict=True)), **rounds.changed}
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[7, 30, 100, 250, 3, 4, 5]])
    with torch.no_grad():
        wanted = plain(ids).logits
        state = plain.state_dict()
        assert changed.keys() <= state.keys()
        for name, tensor in changed.items():
            state[name].copy_(tensor)
        got = plain(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    # The 350m model's norms come after the residual, and Falcon-7b's one norm serves two.
    assert (num_factors > 0) == (model not in ("opt-350m", "falcon-7b"))


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_compressed_tensors_are_what_transformers_reads(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint("gpt-neox")
    convert(folder, tmp_path / "made", Target(name))
    with Source(folder) as source:
        shapes = {module.name: source.shape(module) for module in source.modules()}
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = plain.state_dict()
    for module, weight in read_again(tmp_path / "made", shapes).items():
        state[f"{module}.weight"].copy_(weight)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    ids = torch.tensor([[7, 30, 100, 250, 3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)


def test_large_models_are_sharded_as_others_shard_them(tiny_llama: Path, tmp_path: Path) -> None:
    """No file above the limit but for a tensor that is, and the same tensors as in one file."""
    convert(tiny_llama, tmp_path / "one", Target("int8"))
    convert(tiny_llama, tmp_path / "many", Target("int8"), shard_bytes=30_000)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(each.nbytes for each in tensors.values()) <= 30_000
        for name, tensor in tensors.items():
            assert index["weight_map"][name] == file.name
            assert torch.equal(tensor.float(), whole[name].float())
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_sharded_checkpoints_are_read(tmp_path: Path, tiny_llama: Path) -> None:
    write_checkpoint(tmp_path / "sharded", "llama", max_shard_size="40KB")
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    convert(tmp_path / "sharded", tmp_path / "made", Target("fp8"))
    convert(tiny_llama, tmp_path / "other", Target("fp8"))
    first, second = (load_file(tmp_path / each / "model.safetensors") for each in ("made", "other"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].float(), second[name].float()) for name in first)


def test_what_belongs_to_the_model_comes_along(tmp_path: Path) -> None:
    """Tokenizer, generation settings and licence; not its weights, its code or its card."""
    source = write_checkpoint(tmp_path / "plain", "llama")
    for name in ("LICENSE", "chat_template.jinja", "README.md", "modeling.py", "extra.bin"):
        (source / name).write_text("text")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    convert(source, tmp_path / "made", Target("int8"))
    assert {file.name for file in (tmp_path / "made").iterdir()} == {
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    write_checkpoint(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[UP][3].fill_(float("inf")), f"{UP}' has the value inf in row 3, column 0"),
        (lambda t: t.pop(UP), "1 missing: layers.1.mlp.gate_up.weight up"),
        (lambda t: t.update({UP: t[UP][1:].clone()}), r"has the shape \[111, 64\]"),
        (lambda t: t.update(other=t[UP].clone()), "1 unexpected: other"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), "has the dtype int8"),
    ],
)
def test_damaged_checkpoints_are_named_and_leave_nothing(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    source = with_tensors(tmp_path / "plain", change)
    with pytest.raises(ModelLoadError, match=message):
        convert(source, tmp_path / "made", Target("int8"))
    assert [file.name for file in tmp_path.iterdir()] == ["plain"]


def test_what_float16_cannot_hold_is_refused_where_readers_need_it(tmp_path: Path) -> None:
    source = with_tensors(tmp_path / "plain", lambda t: t["model.norm.weight"].fill_(1e5))
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight.*float16 cannot hold"):
        convert(source, tmp_path / "made", target_of("awq"), texts=TEXTS)
    assert [file.name for file in tmp_path.iterdir()] == ["plain"]


def test_an_existing_folder_stays_unless_it_may_go(tiny_llama: Path, tmp_path: Path) -> None:
    """And where making fails, it stays all the same."""
    out = tmp_path / "made"
    out.mkdir()
    convert(tiny_llama, out, Target("int8"))
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="not empty; --overwrite replaces it"):
        convert(tiny_llama, out, Target("fp8"))
    damaged = with_tensors(tmp_path / "plain", lambda t: t[UP].fill_(float("nan")))
    with pytest.raises(ModelLoadError):
        convert(damaged, out, Target("fp8"), overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    convert(tiny_llama, out, Target("fp8"), overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["made", "plain"]


def test_an_interrupted_run_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny_llama, tmp_path / "made", Target("int8"), advance=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_comes_there_meanwhile_stays(tiny_llama: Path, tmp_path: Path) -> None:
    """A folder, another run's model, a file, or a link, made while the model was read."""
    out = tmp_path / "made"

    def letter(done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "letter.txt").write_text("dear")

    with pytest.raises(ConfigError, match="not empty; --overwrite"):
        convert(tiny_llama, out, Target("int8"), advance=letter)
    with pytest.raises(ConfigError, match="no model's folder"):
        convert(tiny_llama, out, Target("int8"), advance=letter, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["made"]
    assert (out / "letter.txt").read_text() == "dear"
    file, link = tmp_path / "file", tmp_path / "link"
    with pytest.raises(ConfigError, match="is no folder"):
        convert(tiny_llama, file, Target("int8"), advance=lambda *_: file.write_text("x") and None)
    with pytest.raises(ConfigError, match="is no folder"):
        convert(
            tiny_llama, link, Target("int8"),
            advance=lambda *_: None if link.is_symlink() else link.symlink_to(out),
        )  # fmt: skip
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "link", "made"]


def test_the_folder_that_one_is_in_can_be_filled(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--out .``, where nothing is in it."""
    monkeypatch.chdir(tmp_path)
    convert(tiny_llama, Path(), Target("int8"))
    assert (tmp_path / "model.safetensors").is_file()


def test_what_cannot_be_written_is_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is too long, and a disk that is full; nothing is left."""
    with pytest.raises(ConfigError, match=r"--out is .*name too long"):
        convert(tiny_llama, tmp_path / ("a" * 300), Target("int8"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quire.converter.shards.ShardWriter.write", full)
    with pytest.raises(ConfigError, match=r"--out is .*made.*No space left"):
        convert(tiny_llama, tmp_path / "made", Target("int8"))
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_no_models_are_never_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "letters"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="no model's folder"):
        convert(tiny_llama, out, Target("int8"), overwrite=True)
    with pytest.raises(ConfigError, match="where the plain model is"):
        convert(tiny_llama, tiny_llama, Target("int8"), overwrite=True)
    with pytest.raises(ConfigError, match="there is no folder"):
        convert(tiny_llama, tmp_path / "none" / "made", Target("int8"))
    with pytest.raises(ConfigError, match="is no folder"):
        convert(tiny_llama, out / "letter.txt", Target("int8"))


def test_quantized_models_are_not_quantized_again(tiny_llama: Path, tmp_path: Path) -> None:
    convert(tiny_llama, tmp_path / "made", Target("int8"))
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        convert(tmp_path / "made", tmp_path / "again", Target("fp8"))


def test_weights_that_lie_the_other_way_are_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel has its weights as \[in"):
        convert(tiny_checkpoint("gpt2"), tmp_path / "made", Target("int8"))


@pytest.mark.parametrize("size", [None, 128, 64])
def test_groups_that_do_not_divide_are_refused(
    size: int | None, tiny_llama: Path, tmp_path: Path
) -> None:
    """The tiny model's MLP has 112 inputs."""
    with pytest.raises(ConfigError, match=r"does not divide the .* inputs of .*; -1"):
        convert(tiny_llama, tmp_path / "made", Target("int4", group_size=size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "squeezellm"}, "--to must be one of awq, gptq, int8"),
        ({"name": "int8", "group_size": 64}, "--group-size is for awq, gptq and int4"),
        ({"name": "fp8", "symmetric": True}, "--symmetric/--asymmetric is for awq"),
        ({"name": "w8a8", "calibrated": True}, "--calibration is for awq"),
        ({"name": "awq", "by_importance": True}, "--desc-act is for gptq"),
        ({"name": "awq", "group_size": 48}, "--group-size must be one of 128, 64, 32"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Target(**options)


def test_scales_are_kept_in_the_type_of_the_model(tmp_path: Path) -> None:
    """Readers multiply in it; codes are those of the scales as they are kept."""
    source = tmp_path / "plain"
    with_tensors(source, lambda t: t.update({name: x.bfloat16() for name, x in t.items()}))
    convert(source, tmp_path / "int8", Target("int8"))
    convert(source, tmp_path / "awq", target_of("awq"), texts=TEXTS)
    int8, awq = (load_file(tmp_path / each / "model.safetensors") for each in ("int8", "awq"))
    name = UP.removesuffix(".weight")
    assert int8[f"{name}.weight_scale"].dtype == torch.bfloat16
    assert int8["model.norm.weight"].dtype == torch.bfloat16
    assert awq[f"{name}.scales"].dtype == torch.float16
    assert awq["model.norm.weight"].dtype == torch.float16
    assert replace(Target("awq"), name="gptq").plain_dtype(torch.bfloat16) == torch.float16
