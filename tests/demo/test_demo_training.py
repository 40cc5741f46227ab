"""Training: reproducible, and its rows hold what they say they hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quire.demo.train as script
from quire.demo.card import Making, model_card
from quire.demo.evaluate import Score, evaluate, score
from quire.demo.muon import Muon, orthogonalize
from quire.demo.packing import LONG_ROW_LEN, ROW_LEN, Packer
from quire.demo.samples import Question, chat, plain
from quire.demo.text import training_samples
from quire.demo.train import CONFIG, batch_loss, build_model, build_tokenizer, schedule, train


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[object]:
    """The shipped tokenizer."""
    from tokenizers import Tokenizer

    from quire.demo import model_path

    return Tokenizer.from_file(str(model_path() / "tokenizer.json"))


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Undo what training sets for the whole process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the script's model so small that a step takes no time."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(script, "CONFIG", script.CONFIG | small)


@pytest.fixture
def packer(tokenizer: object) -> Packer:
    """Rows of the training text."""
    return Packer(training_samples(3), tokenizer, max_position=2048, seed=3)


def test_rows_are_full_and_positions_in_range(packer: Packer) -> None:
    """Short rows waste little; no position reaches the model's limit."""
    batch = packer.short_rows(16)
    assert batch.input_ids.shape == (16, ROW_LEN)
    assert (batch.sample_ids >= 0).mean() > 0.95
    assert batch.positions.min() >= 0
    assert batch.positions.max() < CONFIG["max_position_embeddings"]


def test_positions_count_up_within_a_sample(packer: Packer) -> None:
    """A sample starts anywhere, and then its positions follow one another."""
    for batch in (packer.short_rows(8), packer.long_rows(2)):
        same = (batch.sample_ids[:, 1:] == batch.sample_ids[:, :-1]) & (
            batch.sample_ids[:, 1:] >= 0
        )
        steps = np.diff(batch.positions, axis=1)
        assert (steps[same] == 1).all()


def test_a_first_token_is_never_predicted(packer: Packer) -> None:
    """Between samples that do not see each other nothing is learned; padding counts nothing."""
    batch = packer.short_rows(8)
    starts = np.diff(batch.sample_ids, axis=1, prepend=-2) != 0
    assert (batch.weights[starts] == 0).all()
    assert (batch.weights[batch.sample_ids < 0] == 0).all()


def test_long_rows_are_one_context(packer: Packer) -> None:
    """In a long row every sample sees all before it."""
    batch = packer.long_rows(2)
    assert batch.input_ids.shape == (2, LONG_ROW_LEN)
    assert set(np.unique(batch.sample_ids)) <= {-1, 0}


@pytest.mark.parametrize("pool", [0.0, 0.3, 1.0])
def test_copied_rows_repeat_what_is_learned(packer: Packer, pool: float) -> None:
    """Every token that counts in a copied row stood in its sample before, after the same one."""
    batch = packer.short_rows(0, num_copied=3, pool=pool)
    assert (batch.weights > 0).mean() > 0.3
    for ids, samples, weights in zip(batch.input_ids, batch.sample_ids, batch.weights, strict=True):
        for i in np.flatnonzero(weights):
            start = int(np.flatnonzero(samples == samples[i])[0])
            pairs = itertools.pairwise(ids[start:i].tolist())
            assert (ids[i - 1], ids[i]) in set(pairs)


def test_only_answers_are_learned(tokenizer: object) -> None:
    """The weights follow the parts of a sample, chats and plain ones alike."""
    for sample in (plain("Hi?", " Yo."), chat([("user", "Hi?"), ("assistant", "Yo.")])):
        packer = Packer(itertools.repeat(sample), tokenizer, max_position=2048, seed=0)
        encoded = packer._encode(sample)
        learned = [i for i, w in zip(encoded.token_ids, encoded.weights, strict=True) if w == 1]
        text = tokenizer.decode(learned, skip_special_tokens=False)  # type: ignore[attr-defined]
        assert text == "".join(text for text, is_learned in sample.parts if is_learned)
        assert set(encoded.weights) == {1.0, 0.0}


@pytest.mark.usefixtures("small_model")
def test_samples_of_a_row_do_not_see_each_other(packer: Packer) -> None:
    """Changing one sample's tokens leaves the loss on another untouched."""
    model = build_model(0)
    batch = packer.short_rows(1)
    batch.weights[batch.sample_ids != 1] = 0
    with torch.inference_mode():
        before = batch_loss(model, batch)
        batch.input_ids[batch.sample_ids == 0] = 5
        assert torch.equal(before, batch_loss(model, batch))
        batch.input_ids[batch.sample_ids == 1] = 5
        assert not torch.equal(before, batch_loss(model, batch))


