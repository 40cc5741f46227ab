"""Finder: what serves ``import vllm`` from quire, and says that the package is here."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, cast

from quire.integrations.vllm.release import VERSION
from quire.integrations.vllm.surface import RUNNABLE, SURFACE, children, words

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.metadata import Distribution, DistributionFinder

_README = "integrations/vllm/README.md in quire's sources"


class ServedModule(ModuleType):
    """A module of the tree; its names are looked up when they are first used."""

    def __getattr__(self, name: str) -> Any:
        home = SURFACE[self.__name__].get(name)
        if home is None:
            if name in children(self.__name__):
                return import_module(f"{self.__name__}.{name}")
            raise AttributeError(not_served(f"{self.__name__}.{name}"), name=name, obj=self)
        module, _, attribute = home.partition(":")
        value = getattr(import_module(module), attribute)
        self.__dict__[name] = value  # the next access does not come here
        return value

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *SURFACE[self.__name__], *children(self.__name__)})


def not_served(name: str) -> str:
    """Say that a name of vLLM has nothing behind it here, and which of its neighbours do."""
    parent = name.rpartition(".")[0]
    while parent not in SURFACE:
        parent = parent.rpartition(".")[0]
    return (
        f"{name} is not served by quire's stand-in for vLLM {VERSION}; {parent} has: "
        f"{words(parent)}. {_README} lists all, and what takes the place of the rest"
    )


def _is_package(name: str) -> bool:
    """Whether modules may be below one.

    Also where nothing is: for a name that it lacks, Python then asks for a module, and is told
    what there is. A program is no package, or its ``__main__`` would be run.
    """
    return name == "vllm" or name not in RUNNABLE


class _Loader:
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ServedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f"Served by quire {module.__name__!r}."
        names = SURFACE[module.__name__]
        module.__dict__["__all__"] = [name for name in names if not name.startswith("_")]

    def is_package(self, fullname: str) -> bool:
        return _is_package(fullname)

    def get_source(self, fullname: str) -> str | None:
        return None

    def get_code(self, fullname: str) -> CodeType:
        """Return what ``python -m`` runs."""
        target = RUNNABLE.get(fullname)
        if target is None:
            raise ImportError(f"{fullname} is no program; there are: {', '.join(RUNNABLE)}")
        source = f"import sys\nfrom {target} import main\nsys.exit(main())\n"
        return compile(source, f"<{fullname}, by quire>", "exec")


# Not by its bases, see `Finder`.
_LOADER = cast("Loader", _Loader())


class Finder:
    """Stands on ``sys.meta_path`` while the stand-in is installed.

    Its bases are what `importlib` asks for and no more: an environment in which the stand-in is
    enabled makes one whenever Python starts.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what to load a module of the tree from.

        Raises
        ------
        ModuleNotFoundError
            The tree of vLLM may have such a module, and there is none here.
        """
        if fullname != "vllm" and not fullname.startswith("vllm."):
            return None
        if fullname in SURFACE:
            return ModuleSpec(fullname, _LOADER, is_package=_is_package(fullname))
        if fullname in RUNNABLE:
            return ModuleSpec(fullname, _LOADER)
        # Without its name: the import system would say no more than "cannot import name" else.
        raise ModuleNotFoundError(not_served(fullname))

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterable[Distribution]:
        """Return the package ``vllm``, where it is asked for."""
        from quire.integrations.vllm.distribution import StandInDistribution

        name = None if context is None else context.name
        if name is None or name.lower().replace("_", "-") == "vllm":
            return [StandInDistribution()]
        return []

    def invalidate_caches(self) -> None:
        """Forget what was found: nothing is kept."""


def installed() -> Finder | None:
    """Return the finder, if it is on ``sys.meta_path``."""
    return next((each for each in sys.meta_path if isinstance(each, Finder)), None)


def served_modules() -> list[str]:
    """Return the names of modules that were imported through the stand-in."""
    return [name for name, each in sys.modules.items() if isinstance(each, ServedModule)]


__all__ = ["Finder", "ServedModule", "installed", "not_served", "served_modules"]
