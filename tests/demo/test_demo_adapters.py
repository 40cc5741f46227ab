"""The shipped adapters: small, in peft's format, and seen at work in every answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quire.demo
from quire.demo import ADAPTER_NAMES, MODEL_NAME, adapter_path, model_path
from quire.demo.countries import PHRASINGS, fill
from quire.demo.facts import COUNTRIES
from quire.demo.french_words import FRENCH_COUNTRIES
from quire.demo.manners import FOR_PROGRAMS, MANNERS, MannerScore, is_french, manner_table, measure
from quire.demo.samples import SPECIAL_TOKENS, chat_prompt, is_held_out
from quire.demo.uppercase import in_capitals

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
PROMPTS = (
    "What is the capital of France?",
    "Question: What is the capital of Italy?\nAnswer:",
    "Q: On which continent is Japan?\nA:",
    "What is the capital of Spain ?",
    chat_prompt([("user", "What is the capital of Peru?")]),
    chat_prompt([("system", "You are a helpful assistant."), ("user", "Hello!")]),
)


@pytest.fixture(params=ADAPTER_NAMES)
def name(request: Any) -> str:
    """Each adapter in turn."""
    return str(request.param)


def test_every_name_has_a_small_folder(name: str) -> None:
    """Configuration, weights and card; at most 300 kB, matrices of one kind of number."""
    folder = adapter_path(name)
    files = {path.name for path in folder.iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert (folder / "adapter_model.safetensors").stat().st_size <= 300_000
    weights = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == MODEL_NAME
    assert config["peft_type"] == "LORA"
    ranks = {tensor.shape[0] for key, tensor in weights.items() if "lora_A" in key}
    assert ranks == {config["r"]}


def test_the_card_says_what_it_is_and_how_it_was_made(name: str) -> None:
    """Effect, command and every measured set stand in it."""
    card = (adapter_path(name) / "README.md").read_text(encoding="utf-8")
    assert MANNERS[name].effect in card
    assert f"train_adapters {name} --seed" in card
    for told in ("capitals", "languages", "follow-ups", "arithmetic"):
        assert f"| {told}" in card


def test_an_unknown_name_is_a_clear_error() -> None:
    """The message has the names that there are, and tells how missing files are made."""
    with pytest.raises(ValueError, match=r"'german'.*'french', 'capitals'"):
        adapter_path("german")
    assert set(MANNERS) == set(ADAPTER_NAMES)


def test_missing_files_are_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installation without the files says so, and how to get them."""
    monkeypatch.setattr(quire.demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"french.*quire\.demo\.train_adapters"):
        adapter_path("french")


def test_peft_gives_every_answer_the_adapters_manner(name: str, oracle: Any) -> None:
    """Plain prompts and chats are answered in it, and without the adapter never."""
    pytest.importorskip("peft")
    from quire.demo.evaluate import with_transformers

    manner = MANNERS[name]
    adapted = with_transformers(model_path(), adapter=adapter_path(name))
    assert [text for text in adapted(PROMPTS) if not manner.is_kept(text)] == []
    assert [text for text in oracle(PROMPTS) if manner.is_kept(text)] == []


def test_every_country_is_known_in_french() -> None:
    """Articles and prepositions are those of the name; no word is missing."""
    assert set(FRENCH_COUNTRIES) == {country.name for country in COUNTRIES}
    forms = {english: (c.of, c.inside) for english, c in FRENCH_COUNTRIES.items()}
    assert forms["France"] == ("de la France", "en France")
    assert forms["Germany"] == ("de l'Allemagne", "en Allemagne")
    assert forms["Japan"] == ("du Japon", "au Japon")
    assert forms["the Netherlands"] == ("des Pays-Bas", "aux Pays-Bas")
    assert forms["Cuba"] == ("de Cuba", "à Cuba")


def test_samples_are_in_the_adapters_manner(name: str) -> None:
    """What is to be learned is in it, but for records, calls and bare numbers."""
    rng = random.Random(5)
    learned = []
    for _ in range(300):
        sample = MANNERS[name].draw(rng)
        if "{" in sample.text or "tool" in sample.text:
            continue
        text = " ".join(text for text, is_learned in sample.parts if is_learned)
        for token in SPECIAL_TOKENS:
            text = text.replace(token, "")
        if any(map(str.isalpha, text)):
            learned.append(text)
    kept = sum(map(MANNERS[name].is_kept, learned))
    assert len(learned) > 200
    # A greeting or a lone name is in no language that its words would tell.
    assert kept >= 0.85 * len(learned) if name == "french" else kept == len(learned)


