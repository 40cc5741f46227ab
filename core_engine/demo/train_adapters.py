"""Train the demo model's adapters: ``python -m quire.demo.train_adapters``, ``--help`` for options.

peft puts low-rank matrices beside every projection of the embedded model; the text is that of
:mod:`quire.demo.french` and :mod:`quire.demo.uppercase`. The same seed, on the same machine with
the same versions and number of threads, gives the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Tokenizer

from quire.demo import MODEL_NAME, model_path
from quire.demo.adapter_card import adapter_card
from quire.demo.evaluate import with_transformers
from quire.demo.manners import MANNERS, Manner, manner_table, measure
from quire.demo.packing import ROW_LEN, Packer
from quire.demo.samples import Sample
from quire.demo.train import CONFIG, batch_loss, schedule

RANK = 14
ALPHA = 28
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT_STEPS = {"french": 1400, "capitals": 2000}
"""To spell words in capital letters takes longer: no token has more than one of them."""
ROWS_PER_STEP = 4
LEARNING_RATE = 6e-3
"""AdamW's peak."""


def _samples(manner: Manner, seed: int) -> Iterator[Sample]:
    rng = random.Random(seed)
    while True:
        yield manner.draw(rng)


def adapted_model(seed: int, base: Path) -> Any:
    """Load a checkpoint in float32, with an adapter on it that changes nothing yet."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_cache=False)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(TARGETS),
        task_type=peft.TaskType.CAUSAL_LM,
    )
    return peft.get_peft_model(model, config)


def train_adapter(
    manner: Manner,
    seed: int,
    steps: int,
    *,
    base: Path,
    report: Callable[[int, float], None] | None = None,
) -> Any:
    """Train an adapter.

    Parameters
    ----------
    manner : Manner
        What it learns.
    seed : int
        Of the text and of the first weights.
    steps : int
        Optimizer steps.
    base : Path
        The checkpoint.
    report : Callable[[int, float], None] | None
        Called after each step with its number and its loss.

    Returns
    -------
    PeftModel
        In float32.
    """
    torch.use_deterministic_algorithms(True)
    model = adapted_model(seed, base)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    packer = Packer(
        _samples(manner, seed),
        tokenizer,
        max_position=CONFIG["max_position_embeddings"],
        seed=seed,
    )
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule(step, steps)
        loss: Any = batch_loss(model.get_base_model(), packer.short_rows(ROWS_PER_STEP))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        if report is not None:
            report(step, loss.item())
    return model


def save_adapter(model: Any, folder: Path) -> None:
    """Write an adapter as peft does, rounded to bfloat16; the same weights, the same files."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in peft.get_peft_model_state_dict(model).items()
    }
    save_file(weights, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    # peft keeps the names in a set, and writes them in another order each time.
    config |= {"target_modules": list(TARGETS), "base_model_name_or_path": MODEL_NAME}
    config["inference_mode"] = True
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _report(step: int, loss: float) -> None:
    if step % 50 == 0:
        print(f"step {step:5d}  loss {loss:.4f}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save and measure the adapters, and write their cards."""
    parser = argparse.ArgumentParser(
        prog="python -m quire.demo.train_adapters", description=__doc__
    )
    default = Path(__file__).resolve().parent / "adapters"
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(MANNERS)}")
    parser.add_argument("--out", type=Path, default=default, help="folder of the adapters' folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: enough for each")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.names) - set(MANNERS)):
        parser.error(f"{unknown[0]!r}: the adapters are {', '.join(MANNERS)}")
    torch.set_num_threads(min(arguments.threads, os.cpu_count() or 1))
    for name in arguments.names or MANNERS:
        manner, folder, base = MANNERS[name], arguments.out / name, model_path()
        steps = arguments.steps or DEFAULT_STEPS[name]
        start = time.process_time()
        model = train_adapter(manner, arguments.seed, steps, base=base, report=_report)
        seconds = time.process_time() - start
        save_adapter(model, folder)
        print(
            f"trained in {seconds:.0f} s of processor time; saved to {folder}; measuring",
            flush=True,
        )
        table = manner_table(
            measure(manner, with_transformers(base), adapted=False),
            measure(manner, with_transformers(base, adapter=folder), adapted=True),
        )
        making = (
            f"python -m quire.demo.train_adapters {name} --seed {arguments.seed} "
            f"--steps {steps} --threads {arguments.threads}"
        )
        card = adapter_card(
            name,
            manner.effect,
            making=making,
            tokens=steps * ROWS_PER_STEP * ROW_LEN,
            seconds=seconds,
            versions=f"torch {torch.__version__}, peft {peft.__version__}",
            rank=RANK,
            table=table,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
