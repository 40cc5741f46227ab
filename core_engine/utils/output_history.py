"""What IPython remembers must not keep an engine: neither its outputs nor its last error."""

from __future__ import annotations

import gc
import sys
import weakref
from types import FunctionType, ModuleType
from typing import Any

_MOST_OBJECTS = 2000
"""How many objects are looked at to learn whether a value holds an engine."""

_made: list[weakref.ref[object]] = []  # since the cell began
_older: list[weakref.ref[object]] = []


def keep_out_of_history(engine: object) -> None:
    """Let go of an engine in IPython's memory once a later cell has made another.

    A cell that ends with ``llm`` leaves it in ``Out``, ``_`` and ``_3``, and one that fails leaves
    it in the frames of the last traceback. Run again, the cell would load the model once more
    beside the one that nobody can see. Variables are the user's, and keep what they keep. Outside
    of IPython this does nothing.

    Parameters
    ----------
    engine : object
        What was just made; it is held weakly.
    """
    shell = _shell()
    if shell is not None:
        _made.append(weakref.ref(engine))
        shell.events.register("post_run_cell", _after_cell)  # once, however often it is told


def _shell() -> Any:
    ipython = sys.modules.get("IPython")
    get_ipython = getattr(ipython, "get_ipython", None)
    return None if get_ipython is None else get_ipython()


def _after_cell(result: Any = None) -> None:
    if not _made:
        return
    _forget_outputs()
    if _alive() and getattr(result, "success", True):
        _forget_error()
    _older[:] = [reference for reference in (*_older, *_made) if reference() is not None]
    _made.clear()


def _alive() -> set[int]:
    """Return the older engines that there still are, by identity."""
    return {id(engine) for reference in _older if (engine := reference()) is not None}


def _forget_outputs() -> None:
    """Take the outputs that hold an older engine out of the history."""
    shell, engines = _shell(), _alive()
    if shell is None or not engines:
        return
    names, hidden, hook = shell.user_ns, shell.user_ns_hidden, shell.displayhook
    outputs = names.get("_oh", {})
    for number in [n for n, value in outputs.items() if _holds(value, engines)]:
        del outputs[number]
        _forget_name(f"_{number}", names, hidden)
    for name in ("_", "__", "___"):
        if _holds(hidden.get(name), engines):
            _forget_name(name, names, hidden)
        if _holds(getattr(hook, name, None), engines):
            setattr(hook, name, "")


def _forget_name(name: str, names: dict[str, Any], hidden: dict[str, Any]) -> None:
    """Take away a name that IPython gave to an output; the user may have given it another."""
    value = hidden.pop(name, None)
    if names.get(name) is value:
        names.pop(name, None)


def _holds(value: object, engines: set[int]) -> bool:
    """Whether one of the engines can be reached from a value."""
    seen = {id(value)}
    queue = [value]
    for reached in queue:  # grows as it is read
        if id(reached) in engines:
            return True
        for part in _parts(reached):
            if id(part) not in seen and len(seen) < _MOST_OBJECTS and gc.is_tracked(part):
                seen.add(id(part))
                queue.append(part)
    return False


def _parts(value: object) -> list[Any]:
    """Return what an object refers to, but for its code and the modules around it."""
    if isinstance(value, (type, ModuleType)):
        return []
    if isinstance(value, FunctionType):
        return [value.__closure__, value.__defaults__, value.__kwdefaults__]
    return gc.get_referents(value)


def _forget_error() -> None:
    """Forget the last error, which is over and done with, and the variables in its frames."""
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        vars(sys).pop(name, None)
    vars(_shell().InteractiveTB).pop("tb", None)
    if _alive():
        gc.collect()  # an error and its frames may refer to each other
