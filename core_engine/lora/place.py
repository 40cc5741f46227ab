"""Where an adapter is: a folder, or a name on the hub."""

from __future__ import annotations

from pathlib import Path

from quire.errors import AdapterError, ConfigError, ModelNotFoundError
from quire.lora.content import CONFIG_FILE, TENSORS_FILE
from quire.models import hub


def folder_of(
    path: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Return the folder of an adapter; of one on the hub, its two files are downloaded.

    Parameters
    ----------
    path
        A folder, a name on the hub (``org/name``), or the URL of its page there.
    revision, download_dir, token
        As for a model on the hub, see `quire.models.hub.resolve`.

    Raises
    ------
    AdapterError
        There is no such folder or name, or the hub cannot be reached.
    """
    try:
        return hub.resolve(
            path,
            revision=revision,
            download_dir=download_dir,
            token=token,
            allow_patterns=(CONFIG_FILE, TENSORS_FILE),
            field="lora_path",
        )
    except (ModelNotFoundError, ConfigError) as error:
        raise AdapterError(str(error)) from error
