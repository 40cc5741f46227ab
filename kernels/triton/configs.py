"""The tuning table: which block sizes a kernel runs with, by GPU and by case.

``configs/<GPU>.json`` has what was chosen for one GPU, `quire.kernels.triton.tunables` what is used
elsewhere. Nothing is tried out when a model is loaded or run: whoever measures makes a file, by
`candidates`, `trying` and `as_json`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from quire.kernels.selection import KernelError
from quire.kernels.triton.tunables import TUNABLES, Config, Entry, Key, Tunable

FOLDER_VARIABLE = "QUIRE_KERNEL_CONFIGS"
"""The environment's variable that names a folder of such files, looked into first."""

_FOLDER = Path(__file__).parent / "configs"

_tried: dict[str, Config] = {}


def config_for(kernel: str, device: torch.device, **key: int | str) -> Config:
    """Return what a kernel is to be run with.

    Parameters
    ----------
    kernel : str
        A name in `quire.kernels.triton.tunables.TUNABLES`.
    device : torch.device
    **key
        What decides: see the kernel's `Tunable`. Numbers that change from step to step are better
        rounded up (`bucket`), as answers are kept by them.

    Returns
    -------
    dict
        All fields, as keyword arguments of the kernel; not to be changed.

    Raises
    ------
    KernelError
        There is no such kernel or key; or the device's file is not right: it names the file,
        the field and the value.
    """
    if kernel in _tried:
        return {**_choose(kernel, device, **key), **_tried[kernel]}
    return _choose(kernel, device, **key)


def bucket(number: int) -> int:
    """Return the power of two that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()


@lru_cache(maxsize=8192)
def _choose(kernel: str, device: torch.device, **key: int | str) -> Config:
    tunable = _tunable(kernel)
    _check_key(kernel, tunable, key)
    usual = next(entry.use for entry in tunable.usual if entry.fits(key))
    entries = read_table(device_name(device)).get(kernel, ())
    return {**usual, **next((entry.use for entry in entries if entry.fits(key)), {})}


def _tunable(kernel: str) -> Tunable:
    try:
        return TUNABLES[kernel]
    except KeyError:
        raise KernelError(
            f"kernel {kernel!r} is not one that can be tuned: {', '.join(TUNABLES)}"
        ) from None


def _check_key(kernel: str, tunable: Tunable, key: Key) -> None:
    for name, value in key.items():
        if not isinstance(value, tunable.keys.get(name, ())):
            raise KernelError(
                f"kernel {kernel!r} is not tuned by {name}={value!r}; it is by "
                + ", ".join(f"{each} ({kind.__name__})" for each, kind in tunable.keys.items())
            )


@cache
def device_name(device: torch.device) -> str:
    """Return the name of a GPU, as its makers call it; of other devices, their type."""
    if device.type == "cpu":
        return "cpu"
    return str(torch.get_device_module(device).get_device_name(device))


def file_name(name: str) -> str:
    """Return the name of a device's file: what is no letter or digit becomes a line."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") + ".json"


@cache
def read_table(name: str) -> dict[str, tuple[Entry, ...]]:
    """Return the entries of a device's file, by kernel; empty where there is none.

    Raises
    ------
    KernelError
        Something in the file is not right.
    """
    folders = [_FOLDER]
    if own := os.environ.get(FOLDER_VARIABLE):
        folders.insert(0, Path(own))
        if not folders[0].is_dir():
            raise KernelError(
                f"{FOLDER_VARIABLE}={own!r} is no folder: it must be one with files such as "
                f"{file_name(name)}, or be left out"
            )
    for folder in folders:
        path = folder / file_name(name)
        if path.is_file():
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise KernelError(f"{path}: cannot be read: {error}") from None
            return parse_table(text, str(path))
    return {}


def parse_table(text: str, path: str) -> dict[str, tuple[Entry, ...]]:
    """Return the entries of a file, every one of them checked.

    Parameters
    ----------
    text : str
        ``{"device": ..., "kernels": {name: [{"when": {...}, "use": {...}}, ...]}}``; the first
        entry that fits a case decides about the fields that it names.
    path : str
        For messages.

    Raises
    ------
    KernelError
        It names the file, the field and the value.
    """
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KernelError(f"{path}: is no JSON: {error}") from None
    _check(path, "file", read, isinstance(read, dict), "an object")
    for name in read:
        _check(path, "field", name, name in ("device", "note", "kernels"), "device, note, kernels")
    kernels = read.get("kernels")
    _check(path, "kernels", kernels, isinstance(kernels, dict), "an object")
    return {
        kernel: tuple(_parse_entries(path, kernel, entries)) for kernel, entries in kernels.items()
    }


