"""A backend is chosen once per device, by name or by priority, and offers every operation."""

from __future__ import annotations

import inspect
from importlib.metadata import EntryPoint
from typing import Protocol

import pytest
import torch

from quire import kernels
from quire.kernels import Backend, KernelError, available_backends, get_backend, selection
from quire.kernels.reference.backend import ReferenceBackend

BUILT_IN = available_backends()


class Faster(ReferenceBackend):
    """An out-of-tree backend for one kind of device."""

    name = "faster"
    priority = 20

    @staticmethod
    def supports(device: torch.device) -> bool:
        return device.type == "cpu"


@pytest.fixture
def plugins(monkeypatch):
    """Let `get_backend` find given entry points, and forget what it chose."""

    def install(**values: str) -> None:
        points = [
            EntryPoint(name, value, selection.ENTRY_POINT_GROUP) for name, value in values.items()
        ]
        monkeypatch.setattr(selection, "entry_points", lambda group: points)
        monkeypatch.setattr(EntryPoint, "load", lambda self: {"here:Faster": Faster}[self.value])

    selection._choose.cache_clear()
    selection._load.cache_clear()
    yield install
    selection._choose.cache_clear()
    selection._load.cache_clear()


def operations() -> list[str]:
    contract = (each for each in (Backend, *Backend.__bases__) if each is not Protocol)
    return [name for each in contract for name in vars(each) if not name.startswith("_")]


@pytest.mark.parametrize("operation", operations())
def test_every_operation_is_there_as_documented(backend, operation):
    """The interface is the contract: same parameters, same defaults."""
    documented = inspect.getattr_static(Backend, operation)
    assert inspect.getdoc(documented)
    if callable(documented):
        wanted = list(inspect.signature(documented).parameters.values())[1:]
        given = inspect.signature(getattr(backend, operation)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in given] == [
            (p.name, p.kind, p.default) for p in wanted
        ]


def test_the_same_object_serves_a_device():
    """Chosen once: the choice is the same for a device and its name."""
    assert get_backend() is get_backend("cpu") is get_backend(torch.device("cpu"))


def test_a_backend_of_higher_priority_wins_where_it_works(plugins):
    """And only there; by name, the reference backend remains."""
    plugins(faster="here:Faster")
    assert available_backends() == [*BUILT_IN, "faster"]
    assert get_backend("cpu").name == "faster"
    assert get_backend("meta").name == "reference"
    assert get_backend("cpu", "reference").name == "reference"
    with pytest.raises(KernelError, match=r"'faster' does not support device 'meta'.*reference"):
        get_backend("meta", "faster")


def test_the_environment_may_name_the_backend(monkeypatch):
    """QUIRE_KERNELS decides where the program does not, and a wrong name is no silent default."""
    monkeypatch.setenv("QUIRE_KERNELS", "reference")
    assert get_backend("cpu").name == "reference"
    monkeypatch.setenv("QUIRE_KERNELS", "fastest")
    with pytest.raises(KernelError, match="'fastest' is unknown"):
        get_backend("cpu")
    assert get_backend("cpu", "reference").name == "reference"


def test_an_unknown_backend_is_named_with_those_there_are(plugins):
    """The message says what would be right."""
    plugins(faster="here:Faster")
    with pytest.raises(KernelError, match=r"'fastest' is unknown; available: reference.*, faster"):
        get_backend("cpu", "fastest")


def test_a_backend_that_cannot_be_loaded_is_named(plugins):
    """Not passed over in silence."""
    plugins(slower="here:Gone")
    with pytest.raises(KernelError, match=r"'slower' \(here:Gone\) could not be loaded"):
        get_backend("cpu")


def test_an_unknown_name_is_an_attribute_error():
    """As of any module."""
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        _ = kernels.flash
    assert set(dir(kernels)) >= {"get_backend", "Backend"}
