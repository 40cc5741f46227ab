"""What manuals of Outlines 0.x import, put into the Outlines that is installed, and taken out."""

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType
from typing import Any, Final, NamedTuple

from quire.integrations.outlines.generators import is_llm

_MODELS: Final = "quire.integrations.outlines.models"
_MISSING: Final = object()


class _Change(NamedTuple):
    """One entry of a namespace: what it was, and what it was made."""

    namespace: dict[str, Any]
    name: str
    before: Any
    after: Any


class _Installed(NamedTuple):
    changes: list[_Change]
    module: ModuleType
    plain: type
    callable: type


_LOCK = threading.Lock()
_installed: _Installed | None = None


def install() -> None:
    """Give the installed ``outlines`` what it had before 1.0, on quire's engine.

    ``outlines.generate`` and ``outlines.samplers`` are those of this package.
    ``outlines.models.vllm`` stays the module that it is, and can be called with a model's name.
    ``outlines.models.VLLM`` makes a model of a :class:`quire.LLM`; of a server's client it makes
    what it made before. Calling it again changes nothing.

    Raises
    ------
    ImportError
        There is no Outlines, or one before 1.0, which has all this itself.
    """
    global _installed
    with _LOCK:
        if _installed is not None:
            return
        try:
            outlines = importlib.import_module("outlines")
        except ModuleNotFoundError as error:
            if error.name != "outlines":
                raise
            raise ImportError("this needs Outlines: pip install outlines") from error
        models = importlib.import_module("outlines.models")
        vllm = vars(models).get("vllm")
        if not isinstance(vllm, ModuleType) or not isinstance(vars(vllm).get("VLLM"), type):
            raise ImportError(
                "this needs Outlines 1.x, and the one installed has an outlines.models.vllm of "
                "another kind"
            )
        generate = importlib.import_module("quire.integrations.outlines.generate")
        samplers = importlib.import_module("quire.integrations.outlines.samplers")
        model_class = _model_class(vars(vllm)["VLLM"])
        changes = [
            _changed(vars(outlines), "generate", generate),
            _changed(vars(outlines), "samplers", samplers),
            _changed(sys.modules, "outlines.generate", generate),
            _changed(sys.modules, "outlines.samplers", samplers),
            _changed(vars(models), "VLLM", model_class),
            _changed(vars(vllm), "VLLM", model_class),
        ]
        plain = type(vllm)
        callable_class = type("CallableModule", (plain,), {"__call__": _load})
        vllm.__class__ = callable_class
        _installed = _Installed(changes, vllm, plain, callable_class)


def uninstall() -> None:
    """Take back what :func:`install` did; without it, nothing.

    What somebody else has put in the same place since then stays.
    """
    global _installed
    with _LOCK:
        if _installed is None:
            return
        for change in _installed.changes:
            if change.namespace.get(change.name) is not change.after:
                continue
            if change.before is _MISSING:
                del change.namespace[change.name]
            else:
                change.namespace[change.name] = change.before
        if type(_installed.module) is _installed.callable:
            _installed.module.__class__ = _installed.plain
        _installed = None


def _changed(namespace: dict[str, Any], name: str, value: Any) -> _Change:
    change = _Change(namespace, name, namespace.get(name, _MISSING), value)
    namespace[name] = value
    return change


def _load(module: ModuleType, model_name: str, **vllm_model_params: Any) -> Any:
    """Load a model, as ``outlines.models.vllm(name)`` did."""
    return importlib.import_module(_MODELS).vllm(model_name, **vllm_model_params)


def _model_class(upstream: type) -> type:
    """Return a class that is called for upstream's objects and for ours, and knows both.

    It is no subclass of upstream's: that one asks its subclasses whether an object is one of its
    own, and would hear of ours.
    """
    kind: Any = type(upstream)  # so that a class may have both, ours and upstream's, as bases

    class EitherModel(kind):  # type: ignore[misc]
        def __new__(mcs, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
            if not bases:
                return super().__new__(mcs, name, bases, body)
            return kind(name, tuple(upstream if base is either else base for base in bases), body)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if is_llm(args[0] if args else kwargs.get("model")):
                return importlib.import_module(_MODELS).VLLM(*args, **kwargs)
            return upstream(*args, **kwargs)

        def __getattr__(cls, name: str) -> Any:
            return getattr(upstream, name)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, (upstream, *_ours()))

        def __subclasscheck__(cls, subclass: type) -> bool:
            return subclass is cls or issubclass(subclass, (upstream, *_ours()))

    names = {"__module__": upstream.__module__, "__doc__": upstream.__doc__}
    either: Any = EitherModel(upstream.__name__, (), names)
    return either  # type: ignore[no-any-return]


def _ours() -> tuple[type, ...]:
    """Return our class of models, if there can be an instance of it."""
    module = sys.modules.get(_MODELS)
    found = None if module is None else getattr(module, "VLLM", None)
    return (found,) if isinstance(found, type) else ()
