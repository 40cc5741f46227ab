"""Models in codes on several ranks: the same codes, each a share of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import build_config, build_model
from coded_checkpoints import RECIPES, write_pair
from coded_decoders import assert_close, load_decoder, prefill
from ct_checkpoints import FORMS, quantized_folder
from quantized_checkpoints import write_quantized
from ranks import Ranks

from quire.errors import ModelLoadError

Make = Callable[[Any], Path]
WAYS = [(2, 1), (4, 1), (2, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``folder(name)``: a checkpoint whose widths four ranks share in groups of 16."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            config = build_config(name)
            if hasattr(config, "intermediate_size"):
                config.intermediate_size = 128
            if hasattr(config, "moe_intermediate_size"):
                config.moe_intermediate_size = config.shared_expert_intermediate_size = 64
            made[name] = tmp_path_factory.mktemp(name)
            build_model(config).save_pretrained(made[name])
        return made[name]

    return make


@pytest.mark.parametrize("ways", WAYS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "falcon-40b", "mixtral"])
def test_a_quantized_checkpoint_is_shared(
    name: str, recipe: str, ways: tuple[int, int], folder: Make, tmp_path: Path
) -> None:
    """AWQ, GPTQ in its own order, channels of int8 and float8: grouped, turned and fused."""
    quantized, _ = write_pair(folder(name), tmp_path, RECIPES[recipe])
    load = partial(load_decoder, quantized)
    ranks = Ranks(load, *ways)
    assert all(each.code_kinds() for each in ranks.decoders)
    # Where inputs are rounded, each rank rounds its share by the largest in that.
    assert_close(prefill(ranks), prefill(load()), 5e-2 if recipe == "w8a8" else 1e-4)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awq", {"ignored": ("layers.1.mlp", "v_proj")}),
        ("gptq", {"bits": 3, "group_size": -1}),
        ("gptq", {"desc_act": True, "lm_head": True, "version": "gptq_v2"}),
        ("squeezellm", {"torch_file": True}),
    ],
)
def test_a_checkpoint_of_a_tool_is_shared(
    method: str, options: dict[str, Any], folder: Make, tmp_path: Path
) -> None:
    """Parts that are plain, an output matrix in codes, outliers, a table of values."""
    pair = write_quantized(folder("llama"), tmp_path, method, **options)
    load = partial(load_decoder, pair.quantized)
    ranks = Ranks(load, 2, 2)
    assert_close(prefill(ranks), prefill(load()), 1e-4)
    last = ranks.decoders[-1]
    assert last.is_coded("lm_head") == bool(options.get("lm_head"))


@pytest.mark.parametrize("form", [each for each in FORMS if "w8a8" not in each])
def test_every_form_is_shared(form: str, folder: Make, tmp_path: Path) -> None:
    folders = quantized_folder(folder("qwen2"), tmp_path, form)
    load = partial(load_decoder, folders.quantized)
    assert_close(prefill(Ranks(load, 2)), prefill(load()), 1e-4)


@pytest.mark.parametrize(
    ("quantization", "options"),
    [
        ("int8", None),
        ("int4", {"lm_head": "int4", "group_size": 16, "symmetric": True}),
        ("int4", {"ignore": ["*.qkv.v", "*.gate_up.up", "layers.1.mlp.down"], "group_size": 16}),
        ("fp8", None),
    ],
)
@pytest.mark.parametrize("ways", WAYS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2", "falcon-7b", "qwen2-moe"])
def test_codes_made_while_loading_are_those_of_the_whole(
    name: str, ways: tuple[int, int], quantization: str, options: Any, folder: Make
) -> None:
    """Each rank rounds by scales of the whole projection; a tied embedding on both its stages."""
    load = partial(load_decoder, folder(name), quantization=quantization, options=options)
    whole, ranks = load(), Ranks(load, *ways)
    assert_close(prefill(ranks), prefill(whole), 1e-4)
    name = "layers.0.attention.out"
    stage = ranks.decoders[: ways[0]]
    columns = [each.weights.coded(f"{name}.weight").read() for each in stage]  # type: ignore[union-attr]
    assert torch.equal(torch.cat(columns, dim=1), whole.read_weight(name))


def test_experts_of_one_rank_are_in_codes(folder: Make) -> None:
    load = partial(load_decoder, folder("qwen2-moe"), quantization="int8")
    ranks = Ranks(load, 4, expert_parallel=True)
    assert_close(prefill(ranks), prefill(load()), 1e-4)


def test_groups_that_ranks_would_cut_are_refused(folder: Make, tmp_path: Path) -> None:
    """With the module, and which sizes would do."""
    quantized, _ = write_pair(folder("llama"), tmp_path, RECIPES["awq"])
    load = partial(load_decoder, quantized)
    Ranks(load, 4)
    config = build_config("llama")
    config.intermediate_size = 80
    build_model(config).save_pretrained(tmp_path / "narrow")
    narrow, _ = write_pair(tmp_path / "narrow", tmp_path / "pair", RECIPES["awq"])
    expected = (
        r"model\.layers\.0\.mlp\.down_proj': is in groups of 16 columns, which "
        r"tensor_parallel_size=2 would cut: it gives each rank 40 of 80; 1, 5 would do"
    )
    with pytest.raises(ModelLoadError, match=expected):
        Ranks(partial(load_decoder, narrow), 2)
