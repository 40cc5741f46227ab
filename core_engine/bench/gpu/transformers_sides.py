"""transformers on a device: static batches, and its continuous batching."""

from __future__ import annotations

import copy
import random
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Reference:
    """A model of transformers, of random weights made on the device.

    Parameters
    ----------
    config : dict
        Of ``config.json``.
    device : torch.device
    dtype : torch.dtype
    """

    def __init__(self, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        import torch

        transformers: Any = import_module("transformers")  # its own types do not agree

        known = {name: value for name, value in config.items() if not name.endswith("dtype")}
        built = transformers.AutoConfig.for_model(known.pop("model_type"), **known)
        with torch.device(device):
            self.model: Any = transformers.AutoModelForCausalLM.from_config(built, dtype=dtype)
        self.model.eval()
        self.device = device
        # No token ends a text: as many are generated as are asked for.
        self._settings = transformers.GenerationConfig(
            do_sample=False, pad_token_id=0, bos_token_id=1, eos_token_id=None
        )

    def static(self, prompts: list[list[int]], output_lens: list[int], batch_size: int) -> float:
        """Generate batch by batch, padded on the left, each until its longest output is there."""
        import torch

        started = time.perf_counter()
        for low in range(0, len(prompts), batch_size):
            batch = prompts[low : low + batch_size]
            count = max(output_lens[low : low + batch_size])
            settings = copy.deepcopy(self._settings)
            settings.max_new_tokens = count
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=self.device)
            mask = torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in batch], device=self.device
            )
            with torch.inference_mode():
                made = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=settings,
                )
            if made.shape[1] != width + count:
                raise RuntimeError(f"{made.shape[1] - width} tokens were generated, not {count}")
            made.tolist()  # has them on the host, as users have
        return time.perf_counter() - started

    def continuous(
        self, prompts: list[list[int]], output_lens: list[int], *, tiny: bool = False
    ) -> float:
        """Generate by transformers' manager of continuous batches; its start does not count.

        Parameters
        ----------
        prompts, output_lens
        tiny
            Have a small cache; else it takes the memory that is left.
        """
        from transformers import ContinuousBatchingConfig

        config = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64) if tiny else None
        settings = copy.deepcopy(self._settings)
        settings.eos_token_id = -1
        settings.max_new_tokens = max(output_lens)
        with self.model.continuous_batching_context_manager(
            generation_config=settings,
            continuous_batching_config=config,
            block=True,
            timeout=30,
        ) as manager:
            # Its thread makes the cache, and compiles, with the first request.
            self._through(manager, prompts[:1], [2], "first")
            started = time.perf_counter()
            self._through(manager, prompts, output_lens, "")
            return time.perf_counter() - started

    def _through(
        self, manager: Any, prompts: list[list[int]], output_lens: list[int], prefix: str
    ) -> None:
        for index, (prompt, count) in enumerate(zip(prompts, output_lens, strict=True)):
            manager.add_request(
                prompt, request_id=f"{prefix}{index}", max_new_tokens=count, eos_token_id=-1
            )
        counts: dict[str, int] = {}
        deadline = time.monotonic() + 600
        while len(counts) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running() or time.monotonic() > deadline:
                    raise RuntimeError("transformers' continuous batching ended early")
                continue
            if getattr(result, "error", None):
                raise RuntimeError(f"transformers' continuous batching: {result.error}")
            if result.is_finished():
                counts[result.request_id] = len(result.generated_tokens)
        found = [counts[f"{prefix}{index}"] for index in range(len(prompts))]
        if found != output_lens:
            raise RuntimeError(f"{found} tokens were generated, not {output_lens}")


def mixed_lens(
    count: int, most_in: int, most_out: int, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Draw how long prompts and outputs are: from a sixteenth of the most to the most."""
    rng = random.Random(seed)
    ins = [rng.randint(max(1, most_in // 16), most_in) for _ in range(count)]
    return ins, [rng.randint(max(2, most_out // 16), most_out) for _ in range(count)]
