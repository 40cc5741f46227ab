"""convert: a plain model folder in, a quantized one out, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quire.converter.rounds import Rounds
from quire.converter.shards import ShardWriter
from quire.converter.source import Module, Source
from quire.converter.targets import GROUP_SIZES, WHOLE, Target
from quire.converter.texts import USUAL_TEXTS
from quire.errors import ConfigError, ModelLoadError, QuireError, UnsupportedModelError
from quire.kernels.quantized import QuantizedWeight
from quire.models.hub import BESIDE_WEIGHTS
from quire.quantization.compressed_tensors_config import Scheme
from quire.quantization.pack.compressed_tensors import scheme_of

SHARD_BYTES = 4 << 30
"""Of a weight file, at most."""

_NOT_COPIED = ("config.json", "*.index.json")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")

Advance = Callable[[int, int], None]
"""Told how many projections are done, and of how many."""


@dataclass(frozen=True)
class Summary:
    """What came of it.

    Attributes
    ----------
    folder
        The new one.
    num_modules
        Projections in codes.
    codes_before, codes_after
        Their bytes in the old and in the new folder, scales and all.
    plain_before, plain_after
        Bytes of everything else.
    group_size
        None: one scale per output.
    num_tokens
        That the model was run on.
    seconds
    """

    folder: Path
    num_modules: int
    codes_before: int
    codes_after: int
    plain_before: int
    plain_after: int
    group_size: int | None
    num_tokens: int
    seconds: float


def convert(
    source: Path,
    out: Path,
    target: Target,
    *,
    texts: Sequence[str] = (),
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    advance: Advance | None = None,
) -> Summary:
    """Write a quantized folder of a plain one.

    Embedding, output matrix and norms stay as they are. No more than one layer is in memory.

    Parameters
    ----------
    source
        The plain model's folder.
    out
        The new folder; its parent is there.
    target
        What to make.
    texts
        What the model is run on, if the target looks at inputs; none: `USUAL_TEXTS`.
    overwrite
        Whether a folder `out` with something in it is replaced.
    shard_bytes
        Of a weight file, at most.
    advance
        Told of the progress.

    Raises
    ------
    ConfigError
        `out` cannot be written, or an option does not fit the model.
    UnsupportedModelError
        The model is quantized already, or readers of the format would not know it.
    ModelLoadError
        The checkpoint is damaged, or has values that cannot be rounded.
    """
    began = time.monotonic()
    place = _checked_out(source, out, overwrite)
    with Source(source) as plain, _replacing(source, place, overwrite) as folder:
        group_size = _group_size(plain, target)
        _check_modules(plain, target)
        prompts = _prompts(plain, texts or USUAL_TEXTS) if target.needs_inputs else []
        rounds = Rounds(plain, target, group_size, prompts)
        made = _Making(plain, target, folder, shard_bytes)
        with made.writer:
            modules = plain.modules()
            for done, (module, weight) in enumerate(rounds.run(), 1):
                made.write_codes(module, weight)
                if advance is not None:
                    advance(done, len(modules))
            codes = made.writer.num_bytes
            made.write_plain(rounds.changed)
            made.writer.finish()
        _write_config(plain, folder, target.config(made.schemes, group_size, made.plain), target)
        _copy_others(source, folder)
        summary = Summary(
            folder=out,
            num_modules=len(modules),
            codes_before=made.codes_before,
            codes_after=codes,
            plain_before=made.plain_before,
            plain_after=made.writer.num_bytes - codes,
            group_size=group_size if target.has_groups and group_size != WHOLE else None,
            num_tokens=sum(map(len, prompts)),
            seconds=time.monotonic() - began,
        )
    return summary


class _Making:
    """The tensors of one new folder."""

    def __init__(self, source: Source, target: Target, folder: Path, shard_bytes: int) -> None:
        self._source = source
        self._target = target
        self._dtype = source.dtype()
        self.plain = source.plain_modules()
        self.schemes: dict[str, Scheme] = {}
        self.codes_before = self.plain_before = 0
        # Codes are under several names each, none of them longer than this.
        kept = [name for name in source.places for _ in range(5)]
        self.writer = ShardWriter(folder, kept, shard_bytes)

    def write_codes(self, module: Module, weight: QuantizedWeight) -> None:
        if self._target.name not in ("awq", "gptq"):
            self.schemes[module.name] = scheme_of(weight)
        for kind, tensor in self._target.tensors(weight, self._dtype).items():
            self.writer.write(f"{module.name}.{kind}", tensor)

    def write_plain(self, changed: dict[str, torch.Tensor]) -> None:
        files = self._source.files
        matrices = {f"{module.name}.weight" for module in self._source.modules()}
        for name in self._source.places:
            tensor = files.tensor(name)
            if name in matrices:
                self.codes_before += tensor.nbytes
                continue
            self.plain_before += tensor.nbytes
            dtype = self._target.plain_dtype(tensor.dtype)
            self.writer.write(name, _converted(name, changed.get(name, tensor), dtype))
            del tensor
            files.release(name)


def _converted(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype == dtype:
        return tensor
    made = tensor.to(dtype)
    if not made.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        raise ModelLoadError(
            f"{name!r} has values up to {tensor.abs().max().item():g}, which {kind} cannot hold; "
            "AWQ and GPTQ are read in it. --to int4 keeps the type that there is"
        )
    return made


def _checked_out(source: Path, out: Path, overwrite: bool) -> Path:
    """Return where the new folder goes, with a name of its own: ``.`` and ``..`` have none."""
    try:
        place = out.resolve() if out.name in ("", "..") else out.absolute()
        _check_out(source, place, overwrite)
    except OSError as error:
        raise ConfigError(f"--out is {str(out)!r}, which cannot be read: {error}") from error
    return place


def _check_out(source: Path, out: Path, overwrite: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"--out is {str(out)!r}, which is no folder; give a new name")
    if not out.parent.is_dir():
        raise ConfigError(f"--out is {str(out)!r}, and there is no folder {str(out.parent)!r}")
    if out.is_dir():
        inside, outside = out.resolve(), source.resolve()
        if inside == outside or inside in outside.parents:
            raise ConfigError(f"--out is {str(out)!r}, where the plain model is; give another")
        if any(out.iterdir()) and not overwrite:
            raise ConfigError(
                f"--out is {str(out)!r}, which is there and not empty; --overwrite replaces it"
            )
        if any(out.iterdir()) and not (out / "config.json").is_file():
            raise ConfigError(
                f"--out is {str(out)!r}, which is no model's folder: it has no config.json, and "
                "nothing else is replaced"
            )


@contextmanager
def _replacing(source: Path, out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its place if all goes well, and is gone if not."""
    try:
        made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part"))
    except OSError as error:
        raise ConfigError(f"--out is {str(out)!r}, which cannot be written: {error}") from error
    try:
        yield made
        # As a folder that was made in the usual way: a temporary one is its owner's alone.
        mask = os.umask(0o077)
        os.umask(mask)
        made.chmod(0o777 & ~mask)
        # Again: making it took a while, and somebody else may have put something there.
        _check_out(source, out, overwrite)
        if out.is_dir() and any(out.iterdir()):
            _exchange(made, out)
        else:
            made.rename(out)
    except BaseException as error:
        shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, QuireError):
            raise ConfigError(f"--out is {str(out)!r}, which was not made: {error}") from error
        raise


