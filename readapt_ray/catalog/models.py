"""Open a model by name: find or fetch its folder, and read its encoding, tokenizer and fingerprint.

A name can be a local folder or GGUF file, a catalog name, a URI, or a hub id (`owner/name`, `owner/name@commit`). Only
safetensors, configuration and tokenizer files are fetched (`fetching.py`), or pickled weights if there are no others.
Pickled weights and GGUF files are converted (`converted_weights.py`). Code in a model folder is never executed.
"""

import functools
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from readapt_ray.artifact_files import LEASE_NAME, MANIFEST_NAME
from readapt_ray.artifacts import fingerprint, read_lease, read_manifest
from readapt_ray.catalog import converted_weights, fetching, gguf_files, retrievers, sentence_transformers_folder
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.likely_encoding import as_contract, guess_encoding
from readapt_ray.catalog.model_folder import ModelFolder
from readapt_ray.config import meant
from readapt_ray.errors import ModelError, ReadaptError, WeightMismatchError, first_line
from readapt_ray.model_file_names import (
    ADAPTER_CONFIG_NAME,
    BUNDLE_NAME,
    CONFIG_NAME,
    CONTRACT_NAME,
    MODULES_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_FILES,
)
from readapt_ray.quick_imports import quick_imports
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_BUILTIN = "builtin:"
_BUILTIN_FOLDER = Path(__file__).parent.parent / "data"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(target: str) -> bool:
    """Return whether a name has the form `owner/name` (without `@commit`), and is no local file or folder."""
    return bool(_HUB_ID.fullmatch(target)) and not Path(target).exists()


