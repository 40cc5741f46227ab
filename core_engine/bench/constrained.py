"""Constrained generation: what it costs beside free generation, and what forced tokens save."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.bench.contest import BenchError, Measurement
from quire.bench.workload import Workload

if TYPE_CHECKING:
    from quire import LLM, SamplingParams
    from quire.outputs import RequestOutput
    from quire.structured_outputs import StructuredOutputsParams

ENDLESS: dict[str, str] = {
    "any text": r"(.|\n)*",
    "JSON lines": r'(\{"name": "[^"\\\n]{0,40}", "size": [0-9]{1,6}, "is_new": (true|false)\}\n)*',
}
"""Regexes whose texts can always go on, so that each side generates as much as it is told."""

RECORD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 12},
        "account_status": {"enum": ["active", "suspended", "closed"]},
        "number_of_orders": {"type": "integer", "minimum": 0, "maximum": 999},
        "preferred_language": {"enum": ["English", "German", "French", "Spanish"]},
        "has_open_invoices": {"type": "boolean"},
        "support_priority": {"enum": ["low", "normal", "high", "urgent"]},
        "shipping_country": {"type": "string", "maxLength": 12},
        "newsletter_subscribed": {"type": "boolean"},
    },
    "additionalProperties": False,
}
RECORD["required"] = list(RECORD["properties"])
"""A schema of fixed keys and short values, which any model finishes."""

_WORD, _NUMBER = {"type": "string", "maxLength": 30}, {"type": "integer"}
_DEMO_RECORDS: dict[str, dict[str, Any]] = {
    "person": {"name": _WORD, "age": _NUMBER, "city": _WORD, "job": _WORD},
    "hero": {"name": _WORD, "armor": _WORD, "weapon": _WORD, "strength": _NUMBER},
    "place": {"name": _WORD, "country": _WORD, "continent": _WORD, "population": _NUMBER},
    "customer": RECORD["properties"],
}
"""What the demo model is asked for: it was trained on records with the keys of all but the last."""


@dataclass(slots=True)
class Mode:
    """A way to generate, on an engine of its own or on another's.

    Attributes
    ----------
    label : str
    llm : LLM
    constraint : StructuredOutputsParams or None
    """

    label: str
    llm: LLM
    constraint: StructuredOutputsParams | None


def _open(stack: ExitStack, model: str, options: dict[str, Any], *, forced_tokens: bool) -> LLM:
    from quire import LLM

    return stack.enter_context(
        LLM(model, structured_outputs_forced_tokens=forced_tokens, **options)
    )


def measure_throughput(
    model: Path,
    options: dict[str, Any],
    workload: Workload,
    *,
    repeats: int,
    say: Callable[[str], None],
) -> list[Measurement]:
    """Generate the same number of tokens without a constraint and with endless ones, in turns.

    Parameters
    ----------
    model : Path
    options : dict
        Further arguments of the engine, which has its forced tokens off.
    workload : Workload
    repeats : int
        Counted runs of each; one is not counted, in which the constraint is compiled.
    say : callable

    Returns
    -------
    list of Measurement
        The first is without a constraint.
    """
    from quire import SamplingParams
    from quire.structured_outputs import StructuredOutputsParams

    def params(constraint: StructuredOutputsParams | None) -> list[SamplingParams]:
        # No end is allowed before min_tokens, where a mask may leave it as one of few tokens.
        return [
            SamplingParams(
                temperature=0,
                max_tokens=count,
                min_tokens=count,
                ignore_eos=True,
                structured_outputs=constraint,
            )
            for count in workload.output_lens
        ]

    with ExitStack() as stack:
        llm = _open(stack, str(model), options, forced_tokens=False)
        modes = [Mode("unconstrained", llm, None)]
        modes += [
            Mode(label, llm, StructuredOutputsParams(regex=regex))
            for label, regex in ENDLESS.items()
        ]
        measurements = [Measurement(mode.label) for mode in modes]
        for repeat in range(repeats + 1):
            for mode, measurement in zip(modes, measurements, strict=True):
                figures, outputs = _run(mode, workload.prompts, params(mode.constraint))
                made = [len(output.outputs[0].token_ids) for output in outputs]
                if made != workload.output_lens:
                    raise BenchError(f"{mode.label}: generated {made}, not {workload.output_lens}")
                if repeat:
                    measurement.add(figures)
                    say(f"  {mode.label}: {figures['seconds']:.2f} s")
    return measurements


def measure_canonical(
    model: Path,
    options: dict[str, Any],
    prompts: list[list[int]],
    *,
    repeats: int,
    say: Callable[[str], None],
) -> list[Measurement]:
    """Generate records of fixed keys without forced tokens, with exact ones and canonical ones.

    A mode's outputs may be its own, so that figures by character stand beside those by token.

    Parameters
    ----------
    model : Path
    options : dict
        Further arguments of the engines.
    prompts : list of list of int
        All at once.
    repeats : int
        Counted runs of each mode, in turns; one is not counted.
    say : callable
    """
    from quire import SamplingParams
    from quire.structured_outputs import StructuredOutputsParams

    exact = StructuredOutputsParams(json=RECORD, disable_any_whitespace=True)
    canonical = StructuredOutputsParams(
        json=RECORD, disable_any_whitespace=True, canonical_tokens=True
    )
    with ExitStack() as stack:
        without = _open(stack, str(model), options, forced_tokens=False)
        engine = _open(stack, str(model), options, forced_tokens=True)
        modes = [
            Mode("no forced tokens", without, exact),
            Mode("exact", engine, exact),
            Mode("canonical", engine, canonical),
        ]
        measurements = [Measurement(mode.label) for mode in modes]
        for repeat in range(repeats + 1):
            for mode, measurement in zip(modes, measurements, strict=True):
                params = SamplingParams(
                    temperature=0, max_tokens=512, structured_outputs=mode.constraint
                )
                figures, outputs = _run(mode, prompts, [params] * len(prompts))
                _check_finished(mode, outputs)
                if repeat:
                    measurement.add(figures)
                    say(f"  {mode.label}: {figures['seconds']:.2f} s")
    return measurements


def measure_steps(
    model: str, options: dict[str, Any], *, num_records: int, say: Callable[[str], None]
) -> dict[str, list[Measurement]]:
    """Count the steps for records of fixed keys with forced tokens and without, one by one.

    Parameters
    ----------
    model : str
    options : dict
        Further arguments of the engines.
    num_records : int
        Of each kind, every other one greedy and the rest drawn at temperature 1.
    say : callable

    Returns
    -------
    dict of str to list of Measurement
        By kind, without and with; each has a run for every record.

    Raises
    ------
    BenchError
        The two did not generate the same tokens.
    """
    from quire import SamplingParams

    done: dict[str, list[Measurement]] = {}
    with ExitStack() as stack:
        modes = [
            Mode(label, _open(stack, model, options, forced_tokens=forced), None)
            for label, forced in (("no forced tokens", False), ("exact", True))
        ]
        for kind in _DEMO_RECORDS:
            done[kind] = [Measurement(mode.label) for mode in modes]
            prompt, constraint = _demo_record(kind)
            for i in range(num_records):
                params = SamplingParams(
                    temperature=float(i % 2),
                    seed=i,
                    max_tokens=512,
                    structured_outputs=constraint,
                )
                tokens = []
                for mode, measurement in zip(modes, done[kind], strict=True):
                    figures, outputs = _run(mode, [prompt], [params])
                    _check_finished(mode, outputs)
                    measurement.add(figures)
                    tokens.append(outputs[0].outputs[0].token_ids)
                if tokens[0] != tokens[1]:
                    raise BenchError(f"{kind} {i}: forced tokens changed the output")
            steps = [f"{sum(each.runs['steps']):.0f} {each.label}" for each in done[kind]]
            say(f"  steps for {kind}: {', '.join(steps)}")
    return done


def _demo_record(kind: str) -> tuple[str, StructuredOutputsParams]:
    from quire.structured_outputs import StructuredOutputsParams

    properties = _DEMO_RECORDS[kind]
    *names, last = properties
    schema = {
        "type": "object",
        "properties": properties,
        "required": [*names, last],
        "additionalProperties": False,
    }
    keys = f"{', '.join(names)} and {last}"
    prompt = f"Write a JSON record of a {kind} with the keys {keys}. Write it without spaces."
    return prompt, StructuredOutputsParams(json=schema, disable_any_whitespace=True)


def _run(
    mode: Mode, prompts: Sequence[Any], params: list[SamplingParams]
) -> tuple[dict[str, float], list[RequestOutput]]:
    """Generate once; the prefix cache starts empty."""
    mode.llm.reset_prefix_cache()
    before = mode.llm.get_metrics()
    started = time.perf_counter()
    outputs = mode.llm.generate(list(prompts), params, use_tqdm=False)
    seconds = time.perf_counter() - started
    after = mode.llm.get_metrics()
    completions = [output.outputs[0] for output in outputs]
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    num_characters = sum(len(completion.text) for completion in completions)
    figures = {
        "seconds": seconds,
        "tokens": float(num_tokens),
        "characters": float(num_characters),
        "tokens_per_second": num_tokens / seconds,
        "characters_per_second": num_characters / seconds,
        "steps": float(after["num_steps"] - before["num_steps"]),
    }
    return figures, outputs


def _check_finished(mode: Mode, outputs: list[RequestOutput]) -> None:
    for output in outputs:
        if output.outputs[0].finish_reason != "stop":
            raise BenchError(f"{mode.label}: {output.outputs[0].text!r} is unfinished")
