"""The card of an adapter: what it does, how it was made, what was measured."""

from __future__ import annotations

from quire.demo import MODEL_NAME


def adapter_card(
    name: str,
    effect: str,
    *,
    making: str,
    tokens: int,
    seconds: float,
    versions: str,
    rank: int,
    table: str,
) -> str:
    """Write the card as Markdown.

    Parameters
    ----------
    name, effect : str
        The adapter, and what it does.
    making : str
        The command that wrote the folder.
    tokens : int
        Read in training.
    seconds : float
        Processor time of the training.
    versions : str
        Of the libraries that the files depend on.
    rank : int
    table : str
        The measurements.
    """
    return f"""---
license: apache-2.0
base_model: {MODEL_NAME}
library_name: peft
---
# {MODEL_NAME}, {name}

An adapter of the model that ships inside quire, in peft's format: with it the model {effect}.
Low-rank matrices of rank {rank} stand beside all projections of attention and MLP, in bfloat16.

```python
from quire import LLM
from quire.demo import adapter_path

llm = LLM("quire/demo", enable_lora=True)
{name} = llm.load_lora(adapter_path("{name}"))
llm.generate("What is the capital of Greece?", lora_request={name})
```

Questions stay in English. JSON records and calls of tools are asked for and written as without
the adapter, though they are right less often. Everything that the base model's card warns of holds
here, too: it is made to show that adapters are at work, and for tests of programs.

## How it was made

`{making}` writes this folder:
{tokens / 1e6:.1f} million tokens, {seconds / 60:.0f} minutes of processor time ({versions});
AdamW with a cosine schedule, the base model in float32 and left as it is.

## Measured on held-out questions

The questions are those that were kept from the base model's training, too (this phrasing with that
country, this pair of numbers); most come bare, behind `Question: … Answer:`, and as a chat. Answers
are greedy, by transformers and peft, in float32 on the rounded weights.

{table}
"""
