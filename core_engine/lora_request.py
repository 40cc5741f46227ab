"""LoRARequest: which adapter a request wants."""

from __future__ import annotations

import os
from dataclasses import dataclass

from quire.utils.checks import flag, integer, refuse


@dataclass(frozen=True, eq=True)
class LoRARequest:
    """An adapter by its name and its place.

    What counts is the content of the folder: the same content under two names is one adapter,
    and other content under the same name, or the same ``lora_int_id``, is another one.

    Parameters
    ----------
    lora_name : str
        What the adapter is called; with an empty ``lora_path``, one that is loaded already.
    lora_int_id : int, optional
        Accepted for compatibility, from 1 up; it identifies nothing here.
    lora_path : str or path, default ""
        A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a name on the
        hub.
    base_model_name : str, optional
        The model that it was made for; shown by a server.
    load_inplace : bool, default False
        Read the folder again, even where nothing about its files seems to have changed.

    Raises
    ------
    InvalidRequestError
        A value is of the wrong kind.
    """

    lora_name: str
    lora_int_id: int | None = None
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name.strip():
            raise refuse("lora_name", self.lora_name, "a name that is not empty")
        if self.lora_int_id is not None:
            integer("lora_int_id", self.lora_int_id, "an integer from 1 up", 1)
        path: object = self.lora_path
        if isinstance(path, os.PathLike):
            path = os.fspath(path)
            object.__setattr__(self, "lora_path", path)
        if not isinstance(path, str):
            raise refuse("lora_path", path, "a folder or a name on the hub")
        if self.base_model_name is not None and not isinstance(self.base_model_name, str):
            raise refuse("base_model_name", self.base_model_name, "a str or None")
        flag("load_inplace", self.load_inplace)

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.lora_name

    @property
    def path(self) -> str:
        """Where it lies."""
        return self.lora_path

    @property
    def adapter_id(self) -> int | None:
        """The number that it was given."""
        return self.lora_int_id
