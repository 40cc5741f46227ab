"""From a model folder to a Decoder with its weights in place, each in memory once."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quire.errors import ModelLoadError
from quire.kernels.reference.quantized import dequantize
from quire.models.checkpoint import weight_files
from quire.models.decoder import Decoder
from quire.models.family import Family, To
from quire.models.random_weights import RandomSources
from quire.models.registry import build_spec, family_of
from quire.models.sources import Source, Sources
from quire.parallel.place import WHOLE, Place
from quire.quantization.format import Kinds, Quantizer, WeightFormat
from quire.utils.freed_memory import return_freed_memory

if TYPE_CHECKING:
    from quire.kernels import Backend
    from quire.parallel.group import Group

logger = logging.getLogger(__name__)

_NAMES_SHOWN = 10
_ROWS_COMPARED = 4096
_RETURNED_AT_ONCE = 1 << 22
"""Numbers that are made into codes before memory is returned: of a layer, not of each expert."""

_CACHE_SCALES = re.compile(r"\.(k|v|q|kv|prob)(_cache)?_(scale|zero_point)$")
"""What quantized checkpoints have for a KV cache in codes; here each of its rows has its own."""


def load_model(
    folder: Path,
    config: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernels: Backend,
    max_model_len: int | None = None,
    max_adapters: int = 0,
    weight_format: WeightFormat | None = None,
    quantizer: Quantizer | None = None,
    load_format: str = "auto",
    place: Place = WHOLE,
    group: Group | None = None,
) -> Decoder:
    """Load the model of a folder, or one rank's share. No code that lies in the folder is run.

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
    weight_format
        How the checkpoint keeps its projections; None: they are plain.
    quantizer
        What makes codes of plain projections while they are read; None: they stay as they are.
    load_format
        ``"dummy"``: plain weights are drawn, and the folder needs none; else they are read.
    place, group
        As for `quire.models.decoder.Decoder`.

    Raises
    ------
    ConfigError
        The model cannot be split so.
    UnsupportedModelError
        It is a model that quire cannot run.
    ModelLoadError
        The checkpoint is damaged or does not fit its configuration.
    OutOfMemoryError
        The weights do not fit.
    """
    spec = build_spec(config, max_model_len)
    _, family = family_of(config)
    decoder = Decoder(
        spec,
        device=device,
        dtype=dtype,
        kernels=kernels,
        max_adapters=max_adapters,
        place=place,
        group=group,
    )
    sources: Sources | RandomSources
    if load_format == "dummy":
        logger.warning("load_format='dummy': the weights of %s are random numbers", folder)
        sources = RandomSources(decoder.weights, family, folder)
    else:
        sources = Sources(weight_files(folder), family.stacked)
    with sources:
        _Loading(decoder, family, folder, sources, weight_format, quantizer).run()
    decoder.bind()
    return decoder


@dataclass
class _Module:
    """A module of the checkpoint: where it goes, and its tensors by kind, each perhaps twice."""

    name: str
    to: To
    tensors: dict[str, list[Source]] = field(default_factory=dict)

    @property
    def sources(self) -> list[Source]:
        return [source for each in self.tensors.values() for source in each]


class _Loading:
    """One checkpoint on its way into one decoder."""

    def __init__(
        self,
        decoder: Decoder,
        family: Family,
        folder: Path,
        sources: Sources | RandomSources,
        weight_format: WeightFormat | None,
        quantizer: Quantizer | None,
    ) -> None:
        self._decoder = decoder
        self._family = family
        self._folder = folder
        self._sources = sources
        self._format = weight_format
        self._quantizer = quantizer
        self._linears = decoder.projections()
        self._projections = {*self._linears, "project_in", "project_out"}
        # Few numbers, on which much depends: a checkpoint may have them in codes, no decoder does.
        self._kept_plain = {
            name.removesuffix(".weight")
            for name in decoder.weights.names()
            if name.endswith((".router.weight", ".shared_gate.weight"))
        }
        self._unexpected: list[str] = []
        self._missing: list[str] = []
        self._modules: dict[str, dict[str, _Module]] = {}  # by target, and by name

    def run(self) -> None:
        for source in self._sources.all:
            self._sort(source)
        self._settle_tied_head()
        freed = 0
        targets = dict.fromkeys(name.rpartition(".")[0] for name in self._decoder.weights.names())
        for target in [*targets, *(self._modules.keys() - targets.keys())]:
            for module in self._modules.get(target, {}).values():
                self._take(module)
                self._sources.done(module.sources)
            if f"{target}.weight" in self._decoder.weights:
                self._decoder.settle(target)
                freed += math.prod(self._decoder.weights.shape(f"{target}.weight"))
                makes_codes = self._format is not None or self._quantizer is not None
                if makes_codes and freed >= _RETURNED_AT_ONCE:
                    return_freed_memory()  # what was needed to make codes
                    freed = 0
        self._check()

    def _sort(self, source: Source) -> None:
        found = self._family.find(source.name)
        if found is None or (
            found.kind not in ("weight", "bias") and self._is_ignored(source.name)
        ):
            if not self._is_ignored(source.name):
                self._unexpected.append(source.name)
            self._sources.done([source])
            return
        modules = self._modules.setdefault(found.to.module, {})
        module = modules.setdefault(found.module, _Module(found.module, found.to))
        module.tensors.setdefault(found.kind, []).append(source)

    def _is_ignored(self, name: str) -> bool:
        return self._family.ignores(name) or _CACHE_SCALES.search(name) is not None

    # -- one module ------------------------------------------------------------------------------

    def _take(self, module: _Module) -> None:
        """Put everything of a module into its place, if the decoder has one."""
        target, weights = module.to.module, self._decoder.weights
        if f"{target}.weight" in weights.elsewhere and f"{target}.weight" not in weights:
            return  # the rank that has it sees what there is
        kinds = self._kinds(module)
        if kinds is not None:
            self._read_codes(module, kinds)
        for kind, sources in module.tensors.items():
            if kinds is not None and kind in kinds.required | kinds.optional:
                continue
            for source in sources:
                if kind in ("weight", "bias") and f"{target}.{kind}" in weights:
                    if kind == "weight" and self._quantize(module, source):
                        continue
                    self._fill(source, module.to, kind)
                elif f"{target}.{kind}" in weights.elsewhere:
                    continue  # a bias that another rank adds
                elif self._adds_nothing(module, kind, source, kinds):
                    continue
                elif not self._family.ignores(source.name):
                    self._unexpected.append(source.name)

    def _kinds(self, module: _Module) -> Kinds | None:
        """Say which tensors of a module are its codes; None: it is not quantized."""
        target = module.to.module
        if self._format is None or not (target in self._projections or target in self._kept_plain):
            return None
        kinds = self._format.kinds(module.name)
        if kinds is None or f"{module.to.module}.weight" not in self._decoder.weights:
            return None
        if "weight" in kinds.required or not module.tensors.keys() & kinds.required:
            # Whatever the configuration says: a module that has nothing but a plain weight is one.
            plain = module.tensors.get("weight")
            if plain and not module.tensors.keys() & (kinds.required | kinds.optional) - {"weight"}:
                return None if self._is_plain(plain[0]) else kinds
        return kinds

    def _is_plain(self, source: Source) -> bool:
        dtype = self._sources.tensor(source).dtype
        return dtype.is_floating_point and dtype.itemsize >= 2

    def _read_codes(self, module: _Module, kinds: Kinds) -> None:
        assert self._format is not None
        absent = sorted(kinds.required - module.tensors.keys())
        if absent:
            self._missing += [f"{module.name}.{kind}" for kind in absent]
            return
        named = {
            kind: sources
            for kind, sources in module.tensors.items()
            if kind in kinds.required | kinds.optional
        }
        for sources in named.values():
            if len(sources) > 1:
                raise self._error(sources[1], sources[1].name, "comes twice")
        name, part = f"{module.to.module}.weight", module.to.part
        weights = self._decoder.weights
        rows, columns = weights.part_shape(name, part)
        [first, *_] = [sources[0] for sources in named.values()]
        try:
            weight = self._format.read(
                module.name,
                {kind: self._sources.tensor(each[0]) for kind, each in named.items()},
                (rows, columns),
            )
            if module.to.layout == "grouped":
                weight = weight.select(self._linears[module.to.module].ungrouped_rows())
            if module.to.module in self._kept_plain:
                weights.fill(name, part, "plain", dequantize(weight))
            else:
                weights.put_codes(name, part, weight)
        except ModelLoadError as error:
            raise self._error(first, module.name, f": {error}") from None
        for [source] in named.values():
            self._release(source)

    def _quantize(self, module: _Module, source: Source) -> bool:
        """Make codes of a plain weight; False: it is to stay as it is."""
        weights, name = self._decoder.weights, f"{module.to.module}.weight"
        if self._quantizer is None:
            return False
        target = module.to.module
        is_tied = target == "embed" and self._decoder.spec.tie_word_embeddings
        if not is_tied and target not in self._linears:
            return False
        tensor = self._sources.tensor(source)
        try:
            weights.check(name, module.to.part, module.to.layout, tensor)
            plain = tensor.t() if module.to.layout == "transposed" else tensor
            if module.to.layout == "grouped":
                plain = plain[self._linears[target].ungrouped_rows()]
            parts = [module.to.part] if module.to.part else weights.parts(name)
            first = 0
            for part in parts:
                end = first + weights.part_shape(name, part)[0]
                whole = "lm_head" if is_tied else f"{target}.{part}" if part else target
                weight = self._quantizer.quantize(whole, plain[first:end].to(weights.device))
                if weight is not None:
                    weights.put_codes(name, part, weight)
                else:
                    weights.fill(name, part, "plain", plain[first:end])
                first = end
        except ModelLoadError as error:
            raise self._error(source, source.name, str(error)) from None
        del tensor, plain
        self._release(source)
        return True

    def _fill(self, source: Source, to: To, kind: str) -> None:
        tensor, weights = self._sources.tensor(source), self._decoder.weights
        try:
            weights.fill(
                f"{to.module}.{kind}", to.part, to.layout, tensor,
                partial(self._sources.release, source),
            )  # fmt: skip
        except ModelLoadError as error:
            raise self._error(source, source.name, str(error)) from None

    def _adds_nothing(
        self, module: _Module, kind: str, source: Source, kinds: Kinds | None
    ) -> bool:
        """Whether it is a bias of zeros, as tools write one for each module that they quantize."""
        if kind != "bias" or kinds is None:
            return False
        return not self._sources.tensor(source).count_nonzero()

    def _release(self, source: Source) -> None:
        tensor = self._sources.tensor(source)
        if tensor.dim():
            self._sources.release(source, 0, len(tensor))

    def _error(self, source: Source, name: str, what: str) -> ModelLoadError:
        space = "" if what.startswith(":") else " "
        return ModelLoadError(f"{source.path.name} in {self._folder}: {name!r}{space}{what}")

    # -- the output matrix -----------------------------------------------------------------------

    def _settle_tied_head(self) -> None:
        """Deal with an output matrix in a checkpoint whose configuration ties it.

        As in transformers: the same values are left out, values where the embedding has none
        serve both, and other values mean that the configuration is wrong.
        """
        decoder = self._decoder
        if not decoder.spec.tie_word_embeddings or "lm_head" not in self._modules:
            return
        [*others, head] = self._modules["lm_head"].values()
        embedding = next(iter(self._modules.get("embed", {}).values()), None)
        if not others and head.tensors.keys() == {"weight"}:
            source = head.tensors["weight"][0]
            if embedding is None:
                del self._modules["lm_head"]
                self._modules["embed"] = {head.name: replace(head, to=To("embed"))}
                return
            if "weight" in embedding.tensors and self._are_equal(
                embedding.tensors["weight"][0], source
            ):
                del self._modules["lm_head"]
                self._sources.done(head.sources)
                return
        logger.warning(
            "%s: tie_word_embeddings is true, but %r differs from the embedding; both are used",
            self._folder,
            head.sources[0].name,
        )
        decoder.untie()

    def _are_equal(self, embedding: Source, head: Source) -> bool:
        """Whether two tensors are the same to the decoder."""
        one, other = self._sources.tensor(embedding), self._sources.tensor(head)
        if one.shape != other.shape:
            return False
        dtype = self._decoder.weights.dtype
        for first in range(0, len(one), _ROWS_COMPARED):
            end = min(first + _ROWS_COMPARED, len(one))
            if not torch.equal(one[first:end].to(dtype), other[first:end].to(dtype)):
                return False
            self._sources.release(embedding, first, end)
            self._sources.release(head, first, end)
        return True

    # -- what is left over -----------------------------------------------------------------------

    def _check(self) -> None:
        missing = self._decoder.weights.missing()
        problems = []
        if missing or self._missing:
            names = dict.fromkeys(self._missing)
            known = {name.rpartition(".")[0] for name in names}
            for each in missing:
                name = self._name_of(*each)
                if name.rpartition(".")[0] not in known:
                    names |= dict.fromkeys(self._as_quantized(name))
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

    def _as_quantized(self, name: str) -> list[str]:
        """What a checkpoint would have in stead of this tensor."""
        module, _, kind = name.rpartition(".")
        found = self._family.find(name)
        if self._format is None or kind != "weight" or found is None:
            return [name]
        kinds = self._format.kinds(module) if found.to.module in self._projections else None
        return [name] if kinds is None else [f"{module}.{each}" for each in sorted(kinds.required)]

    def _name_of(self, parameter: str, part: str) -> str:
        """What a checkpoint would call this (part of a) parameter."""
        module, _, kind = parameter.rpartition(".")
        name = self._family.name_of(module, part)
        if name is None:
            return f"{parameter} ({part})" if part else parameter
        return f"{name}.{kind}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown}, ..." if len(names) > _NAMES_SHOWN else shown
