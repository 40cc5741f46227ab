"""Loading a share: tables on both ends, files of any form, and a damaged checkpoint is seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import build_config, build_model
from coded_decoders import assert_close, load_decoder, prefill
from folders import Make, Tensors, configure, copy_of, rewrite
from mixtures import stack
from ranks import Ranks

from quire.errors import ModelLoadError
from quire.models.decoder import Decoder
from quire.parallel.place import Place

EMBEDDING = "model.embed_tokens.weight"


class AnyGroup:
    """A group that is never asked for anything."""

    native = None

    def __init__(self, place: Place) -> None:
        self.rank, self.size = place.tensor_rank, place.tensor_size

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        raise NotImplementedError


def share(folder: Path, place: Place) -> Decoder:
    return load_decoder(folder, place=place, group=AnyGroup(place))


# The two tables


def test_a_tied_embedding_is_on_the_first_stage_and_the_last(tiny_checkpoint: Make) -> None:
    ranks = Ranks(partial(load_decoder, tiny_checkpoint("qwen2-tied")), 1, 2)
    first, last = ranks.decoders
    for each in (first, last):
        assert "embed.weight" in each.weights
        assert "lm_head.weight" not in each.weights
    assert "final_norm.weight" in last.weights
    assert "final_norm.weight" not in first.weights
    assert "layers.1.mlp.down.weight" in first.weights.elsewhere
    assert "layers.1.mlp.down.weight" in last.weights


def test_stages_in_between_have_neither_table(tiny_checkpoint: Make) -> None:
    ranks = Ranks(partial(load_decoder, tiny_checkpoint("gemma2")), 2, 3)
    for each in ranks.decoders[2:4]:
        assert {name.split(".")[0] for name in each.weights.names()} == {"layers"}
        assert [*each.kv_cache_layers()] == [(1, 24)]


def repeated(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()


def renamed(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors.pop(EMBEDDING)


def another(tensors: Tensors) -> None:
    """It differs in tokens of the last rank alone."""
    head = tensors[EMBEDDING].clone()
    head[-3:] = 0.1
    tensors["lm_head.weight"] = head


@pytest.mark.parametrize("ways", [(2, 1), (1, 2), (2, 2)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("change", [repeated, renamed, another])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_every_rank_deals_alike_with_a_second_table(
    change: Callable[[Tensors], None],
    ways: tuple[int, int],
    quantization: str | None,
    tiny_checkpoint: Make,
    tmp_path: Path,
) -> None:
    """The same, the only one, or another: all take what the whole model takes."""
    folder = copy_of(tiny_checkpoint("qwen2-tied"), tmp_path)
    rewrite(folder, change)
    load = partial(load_decoder, folder, quantization=quantization)
    whole, ranks = load(), Ranks(load, *ways)
    assert_close(prefill(ranks), prefill(whole), 1e-4)
    assert {each.spec for each in ranks.decoders} == {whole.spec}
    assert whole.spec.tie_word_embeddings == (change is not another)
    if change is another and ways == (1, 2):
        assert "lm_head.weight" not in ranks.decoders[0].weights
        assert "embed.weight" not in ranks.decoders[1].weights


# Forms of checkpoints


def test_files_may_be_many(tmp_path: Path) -> None:
    build_model(build_config("qwen2")).save_pretrained(tmp_path, max_shard_size="60KB")
    load = partial(load_decoder, tmp_path)
    assert_close(prefill(Ranks(load, 2, 2)), prefill(load()), 1e-4)


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_experts_may_be_stacked(
    expert_parallel: bool, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    folder = copy_of(tiny_checkpoint("mixtral"), tmp_path)
    rewrite(folder, stack)
    load = partial(load_decoder, folder)
    assert_close(prefill(Ranks(load, 2, 2, expert_parallel)), prefill(load()), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shares_are_converted_like_the_whole(dtype: torch.dtype, tiny_checkpoint: Make) -> None:
    folder, place = tiny_checkpoint("gpt-neox"), Place(1, 2)
    whole = load_decoder(folder, dtype=dtype)
    one = load_decoder(folder, dtype=dtype, place=place, group=AnyGroup(place))
    name = "layers.1.mlp.down.weight"
    assert torch.equal(one.weights[name], whole.weights[name][:, 48:])
    name = "layers.0.attention.qkv.weight"
    rows = torch.cat([torch.arange(32, 64) + 64 * part for part in range(3)])
    assert torch.equal(one.weights[name], whole.weights[name][rows])


# Damaged ones


def test_what_is_missing_is_named_by_the_rank_that_needs_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_llama, tmp_path)
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    expected = r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"
    for rank in range(4):
        place = Place.of_rank(rank, 2, 2)
        if place.is_first_stage:
            share(folder, place)
        else:
            with pytest.raises(ModelLoadError, match=expected):
                share(folder, place)


def test_what_no_model_has_is_named_by_every_rank(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_llama, tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"model.extra": torch.ones(3)}))
    for rank in range(4):
        with pytest.raises(ModelLoadError, match=r"1 unexpected: model\.extra"):
            share(folder, Place.of_rank(rank, 2, 2))


def test_a_bias_that_the_model_lacks_is_unexpected(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_llama, tmp_path)
    name = "model.layers.0.mlp.down_proj.bias"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(64)}))
    for place in (Place(0, 2), Place(1, 2)):
        with pytest.raises(ModelLoadError, match=r"1 unexpected: .*down_proj\.bias"):
            share(folder, place)


def test_shapes_are_those_of_the_whole_model(tiny_llama: Path, tmp_path: Path) -> None:
    """A checkpoint of one rank's shapes, or of any others, is refused as ever."""
    folder = copy_of(tiny_llama, tmp_path)
    configure(folder, intermediate_size=56)
    expected = r"has the shape \[112, 64\], the configuration needs \[56, 64\]"
    with pytest.raises(ModelLoadError, match=expected):
        share(folder, Place(1, 2))


def test_a_group_is_needed_where_ranks_share_layers(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="needs the group"):
        load_decoder(tiny_llama, place=Place(1, 2))
    with pytest.raises(ValueError, match="needs the group"):
        load_decoder(tiny_llama, place=Place(1, 2), group=AnyGroup(Place(0, 2)))
    load_decoder(tiny_llama, place=Place(0, 1, 1, 2))


def test_a_stage_goes_on_from_the_one_before(tiny_llama: Path) -> None:
    first, last = Ranks(partial(load_decoder, tiny_llama), 1, 2).decoders
    with pytest.raises(ValueError, match="every stage but the first"):
        last.forward(None, [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every stage but the first"):
        first.forward(None, [], torch.zeros(1, 64))  # type: ignore[arg-type]