@dataclass(frozen=True)
class OpenModel(ModelFolder):
    """A model or adapter in a folder on this machine's disk. Encoding, tokenizer, fingerprints and base are cached.

    Open a model once and pass it on. If it is pickled for another process, that process reads it again.
    """

    base_given: str = ""
    """Base model given by the user, for factors; empty to use the one that the factors name."""

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "folder": self.folder, "base_given": self.base_given}

    @functools.cached_property
    def encoding(self) -> Encoding:
        """Return how the model encodes text: templates, special tokens, pooling, maximum lengths.

        The first of these that exists decides: the factors' own record, readapt.json in the folder, the catalog's row
        (for a model given by catalog name or hub id, or in the hub's cache), the files of sentence-transformers in the
        folder, and the catalog's row of a model whose name on the hub is the name of the folder.

        Raises:
            ModelError: none exists (the message says what to add), or the first has what no encoding can express.
        """
        return _encoding_of(self)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Return the tokenizer; for an adapter without one, the tokenizer of its base. It is shared: do not change it.

        Raises:
            ModelError: there is no tokenizer, or it cannot be read.
        """
        with quick_imports():
            from transformers import AutoTokenizer

        folder = self._tokenizer_holder.folder
        try:
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = first_line(error)
            raise ModelError(f"{self.name!r} has no tokenizer that can be read: {said}") from error

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint that identifies this model.

        - A model that a stage of ours wrote: the fingerprint stored in its manifest.
        - Factors (the output of `readapt merge --factors`): the fingerprint of the model that merging them gives.
        - Any other folder: a hash of its weights, configuration and tokenizer files, which are read in full.

        Raises:
            WeightMismatchError: the base model of these factors was replaced by another model.
        """
        if self.is_factors:
            content = self.read_json(BUNDLE_NAME)
            advice = "give that model with --base"
            refuse_other_base(f"{self.name!r}", content["sources"]["pretrained"], self.base, advice)
            return str(content["model_fingerprint"])
        if (self.folder / MANIFEST_NAME).is_file():
            manifest = read_manifest(str(self.folder))
            if manifest is not None:
                return manifest.fingerprint
        folder = Location(str(self.folder))
        return fingerprint({name: (folder / name).sha256() for name in self.content_files()})

    @functools.cached_property
    def tokenizer_fingerprint(self) -> str:
        """Return a hash of all tokenizer files; for an adapter without a tokenizer, of its base's."""
        folder = Location(str(self._tokenizer_holder.folder))
        return fingerprint({name: (folder / name).sha256() for name in TOKENIZER_FILES if (folder / name).is_file()})

    @functools.cached_property
    def base(self) -> "OpenModel":
        """Open the model that this adapter was trained on, or that these factors belong to; fetch it if needed.

        Raises:
            ModelError: the base cannot be found, or this is neither factors nor an adapter that names its base.
        """
        return open_model(self.base_reference)

    @property
    def base_reference(self) -> str:
        """Return the name, folder or URI of the base, as the adapter or these factors state it; `base` opens it.

        Raises:
            ModelError: this is neither factors nor an adapter that names its base.
        """
        if self.is_factors:
            return self.base_given or str(self.read_json(BUNDLE_NAME)["sources"]["pretrained"]["name"])
        name = self.adapter_config.get("base_model_name_or_path")
        if not name:
            raise ModelError(f"{self.name!r} is an adapter that does not name its base model in {ADAPTER_CONFIG_NAME}")
        return str(name)

    @property
    def _tokenizer_holder(self) -> "OpenModel":
        """Return the model itself; for an adapter without a tokenizer, its base model."""
        return self.base if self.is_adapter and not (self.folder / TOKENIZER_CONFIG_NAME).is_file() else self

    @property
    def revision(self) -> str:
        """Return the commit on the hub, also of converted weights; empty for a model that is not from the hub."""
        converted = self.read_json(converted_weights.RECORD_NAME)
        if converted:
            return str(converted["revision"])
        return self.folder.name if self.folder.parent.name == "snapshots" else ""  # the layout of the hub's cache

    @property
    def pinned_name(self) -> str:
        """Return the name with its commit on the hub: `owner/name@commit`.

        With it other machines open the same version. A model that is not from the hub keeps its name.
        """
        target = retrievers.hub_id(self.name)
        is_of_hub = bool(_HUB_ID.fullmatch(target)) and own_folder(self.name) is None and not Path(target).exists()
        return f"{self.name}@{self.revision}" if is_of_hub and self.revision else self.name

    def content_files(self) -> list[str]:
        """Return the relative names of all weights, configuration and tokenizer files, subfolders included.

        Files are chosen by suffix (MODEL_SUFFIXES of `fetching.py`); the lease of an unfinished output is left out.
        """
        listing = Location(str(self.folder)).listing(recursive=True)
        return [
            name
            for name, _ in listing
            if name.endswith(fetching.MODEL_SUFFIXES) and name.rsplit("/", 1)[-1] != LEASE_NAME
        ]


def open_model(name: str | os.PathLike[str], *, with_weights: bool = True, base: str | None = None) -> OpenModel:
    """Find a model by name, and fetch it to this machine's disk if it is not there yet.

    A local folder that holds a model is preferred to the catalog and the hub.

    Args:
        name: a catalog name, a local folder or GGUF file, a URI, or a hub id; a hub model may end with `@` and a
            commit.
        with_weights: False fetches only configuration and tokenizer, a thousandth of the bytes of a large model.
        base: for factors, name of their base model; None takes the one that they name.

    Raises:
        ModelError: there is no model of that name, it is unfinished, or it needs code from its folder.
        ReadaptError: the hub could not be reached, or kept failing.
    """
    name, revision = os.fspath(name), None
    if not Path(name).exists():
        name, revision = retrievers.split_commit(name)
    target = retrievers.hub_id(name)
    if target.startswith(_BUILTIN) and own_folder(name) is None:
        folder = _BUILTIN_FOLDER / target.removeprefix(_BUILTIN)
    elif "://" in target:
        _check_finished(Location(target), name)
        folder = fetching.from_uri(target, with_weights=with_weights)
    elif (folder_of_user := own_folder(name)) is not None:
        folder = folder_of_user
        _check_finished(Location(str(folder)), name)
    elif is_hub_id(target):
        folder = fetching.from_hub(name, target, revision, with_weights=with_weights)
    else:
        known = [*retrievers.PRETRAINED, *(row.name for row in retrievers.RETRIEVERS)]
        hint = meant(name, known) or f"the catalog has {', '.join(known)}"
        raise ModelError(f"no model {name!r}: not a folder, not a URI, not a hub id, and not in the catalog; {hint}")
    is_read = with_weights or converted_weights.is_gguf(folder)  # a GGUF file also holds configuration and tokenizer
    folder_read = converted_weights.safe_folder(folder, name) if is_read else folder
    model = OpenModel(name=name, folder=folder_read, base_given=base or "")
    if not model.is_adapter and not (folder_read / CONFIG_NAME).is_file():
        raise ModelError(f"{name!r} is not a model: {folder} has neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME}")
    _check_own_code(model)
    return model


