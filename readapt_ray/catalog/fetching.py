"""Fetch the files of a model from the hub or an object store to this machine's disk.

In: a hub id or a URI. Out: a local folder with weights, configuration and tokenizer. Weights are safetensors, or
pickled if there are no others. `check_on_hub` and `check_at_uri` check that a model exists and is accessible, without
fetching weights. Other files of our own artifacts (checkpoints, pairs, logs) are not fetched. Requests to a busy hub
are retried for half a minute, and to an unreachable one for six seconds.
"""

import errno
import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from readapt_ray import environment
from readapt_ray.artifacts import fingerprint
from readapt_ray.catalog import converted_weights, gguf_files, model_cache
from readapt_ray.errors import InputError, ModelError, ReadaptError, first_line
from readapt_ray.model_file_names import ADAPTER_CONFIG_NAME, CONFIG_NAME
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

MODEL_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")

T = TypeVar("T")

_CONFIGURATION = (CONFIG_NAME, ADAPTER_CONFIG_NAME)
_SMALL_SUFFIXES = tuple(suffix for suffix in MODEL_SUFFIXES if suffix != ".safetensors")
_SMALL_PATTERNS = tuple(f"*{suffix}" for suffix in _SMALL_SUFFIXES)
_PATTERNS = (*_SMALL_PATTERNS, "*.safetensors")
# Files of the folder itself, of modules of sentence-transformers (1_Pooling), and of the parts of a bundle.
_OF_THE_MODEL = re.compile(r"((\d+_\w+|retriever|knowledge-\d+)/)?[^/]+")
_NUM_NAMED = 4
_ATTEMPTS = 5
_ATTEMPTS_UNANSWERED = 3
"""Attempts if the hub does not answer. There may be no network, or the name may be a mistyped folder."""
_UNANSWERED = ("ConnectError", "ConnectTimeout")
"""Class names of errors that mean that the hub does not answer, in whichever HTTP library its client uses."""
_FIRST_WAIT_S = 2.0
"""Seconds before the second attempt; doubled after each attempt."""
_REFUSED = (401, 403, 404)
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def from_hub(name: str, hub_id: str, revision: str | None = None, *, with_weights: bool = True) -> Path:
    """Fetch a model from the hub, and return the folder of its snapshot in the hub's cache.

    Files in the cache are verified (see `model_cache.py`), and fetched again only if they are damaged.

    Args:
        name: name that the user gave; used in errors.
        hub_id: owner and name.
        revision: a commit; the newest unless given.
        with_weights: False fetches only configuration and tokenizer.

    Raises:
        ModelError: the hub has no such model or denies access, or the machine is offline and the cache lacks it.
        ReadaptError: the hub could not be reached, or kept failing.
    """
    return with_retries(_model(name, hub_id), lambda: _snapshot(hub_id, revision, with_weights=with_weights))


def check_on_hub(name: str, hub_id: str, revision: str | None = None) -> tuple[Path, int]:
    """Check that this machine can get a model from the hub, and fetch only its configuration.

    Args:
        name, hub_id, revision: as in `from_hub`.

    Returns:
        The folder of the snapshot, and how many bytes would still have to be fetched; 0 as soon as the cache has any of
        the weights.

    Raises:
        ModelError, ReadaptError: as in `from_hub`.
    """
    return with_retries(_model(name, hub_id), lambda: _configuration(hub_id, revision))


def _model(name: str, hub_id: str) -> str:
    return f"{name!r} (no folder here; {hub_id} on the hub)"


class Advice(NamedTuple):
    """Advice for the user that ends an error of the hub: `refused` if the hub refuses, `failed` after all retries."""

    refused: str = "check the name and the network, set HF_TOKEN for a gated model or data set, or give a local folder"
    failed: str = "run again later, or give a local folder"


_ADVICE = Advice()