@given(st.integers(1, 4), st.sampled_from([(8, 8), (8, 24), (24, 8), (1, 5)]), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_muon_steps_have_singular_values_near_one(
    count: int, shape: tuple[int, int], seed: int
) -> None:
    """Whatever the gradient's scale, every direction in it is followed about equally."""
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(count, *shape, generator=generator) * 10.0 ** (seed % 7 - 3)
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.max() < 1.3
    # The iterations lift small singular values at most a few hundred times.
    strong = torch.linalg.svdvals(matrices)
    strong = strong / strong.norm(dim=1, keepdim=True) > 0.02
    assert values[strong].min() > 0.5


def test_muon_descends() -> None:
    """A step of Muon moves against the gradient, by about the learning rate."""
    matrix = torch.nn.Parameter(torch.eye(4))
    matrix.grad = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    Muon([matrix], weight_decay=0.0).step(0.1)
    moved = torch.eye(4) - matrix.detach()
    assert torch.linalg.svdvals(moved).max() < 0.13
    assert (moved.diagonal() > 0.05).all()


def test_the_learning_rate_rises_and_falls() -> None:
    """A warm-up, one peak, a fall to nearly nothing."""
    rates = [schedule(step, 200) for step in range(200)]
    peak = rates.index(max(rates))
    assert 0 < peak < 20
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.02 * max(rates)


def test_a_prepared_head_looks_one_token_back() -> None:
    """Before any training the first head attends to the token before, wherever it stands."""
    model = build_model(0)
    model.config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, CONFIG["vocab_size"], (2, 48), generator=generator)
    for start in (0, 1500):
        positions = torch.arange(start, start + 48)[None].expand(2, -1)
        with torch.inference_mode():
            output = model(input_ids=input_ids, position_ids=positions, output_attentions=True)
        back = output.attentions[0][:, 0].diagonal(offset=-1, dim1=-2, dim2=-1)
        assert back[:, 1:].min() > 0.6


def test_a_prepared_model_prefers_what_was_said_before() -> None:
    """Before any training, a repeated passage of random tokens is told better than by chance."""
    model = build_model(0)
    generator = torch.Generator().manual_seed(2)
    passage = torch.randint(3, CONFIG["vocab_size"], (8, 24), generator=generator)
    with torch.inference_mode():
        logits = model(input_ids=passage.repeat(1, 2)).logits[:, 24:-1].log_softmax(-1)
    told = logits.gather(-1, passage[:, 1:, None]).mean()
    other = logits.gather(-1, passage.roll(1, 0)[:, 1:, None]).mean()
    assert told > other + 0.1


@pytest.mark.usefixtures("deterministic", "small_model")
def test_training_repeats_bit_for_bit(tokenizer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same weights, short and long rows alike; another gives others."""
    monkeypatch.setattr(script, "ROWS_PER_STEP", 4)
    monkeypatch.setattr(script, "LONG_EVERY", 2)
    first, second, other = (train(seed, 3, tokenizer=tokenizer).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.slow
def test_the_shipped_tokenizer_is_what_the_script_makes(tokenizer: object) -> None:
    """Text generators and the shipped files belong together."""
    made = build_tokenizer(0)
    assert made.to_str() == tokenizer.to_str()  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
def test_the_script_writes_a_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps give a folder that transformers loads, with its card."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(script, "evaluate", lambda greedy, sampled: [Score("none", 0, 1)])
    assert script.main(["--out", str(tmp_path), "--steps", "2", "--seed", "5"]) == 0
    assert "--seed 5 --steps 2" in (tmp_path / "README.md").read_text(encoding="utf-8")
    AutoTokenizer.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_scores_count_right_answers() -> None:
    """A generator that knows the answer scores 1, one that is silent scores 0."""
    questions = [Question(str(n), lambda text, n=n: text == str(n)) for n in range(5)]
    assert score("echo", questions, lambda prompts: list(prompts)).share == 1.0
    assert score("mute", questions, lambda prompts: [""] * len(prompts)).right == 0
    assert all(s.right == 0 for s in evaluate(lambda prompts: [""] * len(prompts)))


def test_the_card_says_how_the_model_was_made() -> None:
    """Seed, steps, time, versions and every score stand in the card."""
    making = Making(7, 123, 2048, 1_000_000, 2, 600.0, "torch 9.9")
    card = model_card(making, [Score("capitals", 9, 10)], config=CONFIG)
    for expected in ("--seed 7 --steps 123", "10 minutes", "torch 9.9", "90.0%", "1.00 million"):
        assert expected in card
