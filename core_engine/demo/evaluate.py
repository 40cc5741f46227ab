"""Measure a model on the held-out questions: ``python -m quire.demo.evaluate [FOLDER]``.

The measuring knows a model only as a callable from prompts to texts, so that transformers and
quire's own engine can be measured by the same code, and be compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.demo import model_path
from quire.demo.samples import Question
from quire.demo.text import evaluation_sets, sampled_sets

if TYPE_CHECKING:
    from quire import LLM

MAX_TOKENS = 96
Generate = Callable[[Sequence[str]], Sequence[str]]
"""Continue each prompt until the model ends; special tokens left out of the texts."""


@dataclass(frozen=True, slots=True)
class Score:
    """How many questions of a set were answered right."""

    name: str
    right: int
    asked: int

    @property
    def share(self) -> float:
        """The accuracy, from 0 to 1."""
        return self.right / self.asked


def score(name: str, questions: Sequence[Question], generate: Generate) -> Score:
    """Ask all questions of a set and count the right answers."""
    answers = generate([question.prompt for question in questions])
    right = sum(q.check(answer) for q, answer in zip(questions, answers, strict=True))
    return Score(name, right, len(questions))


def evaluate(greedy: Generate, sampled: Generate | None = None) -> list[Score]:
    """Measure a model on every evaluation set.

    Parameters
    ----------
    greedy : Generate
        Takes the likeliest token at every step.
    sampled : Generate | None
        Draws at temperature 1; ``None`` leaves those sets out.

    Returns
    -------
    list[Score]
    """
    scores = [score(name, questions, greedy) for name, questions in evaluation_sets().items()]
    if sampled is not None:
        scores += [score(name, asked, sampled) for name, asked in sampled_sets().items()]
    return scores


def table(scores: Sequence[Score]) -> str:
    """Lay scores out as a Markdown table."""
    lines = ["| held-out set | questions | right | accuracy |", "|---|---:|---:|---:|"]
    lines += [f"| {s.name} | {s.asked} | {s.right} | {s.share:.1%} |" for s in scores]
    return "\n".join(lines)


def with_transformers(
    folder: Path, *, adapter: Path | None = None, sample: bool = False, batch_size: int = 64
) -> Generate:
    """Return a ``Generate`` over transformers, in float32 on the rounded weights.

    Parameters
    ----------
    folder : Path
    adapter : Path | None
        An adapter that is laid over the model, by peft.
    sample : bool
        Whether to draw at temperature 1.
    batch_size : int
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)

    options: dict[str, Any] = {"max_new_tokens": MAX_TOKENS, "do_sample": sample}
    if sample:
        options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def generate(prompts: Sequence[str]) -> list[str]:
        # Prompts of like length side by side, so that little is padded.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts = [""] * len(prompts)
        torch.manual_seed(0)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = tokenizer(
                [prompts[i] for i in chosen],
                padding=True,
                add_special_tokens=False,
                return_tensors="pt",
                return_token_type_ids=False,
            )
            output = model.generate(**inputs, **options)
            new = output[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(chosen, tokenizer.batch_decode(new, True), strict=True):
                texts[i] = text
        return texts

    return generate


def with_quire(folder: Path) -> tuple[Generate, Generate]:
    """Return the greedy and the sampled ``Generate`` over quire's own engine."""
    from quire import LLM

    return with_llm(LLM(str(folder)))


def with_llm(llm: LLM) -> tuple[Generate, Generate]:
    """Return the greedy and the sampled ``Generate`` over a model that is loaded."""
    from quire import SamplingParams

    def continue_with(params: SamplingParams) -> Generate:
        def generate(prompts: Sequence[str]) -> list[str]:
            outputs = llm.generate(list(prompts), params, use_tqdm=False)
            return [output.outputs[0].text for output in outputs]

        return generate

    greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    return continue_with(greedy), continue_with(SamplingParams(max_tokens=MAX_TOKENS))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of scores."""
    parser = argparse.ArgumentParser(prog="python -m quire.demo.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="default: the embedded model")
    parser.add_argument("--engine", choices=("quire", "transformers"), default="quire")
    arguments = parser.parse_args(argv)
    folder = arguments.folder or model_path()
    if arguments.engine == "quire":
        greedy, sampled = with_quire(folder)
    else:
        greedy, sampled = with_transformers(folder), with_transformers(folder, sample=True)
    print(table(evaluate(greedy, sampled)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
