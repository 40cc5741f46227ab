"""EngineSide: quire's engine over a model whose weights are drawn, as the parts drive it."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from quire.bench.gpu.shapes import write_config

if TYPE_CHECKING:
    import torch

    from quire.models.decoder import Decoder


class Generated(NamedTuple):
    """What one call of `generate` took, in seconds.

    Attributes
    ----------
    total : float
    first : float
        From the beginning to the last of the first tokens.
    """

    total: float
    first: float


class EngineSide:
    """An ``LLM`` of random weights; a context manager.

    Parameters
    ----------
    config : dict
        Of ``config.json``.
    device : torch.device
    **options
        Further engine arguments.
    """

    def __init__(self, config: dict[str, Any], device: torch.device, **options: Any) -> None:
        from quire import LLM

        with tempfile.TemporaryDirectory() as folder:
            self.llm = LLM(
                str(write_config(Path(folder), config)),
                load_format="dummy",
                dtype="bfloat16",
                skip_tokenizer_init=True,
                device=str(device),
                **options,
            )
        self._vocab_size = int(config["vocab_size"])
        self._rng = random.Random(0)

    def __enter__(self) -> EngineSide:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.llm.close()

    @property
    def model(self) -> Decoder:
        """The decoder."""
        runner = self.llm.llm_engine._runner
        assert runner is not None
        model: Decoder = runner.model
        return model

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        from quire.bench.weight_bytes import step_bytes

        return step_bytes(self.model)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, in all layers."""
        numbers = sum(2 * heads * size for heads, size in self.model.kv_cache_layers())
        return numbers * self.model.weights.dtype.itemsize

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Draw prompts, each of its own."""
        drawn = self._rng.choices(range(3, self._vocab_size), k=count * length)
        return [drawn[i * length : (i + 1) * length] for i in range(count)]

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> Generated:
        """Generate exactly so many tokens for each prompt, the likeliest ones."""
        from quire import SamplingParams

        params = [
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in output_lens
        ]
        started = time.monotonic()  # the clock of the requests' metrics
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        total = time.monotonic() - started
        counts = [len(each.outputs[0].token_ids) for each in outputs]
        if counts != output_lens:
            raise RuntimeError(f"{counts} tokens were generated, not {output_lens}")
        firsts = [
            each.metrics.first_token_time
            for each in outputs
            if each.metrics is not None and each.metrics.first_token_time is not None
        ]
        return Generated(total, max(firsts) - started)
