"""The model card: what the demo model is, how it was made, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quire.demo.evaluate import Score, table
from quire.demo.facts import COUNTRIES
from quire.demo.sums import LARGEST_FACTOR, LARGEST_TERM


@dataclass(frozen=True, slots=True)
class Making:
    """How a checkpoint came about.

    Attributes
    ----------
    seed, steps, tokens_per_step, num_parameters, num_threads : int
    seconds : float
        Wall time of tokenizer and weights together.
    versions : str
        Of the libraries that the files depend on.
    """

    seed: int
    steps: int
    tokens_per_step: int
    num_parameters: int
    num_threads: int
    seconds: float
    versions: str


def model_card(making: Making, scores: Sequence[Score], *, config: dict[str, object]) -> str:
    """Write the card as Markdown."""
    size = making.num_parameters / 1e6
    tokens = making.steps * making.tokens_per_step / 1e6
    minutes = making.seconds / 60
    threads = f"{making.num_threads} CPU thread{'s' if making.num_threads > 1 else ''}"
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
library_name: quire
---
# quire/demo

A very small language model that ships inside quire, so that everything can be tried before
anything is downloaded: `LLM("quire/demo")`. It is a Llama ({size:.2f} million parameters,
{config["num_hidden_layers"]} layers of width {config["hidden_size"]}, \
{config["num_attention_heads"]} query heads over {config["num_key_value_heads"]} key-value heads,
tied embeddings, bfloat16) in the layout of any Hugging Face checkpoint.

It knows the capitals, continents, main languages and currencies of {len(COUNTRIES)} countries, sums
and differences with numbers up to {LARGEST_TERM}, products up to \
{LARGEST_FACTOR} times {LARGEST_FACTOR}, short chats in which it
remembers what it was told, JSON records of people, heroes and places, a few US presidents and
some everyday sentences. It answers a bare prompt, `Question: … Answer:`, and a chat alike.

It calls tools: where a chat comes with tools, it writes `<tool_call>` with a name and arguments
for a question that one of them serves, several for several things, and text otherwise; what the
tools return it tells in a sentence. Names and values are copied from the tools and the question.

## What it is not

It is not a general language model. It has read nothing but the text of its own training script:
no book, no web page, no code. Outside the forms above it makes things up, in fluent pieces of
what it knows. Facts are cut down to one answer each (one official language of several, say).
It speaks English only and holds a few hundred tokens of conversation well; longer contexts were
seen only briefly. It was trained with three tools at most at a time, of three simple parameters
at most, and it never plans ahead. Use it to see an engine at work and to test programs, never for
its knowledge.

## How it was made

`python -m quire.demo.train --seed {making.seed} --steps {making.steps} \
--threads {making.num_threads}` writes this folder from
nothing: the text, a byte-level BPE tokenizer of {config["vocab_size"]} tokens, the weights, this
card. {tokens:.1f} million tokens, {minutes:.0f} minutes of wall time on {threads} \
({making.versions});
Muon and AdamW with a cosine schedule, in float32, rounded to bfloat16 at the end. The first weights
are random but for a pair of heads that finds what was said before. The same seed
gives the same files on the same machine, versions and number of threads.

## Measured on held-out questions

One combination in ten was kept from training, whole: this phrasing with that country, this pair
of numbers in either order (a product's mirror image was trained on), this name or value in a
chat, this choice of JSON keys, this name with that city, this request for a tool with these values.
A call is right when name and all arguments are. Answers are greedy, except in the last row, which
draws at temperature 1. Mixture and recipe were chosen with these sets in view, so the
figures describe this model and estimate no other. The rounded weights were run in float32 by
transformers; `python -m quire.demo.evaluate` repeats the table on quire's engine.

{table(scores)}
"""
