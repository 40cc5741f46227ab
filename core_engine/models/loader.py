"""From a model folder to a Decoder with its weights in place, each in memory once."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quire.errors import ModelLoadError
from quire.models.checkpoint import WeightFile, open_file, weight_files
from quire.models.decoder import Decoder
from quire.models.family import Family, Place
from quire.models.registry import build_spec, family_of

if TYPE_CHECKING:
    from quire.kernels import Backend

logger = logging.getLogger(__name__)

_NAMES_SHOWN = 10
_ROWS_COMPARED = 4096


def load_model(
    folder: Path,
    config: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernels: Backend,
    max_model_len: int | None = None,
    max_adapters: int = 0,
) -> Decoder:
    """Load the model of a folder. No code that lies in the folder is run.

    Parameters
    ----------
    folder
        Where `quire.models.hub.resolve_model` found it.
    config
        What `quire.models.hf_config.read_config` read there.
    device, dtype
        Of weights and activations.
    kernels
        From ``quire.kernels.get_backend(device)``.
    max_model_len
        The longest sequence that will be served; None: as long as the configuration allows. Some
        rotary embeddings depend on it, see `quire.models.rotary.rotary_spec`.
    max_adapters
        How many adapters a step may be computed with; 0: none.

    Raises
    ------
    UnsupportedModelError
        It is a model that quire cannot run.
    ModelLoadError
        The checkpoint is damaged or does not fit its configuration.
    OutOfMemoryError
        The weights do not fit.
    """
    spec = build_spec(config, max_model_len)
    _, family = family_of(config)
    files = weight_files(folder)
    decoder = Decoder(spec, device=device, dtype=dtype, kernels=kernels, max_adapters=max_adapters)
    _Loading(decoder, family, folder).run(files)
    decoder.bind()
    return decoder


class _Loading:
    """One checkpoint on its way into one decoder."""

    def __init__(self, decoder: Decoder, family: Family, folder: Path) -> None:
        self._decoder = decoder
        self._family = family
        self._folder = folder
        self._unexpected: list[str] = []
        self._tied_heads: list[tuple[Path, str]] = []

    def run(self, files: Sequence[Path]) -> None:
        for path in files:
            with open_file(path) as file:
                for name in file.names():
                    self._take(file, name)
        for path, name in self._tied_heads:
            with open_file(path) as file:
                self._take_tied_head(file, name)
        self._check()

    def _take(self, file: WeightFile, name: str) -> None:
        place = self._family.place(name)
        weights = self._decoder.weights
        if place is not None and place.parameter in weights:
            self._fill(file, name, place)
        elif (
            place is not None
            and place.parameter == "lm_head.weight"
            and self._decoder.spec.tie_word_embeddings
        ):
            self._tied_heads.append((file.path, name))
        elif not self._family.ignores(name):
            self._unexpected.append(name)

    def _fill(self, file: WeightFile, name: str, place: Place) -> None:
        def done(first_row: int, end_row: int) -> None:
            file.release(name, first_row, end_row)

        try:
            self._decoder.weights.fill(*place, file.tensor(name), done)
        except ModelLoadError as error:
            raise ModelLoadError(f"{file.path.name} in {self._folder}: {name!r} {error}") from None

    def _take_tied_head(self, file: WeightFile, name: str) -> None:
        """Deal with an output matrix in a checkpoint whose configuration ties it.

        As in transformers: the same values are left out, values where the embedding has none
        serve both, and other values mean that the configuration is wrong.
        """
        decoder, weights = self._decoder, self._decoder.weights
        if not weights.is_loaded("embed.weight"):
            self._fill(file, name, Place("embed.weight", "", "plain"))
        elif not self._equals_embedding(file, name):
            logger.warning(
                "%s: tie_word_embeddings is true, but %r differs from the embedding; both are used",
                self._folder,
                name,
            )
            decoder.create_lm_head()
            decoder.spec = replace(decoder.spec, tie_word_embeddings=False)
            self._fill(file, name, Place("lm_head.weight", "", "plain"))

    def _equals_embedding(self, file: WeightFile, name: str) -> bool:
        embedding, head = self._decoder.weights["embed.weight"], file.tensor(name)
        if head.shape != embedding.shape:
            return False
        for first in range(0, len(head), _ROWS_COMPARED):
            end = min(first + _ROWS_COMPARED, len(head))
            rows = head[first:end].to(embedding.device, embedding.dtype)
            if not torch.equal(rows, embedding[first:end]):
                return False
            file.release(name, first, end)
        return True

    def _check(self) -> None:
        missing = self._decoder.weights.missing()
        problems = []
        if missing:
            names = dict.fromkeys(self._name_of(*each) for each in missing)
            problems.append(f"{len(names)} missing: {_listed(list(names))}")
        if self._unexpected:
            problems.append(
                f"{len(self._unexpected)} unexpected: {_listed(sorted(self._unexpected))}"
            )
        if problems:
            raise ModelLoadError(
                f"the weights in {self._folder} do not fit its config.json "
                f"({self._decoder.spec.architecture}); {'; '.join(problems)}"
            )

    def _name_of(self, parameter: str, part: str) -> str:
        """What a checkpoint would call this (part of a) parameter."""
        module, _, kind = parameter.rpartition(".")
        number = re.search(r"(?<=\.)\d+(?=\.)", module)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", module, count=1)
        sources = {
            to.part: source for source, to in self._family.weights.items() if to.module == pattern
        }
        source = sources.get("", sources.get(part))
        if source is None:
            return f"{parameter} ({part})" if part else parameter
        prefix = self._family.prefixes[0] if self._family.prefixes else ""
        if pattern == "lm_head":
            prefix = ""
        return f"{prefix}{source.format(number.group() if number else '')}.{kind}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown}, ..." if len(names) > _NAMES_SHOWN else shown
