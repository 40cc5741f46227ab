"""AdapterFolders: where clients may have adapters loaded from, and nowhere else.

What is checked is what is read: a path is followed once, the files are opened on the way, and
the reader gets these very files, whatever is put in their places meanwhile.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from quire.server.errors import ApiError
from quire.utils.checks import shown

logger = logging.getLogger("quire")

_LONGEST_PATH: Final = 4096
_OPEN_FILES: Final = Path("/proc/self/fd")
_CONFIG: Final = "adapter_config.json"
_TENSORS: Final = "adapter_model.safetensors"
_PICKLED: Final = "adapter_model.bin"
"""Stands in for the tensors, for the reader to say why it is not read."""

_FOLDER: Final = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY
_FILE: Final = os.O_RDONLY | os.O_NONBLOCK  # a pipe would have the opening wait for a writer


class OpenAdapter:
    """A folder with the files of an adapter, each of which is open.

    Attributes
    ----------
    path : str
        A folder that stays the same, whatever becomes of the one that was asked for.
    given : str
        What was asked for.
    """

    def __init__(self, given: str, folder: str, files: Mapping[str, int]) -> None:
        self.given = given
        self.path = folder
        ending = ExitStack()
        for number in files.values():
            ending.callback(os.close, number)
        self.close = weakref.finalize(self, ending.close)
        if not _OPEN_FILES.is_dir():  # the system does not lend open files by their numbers
            return
        try:
            self.path = os.path.realpath(tempfile.mkdtemp(prefix="quire-adapter-"))
            ending.callback(shutil.rmtree, self.path, ignore_errors=True)
            for name, number in files.items():
                os.symlink(_OPEN_FILES / str(number), os.path.join(self.path, name))
        except OSError as error:
            self.close()
            logger.error("no folder for an adapter's files can be made: %s", error)
            raise ApiError(
                500, "the server has no room for temporary files; its log has the reason"
            ) from None

    def words(self, error: Exception) -> str:
        """Return what an error says, with the path that the client knows."""
        return str(error).replace(self.path, self.given)


class AdapterFolders:
    """The directories that adapters may come from.

    Parameters
    ----------
    directories : sequence of str
        Looked through in this order for relative paths.
    """

    def __init__(self, directories: Sequence[str]) -> None:
        self._directories = [os.path.abspath(each) for each in directories]

    def open(self, path: str) -> OpenAdapter:
        """Open the files of an adapter.

        Parameters
        ----------
        path : str
            Of a folder in one of the directories: relative to one, or absolute. Symlinks are
            followed where they do not lead out of the directories.

        Raises
        ------
        ApiError
            400: there is no such folder; it says the same where there is one outside.
        """
        _check(path)
        for directory in self._directories:
            folder = os.path.join(directory, path)
            if not _is_below(folder, [directory, os.path.realpath(directory)]):
                continue
            try:
                os.close(self._open(folder, _FOLDER))
            except OSError:
                continue
            return OpenAdapter(path, os.path.realpath(folder), self._files(path, folder))
        raise _refused(path)

    def _files(self, path: str, folder: str) -> dict[str, int]:
        """Return the files by name, each with its number."""
        found: dict[str, int] = {}
        try:
            for name in (_CONFIG, _TENSORS):
                file = os.path.join(folder, name)
                if name == _TENSORS and not os.path.lexists(file):
                    name = _PICKLED
                    file = os.path.join(folder, name)
                if not os.path.lexists(file):
                    raise _incomplete(path)
                try:
                    found[name] = self._open(file, _FILE)
                except OSError:
                    raise _refused(path, name) from None
                if not stat.S_ISREG(os.fstat(found[name]).st_mode):
                    raise _refused(path, name)
        except BaseException:
            for number in found.values():
                os.close(number)
            raise
        return found

    def _open(self, path: str, flags: int) -> int:
        """Open what a path leads to, if that is below a directory, and return its number.

        The way there has no symlinks any more. One that is put there meanwhile is an error.
        """
        real = os.path.realpath(path)
        for directory in self._directories:
            root = os.path.realpath(directory)
            if _is_below(real, [root]):
                return _walk(root, os.path.relpath(real, root).split(os.sep), flags)
        raise FileNotFoundError(path)


def _walk(root: str, parts: list[str], flags: int) -> int:
    number = os.open(root, _FOLDER | os.O_CLOEXEC)
    for i, part in enumerate(parts):
        kind = flags if i == len(parts) - 1 else _FOLDER
        outer = number
        try:
            number = os.open(part, kind | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=outer)
        finally:
            os.close(outer)
    return number


def _is_below(path: str, roots: Sequence[str]) -> bool:
    """Whether a path is, as it is written, one of the roots or below."""
    return any(os.path.commonpath([path, root]) == root for root in roots)


def _check(path: str) -> None:
    """Refuse what can be no path that anybody means."""
    wrong = None
    if not path.strip():
        wrong = "the path of a folder"
    elif not path.isprintable():
        wrong = "a path without control characters"
    elif len(os.fsencode(path)) > _LONGEST_PATH:
        wrong = f"at most {_LONGEST_PATH} bytes long"
    elif ".." in path.split("/"):
        wrong = "a path without '..'"
    if wrong is not None:
        raise ApiError(400, f"lora_path must be {wrong}, got {shown(path)}", param="lora_path")


def _incomplete(path: str) -> ApiError:
    message = f"lora_path: {shown(path)} has to have the files {_CONFIG} and {_TENSORS}"
    return ApiError(400, message, param="lora_path", code="adapter_not_found")


def _refused(path: str, name: str | None = None) -> ApiError:
    told = shown(path) if name is None else f"{name} of {shown(path)}"
    what = "a folder" if name is None else "a file that can be read"
    return ApiError(
        400,
        f"lora_path: {told} is not {what} in one of this server's --allowed-lora-dirs",
        param="lora_path",
        code="adapter_not_found",
    )
