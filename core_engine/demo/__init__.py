"""The small trained model that ships with the package, and everything that made it.

``LLM("quire/demo")`` loads the folder :func:`model_path` names. The other modules write its
training text, train it (``python -m quire.demo.train``), measure it
(``python -m quire.demo.evaluate``) and show it (``python -m quire.demo``).
"""

from __future__ import annotations

from pathlib import Path

MODEL_NAME = "quire/demo"
"""The name under which every front door knows the embedded model."""


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


__all__ = ["MODEL_NAME", "model_path"]
