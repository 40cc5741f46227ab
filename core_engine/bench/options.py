"""The options that several subcommands share, and what is made of them."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.bench.chart import why_not
from quire.bench.checkpoint import DIMENSIONS, random_checkpoint
from quire.bench.gguf import KINDS, TYPES, gguf_file
from quire.bench.record import Entry
from quire.models.hf_config import read_config
from quire.models.hub import resolve
from quire.utils.threads import count_threads

PEERS = ("transformers", "vllm", "llama-cpp")

Model = Annotated[
    str | None, typer.Option(help="A checkpoint to measure with; else --random makes one.")
]
Random = Annotated[
    str, typer.Option(help=f"Dimensions of the random checkpoint: {', '.join(DIMENSIONS)}.")
]
Dtype = Annotated[str, typer.Option(help="Of the weights: bfloat16, float32 or float16.")]
Vs = Annotated[
    str,
    typer.Option(help=f"Peers to measure beside: {', '.join(PEERS)}, several with commas; none."),
]
PeerPython = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[PEER=]PATH",
        help="The interpreter of an environment that has the peer, or all peers; "
        "quire need not be there.",
    ),
]
PeerEnv = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="An environment variable for the peers' processes."),
]
GgufType = Annotated[
    str | None,
    typer.Option(
        help=f"Of llama-cpp's weights: {', '.join(KINDS)}.",
        show_default="as --dtype",
    ),
]
Repeats = Annotated[int, typer.Option(min=1, help="Counted runs per side.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn for the prompts.")]


def _writable(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before hours are spent on its content."""
    if path is not None:
        is_new = not path.exists()
        try:
            with path.open("ab"):
                pass
            if is_new:
                path.unlink()
        except OSError as error:
            raise typer.BadParameter(f"{path}: no file can be written there: {error}") from error
    return path


def _drawable(path: Path | None) -> Path | None:
    if path is not None and (reason := why_not(path)) is not None:
        raise typer.BadParameter(reason)
    return _writable(path)


Json = Annotated[
    Path | None,
    typer.Option("--json", callback=_writable, help="Write all figures to this file."),
]
Chart = Annotated[
    Path | None,
    typer.Option(
        callback=_drawable, metavar="FILE.png", help="Draw the sides' speeds into this file."
    ),
]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is measured with.

    Attributes
    ----------
    name : str
        As it was asked for.
    folder : Path
    config : dict
        Its ``config.json``.
    """

    name: str
    folder: Path
    config: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Rows of its embedding."""
        return int(self.config["vocab_size"])


def find_checkpoint(model: str | None, random: str, dtype: str) -> Checkpoint:
    """Return the model that is asked for, or make the random one."""
    if model is None:
        if random not in DIMENSIONS:
            raise typer.BadParameter(f"--random {random!r}: one of {', '.join(DIMENSIONS)}")
        folder, name = random_checkpoint(random, dtype), f"random {random}, {dtype}"
    else:
        folder, name = resolve(model), f"{model}, {dtype}"
    return Checkpoint(name, folder, read_config(folder))


@dataclass(frozen=True, slots=True)
class Peers:
    """Who is measured beside quire, and where.

    Attributes
    ----------
    names : list of str
        Some of `PEERS`.
    pythons : dict of str to str
        The interpreter of each.
    environment : dict of str to str
        Variables that all of them get.
    gguf_type : str
        Of the matrices in llama.cpp's file.
    """

    names: list[str]
    pythons: dict[str, str]
    environment: dict[str, str]
    gguf_type: str

    @classmethod
    def parse(
        cls,
        vs: str,
        pythons: list[str] | None,
        environment: list[str] | None,
        gguf_type: str | None,
        dtype: str,
    ) -> Peers:
        """Read the options; what is wrong with one is an error of usage."""
        if dtype not in TYPES:
            raise typer.BadParameter(f"--dtype {dtype!r}: one of {', '.join(TYPES)}")
        names = [name.strip() for name in vs.split(",") if name.strip() not in ("", "none")]
        for name in names:
            if name not in PEERS:
                raise typer.BadParameter(f"--vs {name!r}: one of {', '.join(PEERS)}, none")
        kind = gguf_type or TYPES[dtype]
        if kind not in KINDS:
            raise typer.BadParameter(f"--gguf-type {kind!r}: one of {', '.join(KINDS)}")
        if gguf_type is not None and "llama-cpp" not in names:
            raise typer.BadParameter(f"--gguf-type {kind!r} is for --vs llama-cpp")
        if environment and not names:
            raise typer.BadParameter(f"--peer-env {environment[0]!r}: --vs names no peer")
        places = dict.fromkeys(PEERS, sys.executable)
        places |= _read_pythons(pythons or [], names)
        variables = dict(_assignment(text) for text in environment or ())
        return cls(list(dict.fromkeys(names)), places, variables, kind)

    def entries(
        self, checkpoint: Checkpoint, dtype: str, vllm_options: dict[str, Any] | None = None
    ) -> list[Entry]:
        """Return the peers as they take part with a model; writes a GGUF file if need be.

        Parameters
        ----------
        checkpoint : Checkpoint
        dtype : str
        vllm_options : dict, optional
            Further arguments of ``vllm.LLM``.
        """
        made = []
        for name in self.names:
            label, model = name, str(checkpoint.folder)
            options: dict[str, Any] = {"dtype": dtype}
            if name == "vllm":
                options |= vllm_options or {}
            elif name == "llama-cpp":
                label = f"{name} {self.gguf_type}"
                model = str(gguf_file(checkpoint.folder, self.gguf_type))
                options = {"num_threads": count_threads()}
            made.append(Entry(label, name, model, options, self.pythons[name], self.environment))
        return made


def _read_pythons(texts: list[str], peers: list[str]) -> dict[str, str]:
    """Return the interpreter of each peer that has one; one without a name is for all others."""
    found: dict[str, str] = {}
    for text in texts:
        peer, equals, path = text.partition("=")
        if not (equals and peer in PEERS):
            peer, path = "", text
        if shutil.which(path) is None:
            raise typer.BadParameter(f"--peer-python {text!r}: {path!r} is no program")
        if peer in found:
            raise typer.BadParameter(f"--peer-python {text!r}: {peer or 'a path'} is given twice")
        if not peers or (peer and peer not in peers):
            raise typer.BadParameter(f"--peer-python {text!r}: --vs names no {peer or 'peer'}")
        found[peer] = path
    general = found.pop("", None)
    return {**({} if general is None else dict.fromkeys(PEERS, general)), **found}


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"--peer-env takes NAME=VALUE, not {text!r}")
    return name, value