def _exchange(made: Path, out: Path) -> None:
    """Put a folder in another's place; the other stays where that fails."""
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".old"))
    try:
        out.rename(old)
    except BaseException:
        old.rmdir()
        raise
    try:
        made.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _check_modules(source: Source, target: Target) -> None:
    for module in source.modules():
        if module.layout == "transposed":
            raise UnsupportedModelError(
                f"{source.spec.architecture} has its weights as [in, out] ({module.name}), and "
                f"readers of {target.name} folders look for linear layers; it can be quantized "
                "while it is loaded (quantization=)"
            )
        rows, columns = source.shape(module)
        if target.name in ("awq", "gptq") and (rows % 8 or columns % 8):
            raise UnsupportedModelError(
                f"{module.name} is [{rows}, {columns}]; {target.name} packs eight values into a "
                "word and needs multiples of 8. --to int4 or --to int8 take it"
            )


def _group_size(source: Source, target: Target) -> int:
    if not target.has_groups or target.group_size == WHOLE:
        return WHOLE
    widths = {source.shape(module)[1]: module.name for module in source.modules()}
    fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
    if target.group_size is None and fitting:
        return fitting[0]
    size = target.group_size or GROUP_SIZES[-1]
    for width, name in widths.items():
        if width % size:
            better = " or ".join(map(str, (*fitting, WHOLE)))
            raise ConfigError(
                f"--group-size {size} does not divide the {width} inputs of {name}; {better} "
                "(one scale per output) would do"
            )
    return size


def _prompts(source: Source, texts: Sequence[str]) -> list[list[int]]:
    from quire.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source.folder, model_config=source.config)
    return [ids for text in texts if (ids := tokenizer.encode(text))]


def _write_config(
    source: Source, folder: Path, quantization: dict[str, Any], target: Target
) -> None:
    config = {**source.raw_config, "quantization_config": quantization}
    stored = source.dtype()
    if (plain := target.plain_dtype(stored)) != stored:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = str(plain).removeprefix("torch.")
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _copy_others(source: Path, folder: Path) -> None:
    """Copy what belongs to the model and is neither weights nor code."""
    for file in sorted(source.iterdir()):
        wanted = any(file.match(each) for each in (*BESIDE_WEIGHTS, *_LICENCES))
        if wanted and file.is_file() and not any(file.match(each) for each in _NOT_COPIED):
            shutil.copyfile(file, folder / file.name)
