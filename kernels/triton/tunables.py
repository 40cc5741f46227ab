"""What can be tuned about each kernel: fields, what decides about them, and usual values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

Key: TypeAlias = dict[str, int | str]
Config: TypeAlias = dict[str, int]


class Entry(NamedTuple):
    """Values for some cases.

    Attributes
    ----------
    when : dict
        Numbers are the largest that the entry is for; texts have to be equal. What is not named may
        be anything.
    use : dict
        Some fields of the kernel or all.
    """

    when: Key
    use: Config

    def fits(self, key: Key) -> bool:
        """Whether the entry is for such a case."""
        return all(name in key and _fits(key[name], most) for name, most in self.when.items())


def _fits(value: int | str, most: int | str) -> bool:
    if isinstance(value, int) and isinstance(most, int):
        return value <= most
    return value == most


@dataclass(frozen=True)
class Tunable:
    """A kernel that can be tuned.

    Attributes
    ----------
    keys : dict
        What may decide, by name: int or str.
    fields : dict
        What can be chosen, and from what; values are names of the kernel's arguments, or
        ``num_warps`` and ``num_stages``.
    usual : tuple of Entry
        The first that fits decides; the last fits always and has all fields.
    """

    keys: dict[str, type[int] | type[str]]
    fields: dict[str, tuple[int, ...]]
    usual: tuple[Entry, ...]


_WARPS = (1, 2, 4, 8, 16)

TUNABLES: dict[str, Tunable] = {
    "norm": Tunable(
        keys={"size": int, "dtype": str},
        fields={"BLOCK": (1024, 2048, 4096, 8192, 16384), "num_warps": _WARPS},
        # BLOCK is what a program holds at once: of one long row, or of several short ones.
        usual=(
            Entry({"size": 256}, {"BLOCK": 1024, "num_warps": 4}),
            Entry({"size": 2048}, {"BLOCK": 2048, "num_warps": 4}),
            Entry({"size": 8192}, {"BLOCK": 8192, "num_warps": 8}),
            Entry({}, {"BLOCK": 16384, "num_warps": 16}),
        ),
    ),
    "rotary": Tunable(
        keys={"head_dim": int, "dtype": str},
        fields={"HEADS": (1, 2, 4, 8, 16, 32), "num_warps": _WARPS},
        usual=(
            Entry({"head_dim": 128}, {"HEADS": 8, "num_warps": 2}),
            Entry({}, {"HEADS": 4, "num_warps": 4}),
        ),
    ),
    "activation": Tunable(
        keys={"size": int, "dtype": str},
        fields={"BLOCK": (256, 512, 1024, 2048, 4096), "num_warps": _WARPS},
        usual=(
            Entry({"size": 256}, {"BLOCK": 256, "num_warps": 1}),
            Entry({}, {"BLOCK": 1024, "num_warps": 4}),
        ),
    ),
    "embedding": Tunable(
        keys={"size": int, "dtype": str},
        fields={"BLOCK": (256, 512, 1024, 2048, 4096), "num_warps": _WARPS},
        usual=(Entry({}, {"BLOCK": 1024, "num_warps": 4}),),
    ),
    "quantized_product": Tunable(
        keys={"rows": int, "outputs": int, "inputs": int, "kind": str, "dtype": str},
        fields={
            "ROWS": (16, 32, 64, 128),
            "OUTPUTS": (16, 32, 64, 128),
            "INPUTS": (32, 64, 128, 256),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5),
        },
        # Few rows are bound by the reading of codes: narrow tiles give more programs, which read
        # at the same time, and long ones whole lines of memory. Many are bound by the products.
        usual=(
            Entry(
                {"rows": 16, "dtype": "float32"},
                {"ROWS": 16, "OUTPUTS": 32, "INPUTS": 32, "num_warps": 4, "num_stages": 2},
            ),
            Entry(
                {"dtype": "float32"},
                {"ROWS": 32, "OUTPUTS": 64, "INPUTS": 32, "num_warps": 4, "num_stages": 2},
            ),
            Entry(
                {"rows": 16},
                {"ROWS": 16, "OUTPUTS": 32, "INPUTS": 128, "num_warps": 4, "num_stages": 3},
            ),
            Entry(
                {"rows": 32},
                {"ROWS": 32, "OUTPUTS": 64, "INPUTS": 128, "num_warps": 4, "num_stages": 3},
            ),
            Entry(
                {"rows": 128},
                {"ROWS": 64, "OUTPUTS": 64, "INPUTS": 64, "num_warps": 4, "num_stages": 3},
            ),
            Entry(
                {},
                {"ROWS": 128, "OUTPUTS": 128, "INPUTS": 64, "num_warps": 8, "num_stages": 3},
            ),
        ),
    ),
    # `rows` is the number of pairs of a token and an expert, divided by that of experts. Weights
    # are what is read where these are few, and narrow tiles give more programs to read them.
    "experts": Tunable(
        keys={"rows": int, "hidden": int, "inner": int, "dtype": str},
        fields={
            "ROWS": (16, 32, 64, 128),
            "UP_OUTPUTS": (16, 32, 64, 128),
            "DOWN_OUTPUTS": (16, 32, 64, 128, 256),
            "INPUTS": (32, 64, 128, 256),
            "num_warps": (2, 4, 8),
            "num_stages": (1, 2, 3, 4, 5),
        },
        usual=(
            Entry(
                {"dtype": "float32"},
                {
                    "ROWS": 16,
                    "UP_OUTPUTS": 32,
                    "DOWN_OUTPUTS": 64,
                    "INPUTS": 32,
                    "num_warps": 4,
                    "num_stages": 2,
                },
            ),
            Entry(
                {"rows": 16},
                {
                    "ROWS": 16,
                    "UP_OUTPUTS": 32,
                    "DOWN_OUTPUTS": 64,
                    "INPUTS": 128,
                    "num_warps": 4,
                    "num_stages": 4,
                },
            ),
            Entry(
                {"rows": 64},
                {
                    "ROWS": 64,
                    "UP_OUTPUTS": 64,
                    "DOWN_OUTPUTS": 128,
                    "INPUTS": 64,
                    "num_warps": 4,
                    "num_stages": 3,
                },
            ),
            Entry(
                {},
                {
                    "ROWS": 128,
                    "UP_OUTPUTS": 64,
                    "DOWN_OUTPUTS": 128,
                    "INPUTS": 64,
                    "num_warps": 8,
                    "num_stages": 3,
                },
            ),
        ),
    ),
}
"""By the name that `quire.kernels.triton.configs.config_for` is asked with."""
