"""RanksSide: an engine whose steps are all alike, and what its ranks exchange meanwhile."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from quire.bench.workload import Workload

if TYPE_CHECKING:
    from quire.parallel.group import Exchanged

COUNTS = ("operations", "num_bytes", "seconds", "waited")
"""What is counted of each rank, as ``rank0_operations`` and so on."""

_METRICS = (
    "num_steps",
    "num_computed_tokens",
    "num_generation_tokens",
    "step_seconds",
    "forward_seconds",
)


class RanksSide:
    """quire's ``LLM``, on one rank or several.

    A workload that generates more than one token for each prompt is measured from a prefix cache
    that has all of its prompts but their last token, so that each step computes one token of each;
    another one from an empty cache.

    Parameters
    ----------
    model : str
    **options
        Engine arguments, such as ``tensor_parallel_size=2``.
    """

    def __init__(self, model: str, **options: Any) -> None:
        from quire import LLM
        from quire.bench.weight_bytes import step_bytes

        self._llm = LLM(model, skip_tokenizer_init=True, **options)
        runner = self._llm.llm_engine._runner
        assert runner is not None
        self._step_bytes = step_bytes(runner.model)

    def run(self, workload: Workload) -> dict[str, float]:
        """Generate, and return how much time and what exchanges that took.

        Besides ``seconds``, ``step_bytes`` of rank 0 and the engine's counters there is what
        `COUNTS` names of each rank, if there are several.
        """
        self._llm.reset_prefix_cache()
        if max(workload.output_lens) > 1:
            self._generate(workload.prompts, [1] * len(workload.prompts))
        before, counted_before = self._llm.get_metrics(), self._counted()
        seconds = self._generate(workload.prompts, workload.output_lens)
        after, counted = self._llm.get_metrics(), self._counted()
        figures = {"seconds": seconds, "step_bytes": float(self._step_bytes)}
        figures |= {name: after[name] - before[name] for name in _METRICS}
        for rank, (own, own_before) in enumerate(zip(counted, counted_before, strict=True)):
            for name in COUNTS:
                figures[f"rank{rank}_{name}"] = getattr(own, name) - getattr(own_before, name)
        return figures

    def _counted(self) -> list[Exchanged]:
        from quire.executor.parallel_runner import ParallelRunner

        runner = self._llm.llm_engine._runner  # nothing is in flight: its thread waits
        return runner.exchanged_of_all() if isinstance(runner, ParallelRunner) else []

    def _generate(self, prompts: list[list[int]], output_lens: list[int]) -> float:
        from quire import SamplingParams

        params = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in output_lens
        ]
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        made = [len(output.outputs[0].token_ids) for output in outputs]
        if made != output_lens:
            raise RuntimeError(f"{made} tokens were generated, not {output_lens}")
        return seconds

    def versions(self) -> dict[str, str]:
        """Return quire's and torch's versions."""
        from quire.bench.sides import quire_versions

        return quire_versions()
