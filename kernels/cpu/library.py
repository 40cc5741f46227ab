"""The shared library with the CPU's kernels: found, loaded, and its functions typed."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from quire.kernels.cpu import structs
from quire.kernels.cpu.sources import hash_of

_FUNCTIONS = {
    "quire_sources": (c_char_p, ()),
    "quire_isa": (c_char_p, ()),
    "quire_isas": (c_char_p, ()),
    "quire_choose_isa": (c_int, (c_char_p,)),
    "quire_pack": (c_int, (c_void_p, c_int64, c_int64, c_int32, c_void_p, c_int)),
    "quire_measure": (None, (POINTER(structs.Mixture),)),
    "quire_pack_copies": (None, (POINTER(structs.Packing), c_int64)),
    "quire_pack_codes": (c_int, (POINTER(structs.CodesPacking), c_int)),
    "quire_unpack_codes": (c_int, (POINTER(structs.CodesPacking), c_int)),
    "quire_context_new": (c_void_p, ()),
    "quire_context_free": (None, (c_void_p,)),
    "quire_forward": (c_int, (c_void_p, POINTER(structs.Model), POINTER(structs.Batch), c_int)),
    "quire_logits": (
        c_int,
        (c_void_p, POINTER(structs.Model), c_void_p, c_int64, c_void_p, c_void_p, c_int),
    ),
    "quire_likeliest": (
        c_int,
        (
            c_void_p,
            POINTER(structs.Model),
            c_void_p,
            c_void_p,
            c_int64,
            c_void_p,
            c_void_p,
            c_void_p,
            c_int,
        ),
    ),
    "quire_argmax": (c_int, (c_void_p, POINTER(structs.Logits), c_void_p, c_void_p, c_int)),
    "quire_draw": (
        c_int,
        (c_void_p, POINTER(structs.Logits), POINTER(structs.Draw), c_void_p, c_int),
    ),
    "quire_penalize": (None, (c_void_p, c_int64, POINTER(structs.Penalties))),
    "quire_mask": (
        None,
        (c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int64),
    ),
    "quire_top": (
        c_int,
        (c_void_p, POINTER(structs.Logits), c_int64, c_void_p, c_void_p, c_int),
    ),
    "quire_log_probabilities": (
        c_int,
        (
            c_void_p,
            POINTER(structs.Logits),
            c_void_p,
            c_int64,
            c_void_p,
            c_void_p,
            c_void_p,
            c_int,
        ),
    ),
    "quire_shared_size": (c_int64, (POINTER(structs.SharedSizes),)),
    "quire_shared_init": (None, (c_void_p, POINTER(structs.SharedSizes))),
    "quire_shared_sizes": (c_int, (c_void_p, c_int64, POINTER(structs.SharedSizes))),
    "quire_shared_fail": (None, (c_void_p, c_int32, c_char_p)),
    "quire_shared_failure": (c_int, (c_void_p, POINTER(c_int32), c_char_p, c_int64)),
    "quire_comm_new": (c_void_p, (c_void_p, c_int32, c_int32, c_double)),
    "quire_comm_free": (None, (c_void_p,)),
    "quire_comm_base": (c_void_p, (c_void_p,)),
    "quire_comm_counters": (None, (c_void_p, POINTER(structs.CommCounters))),
    "quire_comm_reduce": (c_int, (c_void_p, c_void_p, c_int64)),
    "quire_comm_gather": (c_int, (c_void_p, c_void_p, c_int64, c_void_p)),
    "quire_comm_send": (c_int, (c_void_p, c_void_p, c_int64)),
    "quire_comm_receive": (c_int, (c_void_p, c_void_p, c_int64)),
}


class LibraryError(RuntimeError):
    """There is no library, or it is not the one that belongs to this package."""


@cache
def load_library() -> ctypes.CDLL:
    """Return the library, loaded once.

    The file lies beside this one. QUIRE_NATIVE_LIBRARY names another, such as one that was built
    with a sanitizer.

    Raises
    ------
    LibraryError
        It was not built, cannot be loaded, or was built from other sources.
    """
    path = _find()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{path} cannot be loaded: {error}") from error
    stale = LibraryError(
        f"{path} was built from other sources: install quire again, or, in a checkout, "
        "`python setup.py build_ext --inplace`"
    )
    try:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError:
        raise stale from None
    # They are in a checkout; an installed package has the library that was built with it.
    sources = Path(__file__).parent / "native"
    if sources.is_dir() and library.quire_sources().decode() != hash_of(sources):
        raise stale
    return library


def _find() -> Path:
    named = os.environ.get("QUIRE_NATIVE_LIBRARY")
    if named:
        return Path(named)
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_native{suffix}"
        if path.exists():
            return path
    raise LibraryError(
        "the native CPU kernels were not built: install a C++20 compiler (on Debian and Ubuntu, "
        "g++) and install quire again"
    )
