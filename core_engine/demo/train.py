"""Train the demo model: ``python -m quire.demo.train``, ``--help`` for its options.

Everything is made here: the text (:mod:`quire.demo.text`), the tokenizer, the weights, the
measurements in the model card. The same seed, on the same machine with the same versions and
number of threads, gives the same files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Tokenizer

from quire.demo.beginnings import prepare_to_copy
from quire.demo.card import Making, model_card
from quire.demo.evaluate import evaluate, table, with_transformers
from quire.demo.facts import WORDS
from quire.demo.muon import Muon
from quire.demo.packing import LONG_ROW_LEN, ROW_LEN, Batch, Packer
from quire.demo.samples import END_OF_TEXT, SPECIAL_TOKENS, TURN_END
from quire.demo.text import training_samples
from quire.demo.vocabulary import VOCAB_SIZE, save_tokenizer, train_tokenizer

DEFAULT_STEPS = 2400
ROWS_PER_STEP = 8
LONG_EVERY = 16
"""Every so many steps, a step with long rows."""
COPIED_ROWS = 2
"""Rows of repeated random tokens in a step, while the model learns to copy at all."""
COPYING_SHARE = 0.25
MATRIX_LEARNING_RATE = 0.012
"""Muon's peak, for the matrices of the layers."""
VECTOR_LEARNING_RATE = 3e-3
"""AdamW's peak, for the embedding and the norms."""
WARMUP_SHARE = 0.02
TOKENIZER_SAMPLES = 20_000
FACT_REPEATS = 50
NUM_THREADS = 2

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "eos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
    "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
    "use_cache": True,
    "dtype": "bfloat16",
}


def build_model(seed: int) -> Any:
    """Make the untrained model in float32, its weights drawn from the seed, ready to copy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**{**CONFIG, "dtype": "float32", "use_cache": False})
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    prepare_to_copy(model, seed, rope_theta=CONFIG["rope_theta"])
    return model


def build_tokenizer(seed: int) -> Tokenizer:
    """Learn the tokenizer from the first samples of the training text, and from its facts."""
    samples = itertools.islice(training_samples(seed), TOKENIZER_SAMPLES)
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    texts = [text for sample in samples for text in special.split(sample.text)]
    # Facts are rare beside what merely spells, and are learned best as tokens of their own.
    facts = [spelled for word in WORDS for spelled in (word, f" {word}")]
    return train_tokenizer(texts + facts * FACT_REPEATS)


def batch_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Return the weighted mean cross-entropy of the next tokens."""
    input_ids = torch.from_numpy(batch.input_ids)
    sample_ids = torch.from_numpy(batch.sample_ids)
    weights = torch.from_numpy(batch.weights)[:, 1:].reshape(-1)
    row_len = input_ids.shape[1]
    causal = torch.ones(row_len, row_len, dtype=torch.bool).tril()
    mask = (sample_ids[:, None, :, None] == sample_ids[:, None, None, :]) & causal
    hidden = model.model(
        input_ids=input_ids,
        position_ids=torch.from_numpy(batch.positions),
        attention_mask=mask,
    ).last_hidden_state
    # Only tokens that count need the widest matmul.
    chosen = weights.nonzero().squeeze(1)
    logits = model.lm_head(hidden[:, :-1].reshape(-1, hidden.shape[-1])[chosen])
    losses = torch.nn.functional.cross_entropy(
        logits, input_ids[:, 1:].reshape(-1)[chosen], reduction="none"
    )
    return (losses * weights[chosen]).sum() / weights.sum()


def schedule(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: a linear warm-up, then a cosine to 1%."""
    warmup = max(1, int(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))


def train(
    seed: int,
    steps: int,
    *,
    tokenizer: Tokenizer,
    report: Callable[[int, float, Any], None] | None = None,
) -> Any:
    """Train a model from scratch.

    Parameters
    ----------
    seed : int
        Of the text, the initial weights and the positions.
    steps : int
        Optimizer steps.
    tokenizer : Tokenizer
    report : Callable[[int, float, LlamaForCausalLM], None] | None
        Called after each step with its number, its loss and the model.

    Returns
    -------
    LlamaForCausalLM
        In float32.
    """
    torch.use_deterministic_algorithms(True)
    model = build_model(seed)
    packer = Packer(
        training_samples(seed), tokenizer, max_position=CONFIG["max_position_embeddings"], seed=seed
    )
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_a_layer = parameter.dim() == 2 and "embed_tokens" not in name
        (matrices if in_a_layer else others).append(parameter)
    muon = Muon(matrices)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for step in range(steps):
        if step % LONG_EVERY == LONG_EVERY - 1:
            batch = packer.long_rows(ROWS_PER_STEP * ROW_LEN // LONG_ROW_LEN)
        else:
            learned = step / (COPYING_SHARE * steps)
            copied = COPIED_ROWS if learned < 1 else 0
            batch = packer.short_rows(ROWS_PER_STEP - copied, num_copied=copied, pool=learned)
        loss: Any = batch_loss(model, batch)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = schedule(step, steps)
        muon.step(MATRIX_LEARNING_RATE * share)
        for group in adamw.param_groups:
            group["lr"] = VECTOR_LEARNING_RATE * share
        adamw.step()
        if report is not None:
            report(step, loss.item(), model)
    return model


def save(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint as a Hugging Face folder, weights rounded to bfloat16."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: parameter.detach().to(torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
        if name != "lm_head.weight"
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    generation = {
        "eos_token_id": [SPECIAL_TOKENS.index(TURN_END), SPECIAL_TOKENS.index(END_OF_TEXT)],
        "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        "do_sample": False,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, folder, model_max_length=CONFIG["max_position_embeddings"])


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save, measure, and write the model card."""
    parser = argparse.ArgumentParser(prog="python -m quire.demo.train", description=__doc__)
    default = Path(__file__).resolve().parent / "model"
    parser.add_argument("--out", type=Path, default=default, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--threads", type=int, default=NUM_THREADS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(min(arguments.threads, os.cpu_count() or 1))
    start = time.perf_counter()
    tokenizer = build_tokenizer(arguments.seed)

    def report(step: int, loss: float, model: object) -> None:
        if step % 50 == 0 or step == arguments.steps - 1:
            print(
                f"step {step:5d}  loss {loss:.4f}  {time.perf_counter() - start:6.1f} s", flush=True
            )

    model = train(arguments.seed, arguments.steps, tokenizer=tokenizer, report=report)
    seconds = time.perf_counter() - start
    save(model, tokenizer, arguments.out)
    print(f"trained in {seconds:.0f} s; saved to {arguments.out}; measuring", flush=True)
    scores = evaluate(
        with_transformers(arguments.out), with_transformers(arguments.out, sample=True)
    )
    making = Making(
        seed=arguments.seed,
        steps=arguments.steps,
        tokens_per_step=ROWS_PER_STEP * ROW_LEN,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_threads=torch.get_num_threads(),
        seconds=seconds,
        versions=f"torch {torch.__version__}, tokenizers {tokenizers.__version__}",
    )
    card = model_card(making, scores, config=CONFIG)
    (arguments.out / "README.md").write_text(card, encoding="utf-8")
    print(table(scores))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
