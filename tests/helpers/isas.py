"""The native library's instruction sets: those of this machine, and those that were emulated.

A pytest plugin (registered in tests/conftest.py) with one fixture, ``isa``: the name of each in
turn, in use for the time of the test. A library that was built with QUIRE_EMULATE_ISAS=1, or with
sanitizers, also has those that this machine cannot run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def instruction_sets() -> list[str]:
    """Return the names of all that the library can run here, the best first."""
    from quire.kernels import available_backends, get_backend

    if "cpu" not in available_backends():
        return []
    names: bytes = get_backend("cpu", "cpu").library.quire_isas()
    return names.decode().split()


def rounds_activations(isa: str) -> bool:
    """Whether it rounds activations to bfloat16 where weights are."""
    return isa.startswith(("amx", "avx512bf16"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``isa`` with each of them."""
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", instruction_sets(), indirect=True)


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run native kernels by that instruction set."""
    from quire.kernels import get_backend

    library = get_backend("cpu", "cpu").library
    before = library.quire_isa()
    assert library.quire_choose_isa(name.encode()) == 0
    try:
        yield
    finally:
        library.quire_choose_isa(before)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that the library can run here."""
    with use_isa(request.param):
        yield request.param