def _parse_entries(path: str, kernel: str, entries: Any) -> Iterator[Entry]:
    place = f"kernels.{kernel}"
    _check(path, place, kernel, kernel in TUNABLES, f"one of {', '.join(TUNABLES)}")
    tunable = TUNABLES[kernel]
    _check(path, place, entries, isinstance(entries, list), "a list")
    for i, entry in enumerate(entries):
        here = f"{place}[{i}]"
        right = isinstance(entry, dict) and set(entry) == {"when", "use"}
        right = right and all(isinstance(each, dict) for each in entry.values())
        _check(path, here, entry, right, 'an object of the objects "when" and "use"')
        for name, value in entry["when"].items():
            kind = tunable.keys.get(name)
            _check(
                path, f"{here}.when", name, kind is not None, f"one of {', '.join(tunable.keys)}"
            )
            # True is an int, too.
            right = kind is not None and type(value) is kind and value not in (0, "")
            _check(path, f"{here}.when.{name}", value, right, f"of type {kind and kind.__name__}")
        for name, value in entry["use"].items():
            choices = tunable.fields.get(name, ())
            fields = ", ".join(tunable.fields)
            _check(path, f"{here}.use", name, name in tunable.fields, f"one of {fields}")
            right = type(value) is int and value in choices
            allowed = ", ".join(map(str, choices))
            _check(path, f"{here}.use.{name}", value, right, f"one of {allowed}")
        yield Entry(entry["when"], entry["use"])


def _check(path: str, field: str, value: Any, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise KernelError(f"{path}: {field} is {value!r}; it must be {wanted}")


def candidates(kernel: str, **key: int | str) -> list[Config]:
    """Return what is worth measuring for a case: every combination of the kernel's choices.

    Sizes of blocks beyond the next power of two of what they divide are left out.

    Parameters
    ----------
    kernel, **key
        As for `config_for`.

    Raises
    ------
    KernelError
        There is no such kernel or key.
    """
    tunable = _tunable(kernel)
    _check_key(kernel, tunable, key)
    bounds = {"ROWS": "rows", "OUTPUTS": "outputs", "INPUTS": "inputs", "BLOCK": "size"}

    def choices(field: str) -> list[int]:
        most = key.get(bounds.get(field, ""))
        values = tunable.fields[field]
        if not isinstance(most, int):
            return list(values)
        return [value for value in values if value <= max(bucket(most), values[0])]

    fields = list(tunable.fields)
    return [
        dict(zip(fields, chosen, strict=True))
        for chosen in itertools.product(*(choices(field) for field in fields))
    ]


@contextmanager
def trying(kernel: str, config: Config) -> Iterator[None]:
    """Run a kernel with such values, whatever the tables say: for who measures, in one thread."""
    before = dict(_tried)
    _tried[kernel] = config
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


def as_json(device: str, found: dict[str, list[tuple[Key, Config]]], note: str = "") -> str:
    """Return the text of a file, to be written as `file_name` of the device says.

    Parameters
    ----------
    device : str
        As `device_name` says.
    found : dict
        For each kernel, cases and what they are to be run with. Of two cases the narrower has to
        come first.
    note : str
        Where the values come from.

    Raises
    ------
    KernelError
        A kernel, a case or a value is not right.
    """
    # One line for an entry.
    kernels = ",\n".join(
        f"  {json.dumps(kernel)}: [\n"
        + ",\n".join(f"   {json.dumps({'when': key, 'use': use})}" for key, use in entries)
        + "\n  ]"
        for kernel, entries in found.items()
    )
    head = f'{{\n "device": {json.dumps(device)},\n "note": {json.dumps(note)},\n'
    text = f'{head} "kernels": {{\n{kernels}\n }}\n}}\n'
    parse_table(text, file_name(device))
    return text