def refuse_other_base(what: str, made_of: Mapping[str, Any], base: OpenModel, advice: str) -> None:
    """Refuse a base model that is not the one that factors were made of.

    Args:
        what: name of the factors in the error.
        made_of: record of their base in the factors: name, fingerprint, files.
        base: the model that was found.
        advice: what the user can do; ends the message.

    Raises:
        WeightMismatchError: the fingerprints differ.
    """
    if base.fingerprint == made_of["fingerprint"]:
        return
    folder, files = Location(str(base.folder)), made_of["files"]
    here = {name: (folder / name).sha256() for name in TOKENIZER_FILES if (folder / name).is_file()}
    differs = "tokenizer" if here != {name: files[name] for name in TOKENIZER_FILES if name in files} else "content"
    raise WeightMismatchError(
        f"{what} was made of {made_of['name']!r} (fingerprint {made_of['fingerprint']}), and the base {base.name!r} has another "
        f"{differs} (fingerprint {base.fingerprint}); {advice}"
    )


def find_row(name: str) -> retrievers.Retriever | None:
    """Return the catalog's row of a model; None if it has none, or is a local folder outside the hub's cache.

    Args:
        name: a catalog name, a hub id (also with `@commit`), or a folder.
    """
    folder = own_folder(name)
    return retrievers.find_retriever(name) if folder is None else retrievers.find_cached(str(folder))


def base_name(name: str) -> str:
    """Return the name under which an adapter stores its base model.

    A catalog name becomes its hub id, and a pinned commit (`owner/name@commit`) is dropped. The name of a local folder,
    a GGUF file or a built-in model stays as given.
    """
    target = retrievers.hub_id(retrievers.split_commit(name)[0])
    return name if target.startswith(_BUILTIN) or own_folder(name) is not None else target


