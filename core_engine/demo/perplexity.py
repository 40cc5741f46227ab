"""The demo model's perplexity on texts that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from quire.demo.samples import Sample
from quire.demo.text import training_samples

if TYPE_CHECKING:
    from quire import LLM

SEED = 1
"""Of the texts; the model that ships was trained on those of seed 0."""
_TRAINED_ON = 150_000
"""Samples of seed 0, more than its training came to."""


def held_out_samples(count: int) -> list[Sample]:
    """Return samples of the kinds that the model was trained on, none of which it has seen.

    Short facts are soon drawn again: what the training drew, too, is left out.
    """
    seen = {sample.text for sample in islice(training_samples(0), _TRAINED_ON)}
    fresh = (sample for sample in training_samples(SEED) if sample.text not in seen)
    return list(islice(fresh, count))


def perplexity(llm: LLM, samples: Sequence[Sample]) -> float:
    """Return the perplexity of all tokens that a model should know how to write, as one text.

    Those are the tokens of answers and of prose. A prompt sets the scene: what is asked next cannot
    be known, and was not learned.

    Parameters
    ----------
    llm : LLM
        Of the demo model, in whatever format.
    samples : sequence of Sample
    """
    from quire import SamplingParams

    tokenizer = llm.get_tokenizer()
    prompts: list[list[int]] = []
    counted: list[list[int]] = []  # of each prompt, the places of the tokens that count
    for sample in samples:
        ids: list[int] = []
        places: list[int] = []
        for text, is_learned in sample.parts:
            new = tokenizer.encode(text, add_special_tokens=False)
            if is_learned:
                places += range(len(ids), len(ids) + len(new))
            ids += new
        prompts.append(ids)
        counted.append([place for place in places if place])  # nothing is before the first
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    total, count = 0.0, 0
    for ids, places, output in zip(prompts, counted, outputs, strict=True):
        assert output.prompt_logprobs is not None
        for place in places:
            known = output.prompt_logprobs[place]
            assert known is not None
            total -= known[ids[place]].logprob
            count += 1
    return math.exp(total / count)
