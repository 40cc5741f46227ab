"""Where a model's files are: the packaged demo, a folder, or a hub.

Environment variables are the hub libraries' own: HF_HOME, HF_TOKEN (or HUGGING_FACE_HUB_TOKEN),
HF_ENDPOINT and HF_HUB_OFFLINE. With VLLM_USE_MODELSCOPE set, names are ModelScope's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from quire.errors import ConfigError, ModelNotFoundError

DEMO_MODEL = "quire/demo"
"""The name of the model that ships inside the package."""

BESIDE_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""Files of a model that are not weights: configuration and tokenizer, as shell patterns."""

_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors", "*.pt")
"""Which weights are wanted: those of the first pattern that a model has files of. The last two are
older quantized models'."""

_IN_FOLDERS = ["*/*"]  # where repositories keep the same weights in other formats
_NAME = re.compile(r"(?=.{1,96}$)\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


class ModelSource(Protocol):
    """What an engine's ModelConfig says about where files come from."""

    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def tokenizer(self) -> str | None: ...  # noqa: D102
    @property
    def revision(self) -> str | None: ...  # noqa: D102
    @property
    def tokenizer_revision(self) -> str | None: ...  # noqa: D102
    @property
    def download_dir(self) -> str | None: ...  # noqa: D102
    @property
    def hf_token(self) -> str | bool | None: ...  # noqa: D102
    @property
    def load_format(self) -> str: ...  # noqa: D102


def resolve_model(config: ModelSource) -> Path:
    """Return the folder of an engine's model; see `resolve`."""
    return resolve(
        config.model,
        revision=config.revision,
        download_dir=config.download_dir,
        token=config.hf_token,
        allow_patterns=BESIDE_WEIGHTS if config.load_format == "dummy" else None,
    )


def resolve_tokenizer(config: ModelSource) -> Path:
    """Return the folder of an engine's tokenizer, the model's unless it has its own."""
    name = config.model if config.tokenizer is None else config.tokenizer
    if name == config.model and config.tokenizer_revision in (None, config.revision):
        return resolve_model(config)
    return resolve(
        name,
        revision=config.tokenizer_revision,
        download_dir=config.download_dir,
        token=config.hf_token,
        allow_patterns=BESIDE_WEIGHTS,
        field="tokenizer",
    )


def resolve(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    token: str | bool | None = None,
    allow_patterns: Sequence[str] | None = None,
    field: str = "model",
) -> Path:
    """Return the folder with a model's files, downloading what is not there.

    Parameters
    ----------
    model
        ``"quire/demo"``, a folder, a name on the hub (``org/name``), or a hub URL such as
        ``https://huggingface.co/org/name/tree/main``. A folder that exists comes first.
    revision
        Branch, tag or commit on the hub.
    download_dir
        Where hub files are kept; None: the hub library's own cache.
    token
        For gated and private models; None: what the environment has.
    allow_patterns
        Files wanted of a hub's model, as shell patterns. None: configuration, tokenizer and
        weights, these as safetensors where there are any.
    field
        The argument that errors name.

    Raises
    ------
    ModelNotFoundError
        There is no such folder or model, or the hub cannot be reached; the message says what
        to do.
    ConfigError
        The URL and `revision` contradict each other, or ModelScope is asked for without its
        package.
    """
    if model == DEMO_MODEL:
        # By name: the demo package is made with the engine, and so stands above this one.
        try:
            return Path(import_module("quire.demo").model_path())
        except FileNotFoundError as error:
            raise ModelNotFoundError(str(error)) from error
    folder = existing_path(model)
    if folder is not None and folder.is_dir():
        return folder.resolve()
    if folder is not None:
        raise ModelNotFoundError(
            f"{field} is {model!r}, which is a file; it must be a folder in Hugging Face's layout "
            "or a name on the hub"
        )
    if "://" in model:
        model, revision = _parse_url(model, revision, field)
    if not _NAME.fullmatch(model):
        raise ModelNotFoundError(
            f"{field} is {model!r:.200}: there is no such folder, and a name on the hub has the "
            "form 'organisation/name'"
        )
    if os.environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() in ("1", "true", "yes", "on"):
        return _from_modelscope(model, revision, download_dir)
    return _from_hugging_face(model, revision, download_dir, token, allow_patterns)


def existing_path(name: str) -> Path | None:
    """Return the file or folder of that name, if there is one that can be looked at."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, nobody's home, a NUL character
        return None


def _parse_url(url: str, revision: str | None, field: str = "model") -> tuple[str, str | None]:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ModelNotFoundError(f"{field} is {url!r}, which is no URL: {error}") from error
    hosts = _HOSTS | {urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc}
    path = [unquote(each) for each in parts.path.split("/") if each]
    if parts.scheme not in ("http", "https") or parts.netloc not in hosts:
        raise ModelNotFoundError(
            f"{field} is {url!r}; of URLs, only those of a model on huggingface.co are understood"
        )
    # A model's page, or the page of one of its revisions: org/name, org/name/tree/revision.
    name, rest = path, []
    for marker in ("tree", "blob", "resolve"):
        if marker in path[1:3]:
            at = path.index(marker, 1)
            name, rest = path[:at], path[at + 1 :]
            break
    if len(name) not in (1, 2) or len(rest) > 1 or name[0] in ("datasets", "spaces"):
        raise ModelNotFoundError(
            f"{field} is {url!r}; it must be a model's page, such as "
            "https://huggingface.co/org/name or https://huggingface.co/org/name/tree/main"
        )
    if rest and revision is not None and rest[0] != revision:
        raise ConfigError(
            f"revision is {revision!r}, but the URL {url!r} names {rest[0]!r}; give only one"
        )
    return "/".join(name), rest[0] if rest else revision


def _from_hugging_face(
    name: str,
    revision: str | None,
    download_dir: str | None,
    token: str | bool | None,
    allow_patterns: Sequence[str] | None,
) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        return _from_cache(name, revision, download_dir, allow_patterns, None)
    try:
        if allow_patterns is None:
            # Which format there is has to be known first: many models come in both. Asked in the
            # way that fails at once where there is no connection; listing files tries for long.
            files = HfApi(token=token).model_info(name, revision=revision).siblings or []
            names = [file.rfilename for file in files if "/" not in file.rfilename]
            weights = [each for each in _WEIGHTS if any(fnmatch(name, each) for name in names)]
            allow_patterns = (*BESIDE_WEIGHTS, *weights[:1])
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=download_dir,
                token=token,
                allow_patterns=list(allow_patterns),
                ignore_patterns=_IN_FOLDERS,
            )
        )
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"the model {name} is gated: accept its terms at https://huggingface.co/{name}, "
            "and set HF_TOKEN to a token of yours"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"there is no folder {name!r} here and no model of that name on the hub; if it is "
            "private, set HF_TOKEN to a token that may read it"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"the model {name} has no revision {revision!r}") from error
    except HFValidationError as error:
        raise ModelNotFoundError(f"{name!r} is no name of a model on the hub: {error}") from error
    except Exception as error:
        # Connections fail with the exceptions of whichever HTTP client the library uses.
        return _from_cache(name, revision, download_dir, allow_patterns, error)


def _from_cache(
    name: str,
    revision: str | None,
    download_dir: str | None,
    allow_patterns: Sequence[str] | None,
    reason: Exception | None,
) -> Path:
    """Return what an earlier download left; `reason` is why the hub cannot be asked."""
    from huggingface_hub import snapshot_download

    # Each format alone: the library refuses a snapshot that lacks any file of the patterns.
    if allow_patterns is None:
        choices = [[*BESIDE_WEIGHTS, weights] for weights in _WEIGHTS]
    else:
        choices = [list(allow_patterns)]
    failure: Exception | None = None
    for patterns in choices:
        try:
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    cache_dir=download_dir,
                    local_files_only=True,
                    allow_patterns=patterns,
                    ignore_patterns=_IN_FOLDERS,
                )
            )
        except Exception as error:
            failure = error
    place = name if revision is None else f"{name} (revision {revision})"
    why = "HF_HUB_OFFLINE is set" if reason is None else f"the hub cannot be used now ({reason})"
    raise ModelNotFoundError(
        f"there is no folder {name!r} here, no complete download of {place} in the cache, and "
        f"{why}. Run `hf download {name}` where there is a connection and copy the cache "
        "(HF_HOME, or download_dir), or pass the folder with the files"
        + (f"; {DEMO_MODEL!r} works offline" if allow_patterns is None else "")
    ) from (reason or failure)


def _from_modelscope(name: str, revision: str | None, download_dir: str | None) -> Path:
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise ConfigError(
            "VLLM_USE_MODELSCOPE is set, but the package modelscope is not installed: "
            "`pip install modelscope`, or unset the variable to use Hugging Face's hub"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=download_dir))
    except Exception as error:
        raise ModelNotFoundError(
            f"the model {name} could not be had from ModelScope: {error}"
        ) from error