def own_folder(name: str) -> Path | None:
    """Return the absolute path of the local folder or GGUF file of a name; None if there is none.

    A folder of a catalog name counts only if it holds a config.json or adapter_config.json.
    """
    folder = Path(os.path.expanduser(name))  # an unknown ~user stays as it is; Path.expanduser would fail
    if folder.suffix == gguf_files.SUFFIX and folder.is_file():
        return folder.resolve()
    if not folder.is_dir():
        return None
    in_catalog = retrievers.hub_id(name) != name
    if in_catalog and not any((folder / each).is_file() for each in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        return None
    if in_catalog:
        logger.info("%s is a folder here, so that model is taken and not the catalog's", name)
    return folder.resolve()


def _check_finished(location: Location, name: str) -> None:
    """Refuse the unfinished output of a stage, since some of its weights may be missing."""
    if not (location / LEASE_NAME).is_file() or (location / MANIFEST_NAME).is_file():
        return
    stage = (read_lease(location) or {}).get("stage")
    made_by = f"`readapt {stage}`" if stage else "the stage that makes it"
    raise ModelError(
        f"{name!r} is unfinished; run {made_by} with this output again to resume it, or wait until it is done"
    )


def _check_own_code(model: OpenModel) -> None:
    """Refuse a model that needs code from its folder, since transformers' own class may compute other vectors."""
    config = model.config
    code = dict(config.get("auto_map") or {}).get("AutoModel")
    if code is None:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = config.get("model_type")
    advice = (
        f"Where transformers' own {kind!r} computes the same, drop auto_map from the config.json of a copy; where the code only "
        f'makes attention bidirectional, also write "is_causal": false there; else give another model'
    )
    if kind not in CONFIG_MAPPING_NAMES:
        advice = (
            f"transformers has none for the type {kind!r}: look on the hub for a conversion of it that is loaded without code, or "
            f"give one of the type {', '.join(retrievers.TARGETS_BY_FAMILY)}"
        )
    raise ModelError(
        f"{model.name!r} brings code of its own (auto_map in config.json: {code}), which changes how it computes and is never "
        f"executed here. {advice}"
    )


def find_encoding(model: OpenModel) -> tuple[Encoding, str] | None:
    """Return the encoding of a model, and which file or row it was read from; None if nothing defines it.

    The order is that of `OpenModel.encoding`.

    Raises:
        ModelError: readapt.json has no section `encoding`, or no encoding can express the files of
            sentence-transformers.
        InputError: an option in the section is wrong.
    """
    if model.is_factors:
        return Encoding.parse(
            model.read_json(BUNDLE_NAME)["encoding"], where=str(model.folder / BUNDLE_NAME)
        ), BUNDLE_NAME
    contract = model.read_json(CONTRACT_NAME)
    if contract and not isinstance(contract.get("encoding"), dict):
        raise ModelError(
            f"{model.folder / CONTRACT_NAME} has no section 'encoding', so it is not of readapt; move it away, or add one as "
            f"`readapt encoding` shows it"
        )
    if contract:
        return Encoding.parse(contract["encoding"], where=str(model.folder / CONTRACT_NAME)), CONTRACT_NAME
    row = _catalog_row(model)
    if row is not None:
        return row.encoding, f"the catalog's row of {row.name}"
    if (model.folder / MODULES_NAME).is_file():
        options = model._tokenizer_holder.read_json(TOKENIZER_CONFIG_NAME)
        encoding = sentence_transformers_folder.read_encoding(model, model.tokenizer, options)
        return encoding, f"sentence-transformers' files ({MODULES_NAME})"
    row = retrievers.find_copied(_place(model))
    if row is not None:
        logger.info(
            "%s has no files that say how it encodes text; by its name it is a copy of %s, so the catalog's settings of that "
            "model are used",
            model.name,
            row.hub_id,
        )
        return row.encoding, f"the catalog's row of {row.name}, of which it has the name"
    return None


def likely_encoding(model: OpenModel) -> Encoding:
    """Guess pooling, BOS/EOS tokens and token limits from a model's architecture and tokenizer.

    Prompts are not guessed. A tokenizer that cannot be read raises no error: BOS and EOS are then assumed.
    """
    try:
        holder, tokenizer = model.base if model.is_adapter else model, model.tokenizer
    except ReadaptError:  # the guess is part of an error message, so it must not raise an error
        holder, tokenizer = model, None
    return guess_encoding(holder.config, tokenizer)


def _encoding_of(model: OpenModel) -> Encoding:
    found = find_encoding(model)
    if found is not None:
        return found[0]
    likely = likely_encoding(model)
    raise ModelError(
        f"no pooling or prompt settings found for {model.name!r}: its folder has neither {CONTRACT_NAME} nor {MODULES_NAME}, and it "
        f"is not in the catalog; pass --encoding FILE.json, or let `readapt encoding --model {model.name} --write` write "
        f"{CONTRACT_NAME}. Pooling is likely {likely.pooling!r}; look up in its model card how it was trained, also whether "
        f"it puts words before queries and passages:\n{as_contract(likely)}"
    )


def _catalog_row(model: OpenModel) -> retrievers.Retriever | None:
    """Return the catalog's row of a model that is from the hub, by its name or by its folder in the hub's cache."""
    if "://" in model.name:
        return retrievers.find_cached(model.name)
    return find_row(model.name) or retrievers.find_cached(str(model.folder))


def _place(model: OpenModel) -> str:
    """Return the URI or the absolute path of a model's folder."""
    return model.name if "://" in model.name else str(own_folder(model.name) or model.folder)