def with_retries(
    what: str,
    ask: Callable[[], T],
    *,
    refusal: type[InputError] = ModelError,
    verb: str = "fetch",
    advice: Advice = _ADVICE,
) -> T:
    """Call `ask`, which sends requests to the hub, and retry while the hub is busy or cannot be reached.

    There are 5 attempts (3 if the hub does not answer), with pauses of 2, 4, 8 and 16 s. Errors that are not of the
    hub's client are not retried.

    Args:
        what: name of what is fetched or sent, for errors.
        ask: a function that sends the requests; its result is returned.
        refusal: class of the error if the hub refuses or has no such thing.
        verb: what is done, for errors: fetch or send.
        advice: what the user can do; ends the errors.

    Raises:
        InputError: the hub refuses or has no such thing; of the class `refusal`.
        ReadaptError: the hub could not be reached, or kept failing.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The base error of the HTTP library (httpx, httpx2 in later releases), and OSError. hf_xet raises RuntimeError.
    client_errors = (*HfHubHTTPError.__bases__, RuntimeError)
    attempt = 0
    while True:
        try:
            return ask()
        except InputError:
            raise
        except Exception as error:
            if not isinstance(error, (*client_errors, HFValidationError)):
                raise
            said = f"cannot {verb} {what}: {first_line(error)}"
            cause = _cause(error)
            if isinstance(error, HFValidationError) or _is_final(cause):
                raise refusal(f"{said}; {advice.refused}") from error
            attempt += 1
            if attempt == (_ATTEMPTS_UNANSWERED if type(cause).__name__ in _UNANSWERED else _ATTEMPTS):
                raise ReadaptError(f"{said}; tried {attempt} times: {advice.failed}") from error
            wait_s = _FIRST_WAIT_S * 2 ** (attempt - 1)
            logger.warning("%s; trying again in %.0f s", said, wait_s)
            time.sleep(wait_s)


def _snapshot(hub_id: str, revision: str | None, *, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))

    folder = fetch(*(_PATTERNS if with_weights else _SMALL_PATTERNS))
    if with_weights and not converted_weights.has_safetensors(folder):
        folder = fetch(*_PATTERNS, *converted_weights.PICKLED)
    if not _has_configuration(folder) or (with_weights and not _has_weights(folder)):
        _refuse_gguf_on_hub(hub_id, revision)
    model_cache.checked_snapshot(folder, fetch)
    return folder


def _configuration(hub_id: str, revision: str | None) -> tuple[Path, int]:
    from huggingface_hub import HfApi, snapshot_download

    folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_CONFIGURATION)))
    if _has_all_weights(folder):
        return folder, 0
    if not _has_configuration(folder):
        _refuse_gguf_on_hub(hub_id, revision)
    files = HfApi().model_info(hub_id, revision=revision, files_metadata=True).siblings or []
    sizes_bytes = {file.rfilename: file.size or 0 for file in files}
    return folder, sum(size for name, size in _to_fetch(sizes_bytes).items() if not (folder / name).is_file())


def _has_configuration(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _CONFIGURATION)


def _has_weights(folder: Path) -> bool:
    """Return whether a folder of the hub's cache has any weights that can be read."""
    return converted_weights.has_safetensors(folder) or any(folder.glob("*.bin"))


def _refuse_gguf_on_hub(hub_id: str, revision: str | None) -> None:
    """Refuse a model whose weights on the hub are GGUF alone; most such repositories have one model several times."""
    from huggingface_hub import HfApi

    files = HfApi().model_info(hub_id, revision=revision).siblings or []
    _refuse_gguf(
        hub_id, [file.rfilename for file in files], f"fetch one of them (hf download {hub_id} FILE --local-dir .)"
    )


def _refuse_gguf(what: str, names: Iterable[str], how: str) -> None:
    """Refuse a model that has GGUF files among these names, and say how to use one.

    Raises:
        ModelError: there are such files.
    """
    found = sorted(name for name in names if name.endswith(gguf_files.SUFFIX))
    if found:
        shown = ", ".join(found[:_NUM_NAMED]) + (
            f" and {len(found) - _NUM_NAMED} more" if len(found) > _NUM_NAMED else ""
        )
        raise ModelError(f"{what!r} has its weights as GGUF alone: {shown}; {how}, and give the path of that file")


