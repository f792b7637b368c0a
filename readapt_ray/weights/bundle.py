"""Store a retriever and its knowledge as factors in a small folder (a bundle), to be added to their base when loaded.

    bundle.json            base (name, revision, SHA-256 of its files), scales, encoding, types of the weights
    readapter.safetensors  the retriever's difference (`low_rank`); if the retriever is an adapter, a folder retriever/
    knowledge-1/ ...       each knowledge adapter as a plain PEFT folder, or difference.safetensors
    config.json, tokenizer, 2_Dense/   those of the retriever

In: checked models and scales. Out: such a folder. With it and the base model, the merged model can be made for any
scales. Memory: as `low_rank`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel
from readapt_ray.errors import ModelError, WeightMismatchError
from readapt_ray.model_file_names import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    BUNDLE_NAME,
    CONFIG_NAME,
    MODULES_NAME,
    TOKENIZER_FILES,
)
from readapt_ray.storage import Location
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.dense import copy_dense, modules_of
from readapt_ray.weights.low_rank import DeltaSource, FactorRecord, StoredDifference, write_difference
from readapt_ray.weights.merging import Readapter, Scales
from readapt_ray.weights.provenance import MergeInput
from readapt_ray.weights.scale_options import layer_scales
from readapt_ray.weights.weight_files import DTYPE_CODES, Checkpoint

_FORMAT = 2
_READAPTER = "readapter.safetensors"
_RETRIEVER = "retriever"
_DIFFERENCE = "difference.safetensors"
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def write_bundle(
    target: Location,
    readapter: Readapter,
    *,
    scales: Scales,
    variance: float | None,
    encoding: Encoding,
    config_of: OpenModel,
    tokenizer_of: OpenModel,
    dense_of: OpenModel,
    sources: Mapping[str, Mapping[str, Any]],
    model_fingerprint: str,
    report: Callable[[int], None],
) -> list[FactorRecord]:
    """Write a bundle of factors; a killed call resumes when it is called again. bundle.json is written last.

    Args:
        target: the folder to write.
        readapter: the opened models.
        scales: the default scales of a merge of this bundle. They are recorded, not applied.
        variance: least share of the retriever's squared difference that the factors of each matrix hold (a truncated
            SVD). None stores the difference whole; a retriever that is an adapter is then copied as it is.
        encoding: how the retriever encodes text.
        config_of: the model that has the retriever's config.json.
        tokenizer_of: the model that has the retriever's tokenizer.
        dense_of: the model that has the retriever's Dense modules.
        sources: name, revision, fingerprint and file hashes of each model by role; `pretrained` is the base.
        model_fingerprint: fingerprint of the model that a merge with the same options writes.
        report: called with the number of weight elements done in the current file of differences; it starts again
            with each such file, and copied adapters are not counted.

    Returns:
        A record per weight of how the retriever's difference is stored; empty if it is stored as an adapter.

    Raises:
        ModelError: an input holds NaN or infinity.
    """
    _copy(config_of.folder, (CONFIG_NAME,), target)
    _copy(tokenizer_of.folder, TOKENIZER_FILES, target)
    if dense := copy_dense(dense_of, target):
        (target / MODULES_NAME).write_text(json.dumps(modules_of(["Transformer", "Pooling", *dense]), indent=2) + "\n")
    stored: list[FactorRecord] = []
    if isinstance(readapter.retriever, Adapter) and variance is None:
        _copy(readapter.retriever.folder, (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME), target / _RETRIEVER)
    else:
        stored = write_difference(
            readapter.pretrained, readapter.retriever, target / _READAPTER, variance=variance, report=report
        )
    for number, source in enumerate(readapter.knowledge, start=1):
        folder = target / f"knowledge-{number}"
        if isinstance(source, Adapter):
            _copy(source.folder, (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME), folder)
        else:
            write_difference(readapter.pretrained, source, folder / _DIFFERENCE, variance=None, report=report)
    content = {
        "format": _FORMAT,
        "sources": sources,
        "model_fingerprint": model_fingerprint,
        "readapter_scale": scales.readapter,
        "knowledge_scale": list(scales.knowledge),
        "layer_scales": list(map(str, scales.layers)),
        "low_rank": variance,
        "encoding": encoding.model_dump(mode="json"),
        "dtypes": {name: DTYPE_CODES[readapter.dtype(name)] for name in readapter.pretrained.names()},
        "left_out": [*readapter.dropped, *readapter.carried],
    }
    (target / BUNDLE_NAME).write_text(json.dumps(content, indent=2) + "\n")
    return stored


def _copy(folder: Path, names: Sequence[str], target: Location) -> None:
    for name in names:
        if (folder / name).is_file():
            Location(str(folder / name)).copy_to(target / name)


@dataclass(frozen=True)
class Bundle:
    """A folder of factors on this machine's disk, with the content of its bundle.json."""

    model: OpenModel
    content: Mapping[str, Any]

    @property
    def scales(self) -> Scales:
        """The scales that the bundle was written with; a merge uses them unless told otherwise."""
        layers = layer_scales(self.content.get("layer_scales", ()))
        return Scales(self.content["readapter_scale"], tuple(self.content["knowledge_scale"]), layers)

    @property
    def encoding(self) -> Encoding:
        """How its retriever encodes text."""
        return Encoding.parse(self.content["encoding"], where=str(self.model.folder / BUNDLE_NAME))

    @property
    def base_name(self) -> str:
        """The name by which the user gave the base (pretrained model) when the bundle was written."""
        return str(self.content["sources"]["pretrained"]["name"])

    @property
    def left_out(self) -> tuple[str, ...]:
        """LM heads, which are left out, as "model: tensor"; and poolers that only one model had, by name alone."""
        return tuple(self.content["left_out"])

    def readapter(self, base: Checkpoint) -> Readapter:
        """Open the retriever and the knowledge in the bundle as changes of the base model; only headers are read.

        Args:
            base: the weights of the base model; only names and shapes are compared (`check_base` compares content).

        Raises:
            WeightMismatchError: the factors do not fit the base.
            ModelError: a file of the bundle is missing or damaged.
        """
        dtypes = {name: _DTYPES[code] for name, code in self.content["dtypes"].items()}
        retriever = self._source(
            self.model.folder / _RETRIEVER, _READAPTER, base, f"{self.model.name}/retriever", dtypes
        )
        knowledge = [
            self._source(
                self.model.folder / f"knowledge-{number}", _DIFFERENCE, base, f"{self.model.name}/knowledge-{number}"
            )
            for number in range(1, 1 + len(self.content["knowledge_scale"]))
        ]
        return Readapter(base, retriever, knowledge)

    def _source(
        self, folder: Path, file: str, base: Checkpoint, name: str, dtypes: dict[str, torch.dtype] | None = None
    ) -> DeltaSource:
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            return Adapter(folder, base, name=name)
        path = next((each for each in (folder / file, self.model.folder / file) if each.is_file()), None)
        if path is None:
            raise ModelError(f"the bundle {self.model.name!r} lacks {file}; fetch it again, or write it again")
        return StoredDifference(path, base, name=name, dtypes=dtypes)


