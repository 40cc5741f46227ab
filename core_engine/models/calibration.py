"""Calibration: a quantizer is shown what the projections of the plain model are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.models.layer_walk import LayerWalk
from quire.models.registry import build_spec, family_of
from quire.models.tensor_files import TensorFiles

if TYPE_CHECKING:
    from quire.quantization.on_load import CalibratedQuantizer


def calibrate(
    quantizer: CalibratedQuantizer,
    folder: Path,
    config: Mapping[str, Any],
    encode: Callable[[str], Sequence[int]],
    max_model_len: int | None = None,
) -> None:
    """Run the plain model on a quantizer's prompts, if it has any, and let it observe.

    No more than one layer is in memory, in float32. To be called before the model is loaded with
    the quantizer.

    Parameters
    ----------
    quantizer
        Nothing is done where its ``prompts`` are none.
    folder, config, max_model_len
        As for `quire.models.loader.load_model`; the folder's weights are plain.
    encode
        From a prompt's text to its token ids.

    Raises
    ------
    ConfigError
        A prompt has no token, or one that the model lacks.
    ModelLoadError
        The checkpoint is damaged or does not fit its configuration.
    """
    if not quantizer.prompts:
        return
    prompts = [encode(each) if isinstance(each, str) else each for each in quantizer.prompts]
    _, family = family_of(config)
    spec = build_spec(config, max_model_len)
    with TensorFiles(folder, family.stacked) as files:
        for layer in LayerWalk(files, family, spec, prompts).layers():
            for linear in layer.linears:
                weights = list(layer.parts(linear).values())
                quantizer.observe(linear.name, weights, layer.inputs[linear.name])
