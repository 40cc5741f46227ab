"""Sides: who is measured. Each loads a model once and then runs workloads."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

from quire.bench.llama_cpp import LlamaCppSide
from quire.bench.ranks_side import RanksSide
from quire.bench.workload import Workload


class Side(Protocol):
    """One contestant, inside a process of its own."""

    def run(self, workload: Workload) -> dict[str, float]:
        """Run a workload; return ``seconds`` and whatever else was measured.

        ``first_token_seconds`` is the mean over the prompts, each from the start of the run.
        """

    def versions(self) -> dict[str, str]:
        """Return the versions of what is measured."""


class QuireSide:
    """quire's ``LLM``.

    Parameters
    ----------
    model : str
    detokenize : bool, default False
        Whether outputs get their text, by the model's tokenizer.
    **options
        Engine arguments, such as ``enable_prefix_caching=False``.
    """

    def __init__(self, model: str, *, detokenize: bool = False, **options: Any) -> None:
        from quire import LLM
        from quire.bench.weight_bytes import step_bytes

        self._detokenize = detokenize
        self._llm = LLM(model, skip_tokenizer_init=not detokenize, **options)
        runner = self._llm.llm_engine._runner
        assert runner is not None
        self._step_bytes = step_bytes(runner.model)

    def run(self, workload: Workload) -> dict[str, float]:
        """Generate; the prefix cache starts empty."""
        from quire import SamplingParams

        self._llm.reset_prefix_cache()
        params = [
            SamplingParams(
                temperature=0, max_tokens=n, ignore_eos=True, detokenize=self._detokenize
            )
            for n in workload.output_lens
        ]
        before = self._llm.get_metrics()
        started = time.perf_counter()
        outputs = self._llm.generate(workload.prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        after = self._llm.get_metrics()
        _check(workload, [len(output.outputs[0].token_ids) for output in outputs])
        delta = {name: after[name] - before[name] for name in after}
        firsts = [
            output.metrics.first_token_time - output.metrics.arrival_time
            for output in outputs
            if output.metrics is not None and output.metrics.first_token_time is not None
        ]
        steps = max(delta["num_steps"], 1)
        overhead = delta["step_seconds"] - delta["forward_seconds"]
        return {
            "seconds": seconds,
            "first_token_seconds": sum(firsts) / len(firsts),
            "steps": delta["num_steps"],
            "overhead_ms_per_step": 1e3 * overhead / steps,
            "forward_ms_per_step": 1e3 * delta["forward_seconds"] / steps,
            "step_bytes": float(self._step_bytes),
        }

    def versions(self) -> dict[str, str]:
        """Return quire's and torch's versions."""
        return quire_versions()


def quire_versions() -> dict[str, str]:
    """Return quire's and torch's versions, and which kernels compute."""
    import torch

    import quire
    from quire.kernels import get_backend

    kernels = get_backend("cpu")
    library = getattr(kernels, "library", None)
    isa = "" if library is None else f" ({library.quire_isa().decode()})"
    return {
        "quire": quire.__version__,
        "torch": torch.__version__,
        "kernels": kernels.name + isa,
    }


class TransformersSide:
    """transformers' ``generate`` over left-padded batches.

    Parameters
    ----------
    model : str
    batch_size : int
        Prompts per batch, taken in order.
    dtype : str
    """

    def __init__(self, model: str, *, batch_size: int = 32, dtype: str = "auto") -> None:
        from transformers import AutoModelForCausalLM

        # Any: transformers' own types do not agree with each other here.
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self._batch_size = batch_size

    def run(self, workload: Workload) -> dict[str, float]:
        """Generate batch by batch, each until its longest output is complete."""
        started = time.perf_counter()
        generated, firsts = [], []
        for low in range(0, len(workload.prompts), self._batch_size):
            high = low + self._batch_size
            lens = workload.output_lens[low:high]
            first = self._generate(workload.prompts[low:high], max(lens))
            firsts.extend([first - started] * len(lens))
            generated.extend(lens)
        seconds = time.perf_counter() - started
        _check(workload, generated)
        return {"seconds": seconds, "first_token_seconds": sum(firsts) / len(firsts)}

    def _generate(self, prompts: list[list[int]], count: int) -> float:
        """Generate, and return when the first tokens were there."""
        import torch

        clock = _Clock()

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )
        if output.shape[1] != width + count:
            raise RuntimeError(f"transformers generated {output.shape[1] - width} of {count}")
        return clock.times[1]  # the first call brings the prompts

    def versions(self) -> dict[str, str]:
        """Return transformers' and torch's versions."""
        import torch
        import transformers

        return {"transformers": transformers.__version__, "torch": torch.__version__}


class _Clock:
    """A streamer, for transformers, that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, token_ids: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class VllmSide:
    """vLLM's ``LLM``, in an environment of its own.

    With ``disable_log_stats=False`` it tells the time to the first token.

    Parameters
    ----------
    model : str
    **options
        Arguments of ``vllm.LLM``.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._vllm: Any = import_module("vllm")  # Any: of another environment
        self._llm = self._vllm.LLM(model, skip_tokenizer_init=True, **options)

    def run(self, workload: Workload) -> dict[str, float]:
        """Generate; the prefix cache starts empty."""
        self._llm.reset_prefix_cache()
        params = [
            self._vllm.SamplingParams(
                temperature=0, max_tokens=n, ignore_eos=True, detokenize=False
            )
            for n in workload.output_lens
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        _check(workload, [len(output.outputs[0].token_ids) for output in outputs])
        figures = {"seconds": seconds}
        metrics = [getattr(output, "metrics", None) for output in outputs]
        firsts = [getattr(each, "first_token_latency", None) for each in metrics]
        known = [first for first in firsts if first]  # not told, it is 0
        if len(known) == len(outputs):
            figures["first_token_seconds"] = sum(known) / len(known)
        return figures

    def versions(self) -> dict[str, str]:
        """Return vLLM's and torch's versions."""
        import torch

        return {"vllm": self._vllm.__version__, "torch": torch.__version__}


def _check(workload: Workload, generated: list[int]) -> None:
    if generated != workload.output_lens:
        raise RuntimeError(f"{generated} tokens were generated, not {workload.output_lens}")


SIDES: dict[str, Callable[..., Side]] = {
    "quire": QuireSide,
    "quire-ranks": RanksSide,
    "transformers": TransformersSide,
    "vllm": VllmSide,
    "llama-cpp": LlamaCppSide,
}
