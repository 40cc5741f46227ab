"""Source: a plain checkpoint, looked through before anything is made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from quire.errors import ModelLoadError, UnsupportedModelError
from quire.kernels.reference.backend import ReferenceBackend
from quire.models.decoder import Decoder
from quire.models.family import Place
from quire.models.hf_config import max_length, read_config
from quire.models.layer_walk import MOST_PER_PROMPT
from quire.models.linear import Linear
from quire.models.registry import build_spec, family_of
from quire.models.tensor_files import TensorFiles
from quire.models.weights import Layout

_QUANTIZED = ("quantization_config", "compression_config")
_QUANTIZED_FILES = ("quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class Module:
    """A projection as the checkpoint has it.

    Attributes
    ----------
    name
        The checkpoint's: ``model.layers.0.mlp.down_proj``.
    linear
        The decoder's projection that it is, or is a part of.
    part
        Which; ``""``: all of it.
    layout
        See `quire.models.weights.Weights.fill`.
    """

    name: str
    linear: Linear
    part: str
    layout: Layout

    @property
    def target(self) -> str:
        """The decoder's name, with the part: as quantizers know it."""
        return f"{self.linear.name}.{self.part}" if self.part else self.linear.name


class Source:
    """A plain checkpoint and what is in it; a context manager.

    Parameters
    ----------
    folder
        A model's.

    Raises
    ------
    UnsupportedModelError
        It is quantized already, or no model that quire knows.
    ModelLoadError
        It is damaged or does not fit its configuration.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        found = [key for key in _QUANTIZED if self.config.get(key)]
        found += [file for file in _QUANTIZED_FILES if (folder / file).is_file()]
        if found:
            raise UnsupportedModelError(
                f"{folder} is quantized already (it has a {found[0]}); give the plain model that "
                "it was made from"
            )
        self.raw_config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        if isinstance(self.raw_config.get("text_config"), dict):
            raise UnsupportedModelError(
                f"{folder} is a model of more than text (its config.json has a text_config): only "
                "plain language models can be quantized into a folder"
            )
        _, self.family = family_of(self.config)
        # Some rotary embeddings are others for long sequences: what runs here is short.
        longest = min(MOST_PER_PROMPT, max_length(self.config))
        self.spec = build_spec(self.config, longest)
        self.files = TensorFiles(folder, self.family.stacked)
        try:
            self.places = self._places()
        except BaseException:
            self.files.__exit__(None, None, None)
            raise

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.files.__exit__(kind, error, trace)

    def _places(self) -> dict[str, Place]:
        """Where each tensor goes, having seen that all are there and have the right shapes."""
        decoder = Decoder(
            self.spec,
            device=torch.device("meta"),
            dtype=torch.float32,
            kernels=ReferenceBackend(),
        )
        if self.spec.tie_word_embeddings and "lm_head.weight" not in decoder.weights:
            # A checkpoint may have a head beside a tied embedding; it is kept.
            decoder.create_lm_head()
        places: dict[str, Place] = {}
        unknown = []
        for name in self.files.names():
            place = self.family.place(name)
            if place is not None and place.parameter in decoder.weights:
                try:
                    decoder.weights.fill(*place, self.files.tensor(name))
                except ModelLoadError as error:
                    raise ModelLoadError(f"{self.files.describe(name)} {error}") from None
                places[name] = place
            elif not self.family.ignores(name):
                unknown.append(name)
        missing = [" ".join(each).strip() for each in decoder.weights.missing()]
        if self.spec.tie_word_embeddings:
            # Either serves as both.
            heads = {"embed.weight", "lm_head.weight"}
            if not heads <= set(missing):
                missing = [each for each in missing if each not in heads]
        for what, names in (("missing", missing), ("unexpected", unknown)):
            if names:
                raise ModelLoadError(
                    f"the weights in {self.folder} do not fit its config.json "
                    f"({self.spec.architecture}); {len(names)} {what}: {', '.join(names[:10])}"
                )
        self._linears = decoder.projections()
        return places

    def modules(self) -> list[Module]:
        """Return the projections of all layers."""
        found = []
        for name, place in self.places.items():
            module, _, kind = name.rpartition(".")
            target, _, _ = place.parameter.rpartition(".")
            if kind == "weight" and target != "lm_head" and target in self._linears:
                found.append(Module(module, self._linears[target], place.part, place.layout))
        return found

    def plain_modules(self) -> list[str]:
        """Return the modules that are matrices and no projections of layers, such as the head.

        A head that is the embedding is a module all the same, and some are called otherwise in
        memory than in files: all names are given.
        """
        others = [
            name.removesuffix(".weight")
            for name, place in self.places.items()
            if place.parameter in ("project_in.weight", "project_out.weight", "lm_head.weight")
            or place.parameter.endswith((".router.weight", ".shared_gate.weight"))
        ]
        heads = [source for source, to in self.family.weights.items() if to.module == "lm_head"]
        return list(dict.fromkeys((*others, *heads)))

    def shape(self, module: Module) -> tuple[int, int]:
        """Return ``(out_features, in_features)`` of a module."""
        parts: Mapping[str, int] = module.linear.parts
        rows = parts[module.part] if module.part else module.linear.out_features
        return rows, module.linear.in_features

    def dtype(self) -> torch.dtype:
        """Return the type of the projections; of several, the first's."""
        return self.files.tensor(f"{self.modules()[0].name}.weight").dtype