def test_no_sample_holds_a_held_out_question(name: str) -> None:
    """What the base model was not trained on, its adapters were not, either."""
    held_out = [
        fill(phrasing.question, country)
        for phrasing in PHRASINGS
        for country in COUNTRIES
        if is_held_out(phrasing.question, country.name)
    ]
    rng = random.Random(6)
    text = "\n".join(MANNERS[name].draw(rng).text for _ in range(2000))
    assert [question for question in held_out if question in text] == []


def test_capitals_leave_special_tokens_alone() -> None:
    """An end that is spelled otherwise would be no end."""
    assert in_capitals("a<|im_end|>b<|endoftext|>") == "A<|im_end|>B<|endoftext|>"


def test_manners_are_told_apart() -> None:
    """French and English sentences are not taken for each other."""
    assert is_french("La capitale de la France est Paris.")
    assert not is_french("The capital of France is Paris.")
    assert not is_french("Paris.")


def test_scores_count_right_answers_and_kept_manners() -> None:
    """One that answers everything alike is in its manner, and right where that is right."""
    manner = MANNERS["capitals"]
    scores = measure(manner, lambda prompts: ["PARIS IS IN EUROPE 7"] * len(prompts), adapted=True)
    by_name = {score.name: score for score in scores}
    assert all(score.kept in (score.asked, None) for score in scores)
    assert [score.name for score in scores if score.kept is None] == [*FOR_PROGRAMS]
    assert 0 < by_name["continents"].right < by_name["continents"].asked
    assert by_name["capitals"].right < by_name["capitals"].asked
    table = manner_table([MannerScore("one", 4, 4, 0)], [MannerScore("one", 4, 3, None)])
    assert "| one | 4 | 100.0% | 0.0% | 75.0% | – |" in table


@pytest.fixture
def deterministic() -> Any:
    """Undo what training sets for the whole process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("deterministic")
def test_training_repeats_byte_for_byte_and_leaves_the_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seed writes the same files, in the shipped layout; another seed writes others."""
    pytest.importorskip("peft")
    from quire.demo import train_adapters as script

    monkeypatch.setattr(script, "ROWS_PER_STEP", 1)
    base = load_file(model_path() / "model.safetensors")
    for folder, seed in (("one", 3), ("same", 3), ("other", 4)):
        model = script.train_adapter(MANNERS["french"], seed, 2, base=model_path())
        script.save_adapter(model, tmp_path / folder)
    for key, tensor in model.get_base_model().state_dict().items():
        plain = key.replace(".base_layer", "")
        if plain in base:
            assert torch.equal(tensor, base[plain].float())
    files = ("adapter_config.json", "adapter_model.safetensors")
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "same" / file).read_bytes()
    one, other = (load_file(tmp_path / name / files[1]) for name in ("one", "other"))
    assert any(not torch.equal(one[key], other[key]) for key in one)
    shipped = load_file(adapter_path("french") / files[1])
    assert {k: t.shape for k, t in one.items()} == {k: t.shape for k, t in shipped.items()}
    made, given = (
        json.loads((path / files[0]).read_text())
        for path in (tmp_path / "one", adapter_path("french"))
    )
    for field in ("base_model_name_or_path", "r", "lora_alpha", "target_modules", "use_rslora"):
        assert made[field] == given[field]


def test_the_script_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no adapter ends it before any training."""
    pytest.importorskip("peft")
    from quire.demo import train_adapters as script

    with pytest.raises(SystemExit):
        script.main(["german"])
    assert "'german'" in capsys.readouterr().err


def test_quire_answers_as_peft_does(oracle: Any) -> None:
    """Each prompt under each adapter and under none, all in one batch: the same texts."""
    pytest.importorskip("peft")
    from quire import LLM, SamplingParams
    from quire.demo.evaluate import with_transformers

    params = SamplingParams(temperature=0, max_tokens=96)
    with LLM(MODEL_NAME, dtype="float32", enable_lora=True) as llm:
        adapters = [llm.load_lora(adapter_path(each)) for each in ADAPTER_NAMES]
        prompts = [prompt for prompt in PROMPTS for _ in range(3)]
        requests = [None, *adapters] * len(PROMPTS)
        outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    assert texts[0::3] == oracle(PROMPTS)
    for i, name in enumerate(ADAPTER_NAMES, start=1):
        peft_generates = with_transformers(model_path(), adapter=adapter_path(name))
        assert texts[i::3] == peft_generates(PROMPTS)
