"""Quantizations of other packages, by entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint

import pytest

from quire.errors import ModelLoadError
from quire.quantization import registry
from quire.quantization.on_load import QUANTIZERS
from quire.quantization.registry import Quantization

Offer = Callable[[object], None]


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Offer]:
    """Pretend that a package with such an entry point is installed."""

    def install(found: object) -> None:
        def load(point: EntryPoint) -> object:
            if isinstance(found, Exception):
                raise found
            return found

        points = [EntryPoint("mine", "package:it", registry.ENTRY_POINT_GROUP)]
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        monkeypatch.setattr(EntryPoint, "load", load)
        registry._installed.cache_clear()

    yield install
    monkeypatch.undo()
    registry._installed.cache_clear()


def test_a_quantization_of_a_package_is_found_by_its_name(offer: Offer) -> None:
    """As the built-in ones are, while loading."""
    made = QUANTIZERS["int8"](None)
    offer(Quantization("mine", make=lambda options: made))
    assert "mine" in registry.on_load_names()
    assert registry.quantizer_of("mine", None) is made


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (ImportError("no such thing"), r"'mine' \(package:it\).*no such thing"),
        (7, "'mine' of 'quire.quantizations' is a int; it must be a .*Quantization"),
    ],
)
def test_a_package_that_offers_something_else_is_named(
    offer: Offer, found: object, message: str
) -> None:
    offer(found)
    with pytest.raises(ModelLoadError, match=message):
        registry.quantizer_of("mine", None)