def _has_all_weights(folder: Path) -> bool:
    """Return whether a folder of the hub's cache has all files of weights; a file is there only when it is complete."""
    suffix = ".safetensors"
    if not converted_weights.has_safetensors(folder):
        suffix = ".bin"
        if not any(folder.glob(converted_weights.PICKLED[0])):
            return False
    indexes = [json.loads(file.read_text()) for file in folder.glob(f"*{suffix}.index.json")]
    return all((folder / shard).is_file() for index in indexes for shard in index["weight_map"].values())


def _to_fetch(sizes_bytes: Mapping[str, int]) -> dict[str, int]:
    """Choose the files of a folder to fetch, with their sizes: pickled weights only if there are no safetensors."""
    names = [name for name in sizes_bytes if _OF_THE_MODEL.fullmatch(name)]
    has_safetensors = any(name.endswith(".safetensors") for name in names)
    return {
        name: sizes_bytes[name]
        for name in names
        if name.endswith(MODEL_SUFFIXES)
        or (not has_safetensors and any(Path(name).match(pattern) for pattern in converted_weights.PICKLED))
    }


def _cause(error: Exception) -> BaseException:
    """Return the hub's own error, which is the cause of the client's error if the cache lacks the model too."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error


def _is_final(cause: BaseException) -> bool:
    """Return whether a retry would fail too: access denied, no such model, no network, or a full or read-only disk."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(cause, HfHubHTTPError):
        return isinstance(cause, RepositoryNotFoundError) or cause.response.status_code in _REFUSED
    if isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return True
    return _has_no_address(cause) or (isinstance(cause, OSError) and cause.errno in _DISK)


def _has_no_address(error: BaseException | None) -> bool:
    """Return whether DNS has no address for the hub: there is no network, or the model's name is a mistyped path."""
    while error is not None and not isinstance(error, socket.gaierror):
        error = error.__cause__ or error.__context__
    return error is not None


def from_uri(uri: str, *, with_weights: bool = True) -> Path:
    """Fetch a model from an object store, and return the folder of its local copy.

    With and without weights are two separate copies. A copy is kept until this process ends. A complete one is not
    fetched again, as long as the listing of the folder is the same.

    Raises:
        ModelError: the folder is empty or does not exist, or a file arrived incomplete.
    """
    sizes_bytes, key = _at_uri(uri, with_weights=with_weights)
    return model_cache.fetched(Location(uri), sizes_bytes, key)


def check_at_uri(uri: str) -> tuple[list[str], int]:
    """Check that an object store has a model, without fetching it.

    Returns:
        The relative names of the files to fetch (weights, configuration, tokenizer), and how many bytes of them the
        cache lacks.

    Raises:
        ModelError: the folder is empty or does not exist.
    """
    sizes_bytes, key = _at_uri(uri, with_weights=True)
    cached = environment.cache_folder() / "models" / key
    return list(sizes_bytes), sum(size for name, size in sizes_bytes.items() if not (cached / name).is_file())


def _at_uri(uri: str, *, with_weights: bool) -> tuple[dict[str, int], str]:
    """Return the sizes of the files to fetch, by name, and a fingerprint of the listing."""
    location = Location(uri)
    if location.is_file():
        _refuse_gguf(uri, [location.name], "copy it to this machine")
        raise ModelError(f"no model at {uri!r}: it is a file; give the folder of a model")
    listing = [(name, info) for name, info in location.listing(recursive=True) if _OF_THE_MODEL.fullmatch(name)]
    names = [name for name, _ in listing]
    if not any(Path(name).match(pattern) for name in names for pattern in ("*.safetensors", "*.bin")):
        _refuse_gguf(uri, names, "copy one of them to this machine")
    if not listing:
        raise ModelError(f"no model at {uri!r}: the folder is empty or does not exist")
    sizes_bytes = _to_fetch({name: int(info.size) for name, info in listing})
    if not with_weights:
        sizes_bytes = {name: size for name, size in sizes_bytes.items() if Path(name).suffix in _SMALL_SUFFIXES}
    told = [] if with_weights else ["without weights"]
    return sizes_bytes, fingerprint([uri, *told, [(name, info.size, info.mtime_ns) for name, info in listing]])
