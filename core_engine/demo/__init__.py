"""The small trained model that ships with the package, and everything that made it.

``LLM("quire/demo")`` loads the folder :func:`model_path` names. The other modules write its
training text, train it (``python -m quire.demo.train``) and the adapters that
:func:`adapter_path` names (``python -m quire.demo.train_adapters``), measure it
(``python -m quire.demo.evaluate``) and show it (``python -m quire.demo``).
"""

from __future__ import annotations

from pathlib import Path

MODEL_NAME = "quire/demo"
"""The name under which every front door knows the embedded model."""
ADAPTER_NAMES = ("french", "capitals")
"""The adapters that ship beside it."""


def model_path() -> Path:
    """Return the folder of the embedded model's checkpoint.

    Returns
    -------
    Path
        A folder in the layout of a Hugging Face checkpoint. quire is never installed as a
        zip archive (torch could not be either), so the folder is a real one.

    Raises
    ------
    FileNotFoundError
        If the installation lacks the model's files.
    """
    path = Path(__file__).resolve().parent / "model"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"the files of {MODEL_NAME!r} are missing from {path}: reinstall quire, or make them "
            "with `python -m quire.demo.train`"
        )
    return path


def adapter_path(name: str) -> Path:
    """Return the folder of one of the embedded model's adapters, in peft's format.

    Parameters
    ----------
    name : {"french", "capitals"}
        It answers in French, or IN CAPITAL LETTERS.

    Returns
    -------
    Path
        For ``LLM.load_lora`` and for ``LoRARequest``.

    Raises
    ------
    ValueError
        There is no adapter of this name.
    FileNotFoundError
        If the installation lacks the adapter's files.
    """
    if name not in ADAPTER_NAMES:
        names = ", ".join(map(repr, ADAPTER_NAMES))
        raise ValueError(f"{MODEL_NAME!r} has no adapter {name!r}: its adapters are {names}")
    path = Path(__file__).resolve().parent / "adapters" / name
    if not (path / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"the files of {MODEL_NAME!r}'s adapter {name!r} are missing from {path}: reinstall "
            "quire, or make them with `python -m quire.demo.train_adapters`"
        )
    return path


__all__ = ["ADAPTER_NAMES", "MODEL_NAME", "adapter_path", "model_path"]