def open_bundle(model: OpenModel) -> Bundle:
    """Open the bundle in a model's folder; only bundle.json is read.

    Raises:
        ModelError: the folder holds no bundle, or one of another format.
    """
    return Bundle(model, read_bundle(Location(str(model.folder)), model.name))


def read_bundle(folder: Location, name: str) -> Mapping[str, Any]:
    """Read the bundle.json of a bundle: format, sources, scales, encoding, types of the weights.

    Args:
        folder: folder of the bundle, local or remote.
        name: what the user calls it; used in errors.

    Raises:
        ModelError: the folder holds no bundle, or one of another format.
    """
    file = folder / BUNDLE_NAME
    if not file.is_file():
        raise ModelError(f"{name!r} is no bundle: it has no {BUNDLE_NAME}; give what `readapt merge --factors` wrote")
    try:
        content = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{BUNDLE_NAME} of the bundle {name!r} is not JSON: {error}; write it again") from error
    if content.get("format") != _FORMAT:
        raise ModelError(
            f"the bundle {name!r} has the format {content.get('format')!r}, and this version reads {_FORMAT}; write it again"
        )
    return content


def check_base(model: OpenModel, base: MergeInput) -> None:
    """Check that a base model is the one that a bundle's factors were made from.

    Args:
        model: the bundle.
        base: the record of the base model that was found, with its fingerprint.

    Raises:
        WeightMismatchError: the fingerprints differ.
        ModelError: `model` is not a bundle.
    """
    due = open_bundle(model).content["sources"]["pretrained"]
    if base.fingerprint != due["fingerprint"]:
        revision = f", revision {due['revision']}" * bool(due["revision"])
        raise WeightMismatchError(
            f"the bundle {model.name!r} was made of {due['name']!r} (fingerprint {due['fingerprint']}{revision}), and "
            f"{base.name!r} has {base.fingerprint}; give that very model with --pretrained"
        )
