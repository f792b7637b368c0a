"""The merge stage: pretrained, retriever and knowledge adapters become one model folder.

In: three models and two scales. Out: a Hugging Face folder that plain transformers and
sentence-transformers load and pool as the retriever asks. It runs in the driver without Ray; memory
is a slice of rows, time is that of reading the inputs and writing the output.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pydantic

from readapt_ray.artifacts import BUILDING_NAME, MANIFEST_NAME, Artifact, Workspace, produce
from readapt_ray.catalog.models import Model, encoding_of, find_model, load_tokenizer
from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.config import StageConfig
from readapt_ray.errors import ModelError
from readapt_ray.retrieval.templates import EncodingOption
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.weights.readapter import Readapter, Scales

_MB = 1_000_000


class MergeConfig(StageConfig):
    """The options of `readapt merge`."""

    pretrained: str
    """The model before any retrieval training: catalog name, folder, URI or hub id."""
    retriever: str
    """The same model after it: full weights, or a LoRA or DoRA adapter."""
    adapter: str | tuple[str, ...]
    """The knowledge adapter of `readapt train` (folder, URI or hub id); several with commas between them."""
    readapter_scale: float = 1.0
    """Share of the retrieval skill that is kept; 1.0 keeps all."""
    knowledge_scale: float | tuple[float, ...] = 0.5
    """Share of the new domain that is added; one number, or one for each adapter with commas between them."""
    dtype: Literal["retriever", "float32", "float16", "bfloat16"] = "retriever"
    """Type of the written weights; `retriever` takes for each tensor what the retriever has."""
    max_shard_bytes: int = pydantic.Field(default=5_000_000_000, ge=1)
    """Bound of a weight file in bytes; a larger tensor has a file of its own."""
    encoding: EncodingOption = None
    """How text becomes a vector (a JSON file), for a retriever that nothing is known of; its own contract otherwise."""

    inputs: ClassVar[frozenset[str]] = frozenset({"pretrained", "retriever", "adapter"})

    @pydantic.field_validator("adapter", mode="before")
    @classmethod
    def _split_adapters(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        if isinstance(names, list | tuple):
            if not names or not all(isinstance(each, str) and each.strip() for each in names):
                raise ValueError("give the folder or URI of one adapter, or several with commas between them")
            return names[0].strip() if len(names) == 1 else tuple(each.strip() for each in names)
        return value

    @pydantic.field_validator("knowledge_scale", mode="before")
    @classmethod
    def _split_scales(cls, value: Any) -> Any:
        given = value.split(",") if isinstance(value, str) else value
        given = list(given) if isinstance(given, list | tuple) else [given]
        try:
            scales = [float(each) for each in given]
        except (TypeError, ValueError):
            scales = []
        if (
            not scales
            or not all(math.isfinite(each) for each in scales)
            or any(isinstance(each, bool) for each in given)
        ):
            raise ValueError("give a finite number such as 0.5, or one for each adapter with commas between them")
        return scales[0] if len(scales) == 1 else tuple(scales)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The knowledge adapters."""
        return (self.adapter,) if isinstance(self.adapter, str) else self.adapter


@dataclass(frozen=True, kw_only=True)
class _Resolved:
    """What the names in the config stand for; all of it fits together."""

    pretrained: Model
    retriever: Model
    adapters: tuple[Model, ...]
    readapter: "Readapter"
    scales: "Scales"
    encoding: Encoding


def merge(config: MergeConfig) -> Artifact:
    """Merge the three models into a model folder (RE-AdaptIR, section 2.2).

    Raises:
        ModelError: a model cannot be found or read, holds NaN, or nothing says how the retriever encodes.
        WeightMismatchError: the models do not fit each other; what differs is listed.
        InputError: as many scales as adapters, or one, are due.
        ArtifactConflictError: the output holds something else.
    """
    resolved = _resolve(config)
    inputs = {"pretrained": resolved.pretrained.fingerprint(), "retriever": resolved.retriever.fingerprint()}
    inputs["adapter"] = ",".join(adapter.fingerprint() for adapter in resolved.adapters)
    sources = _sources(resolved, inputs)
    identity = {"encoding": resolved.encoding.model_dump(mode="json")}
    return produce(
        "merge",
        config,
        inputs=inputs,
        work=lambda workspace: _work(workspace, config, resolved, sources),
        identity=identity,
    )


def _resolve(config: MergeConfig) -> _Resolved:
    """Everything that headers can tell is checked here, before a weight is read."""
    from readapt_ray.weights.adapter import Adapter
    from readapt_ray.weights.checkpoint import Checkpoint
    from readapt_ray.weights.live import spread
    from readapt_ray.weights.readapter import Readapter, Scales, open_retriever

    pretrained, retriever = _find("pretrained", config.pretrained), _find("retriever", config.retriever)
    adapters = tuple(_find("adapter", name) for name in config.adapters)
    before = Checkpoint(pretrained.folder, name=pretrained.name)
    knowledge = [Adapter(adapter.folder, before, name=adapter.name) for adapter in adapters]
    after = open_retriever(retriever.folder, before, name=retriever.name)
    return _Resolved(
        pretrained=pretrained,
        retriever=retriever,
        adapters=adapters,
        readapter=Readapter(before, after, knowledge),
        scales=Scales(config.readapter_scale, spread(config.knowledge_scale, len(adapters))),
        encoding=config.encoding or encoding_of(retriever),
    )


def _find(option: str, name: str) -> Model:
    model = find_model(name)
    if (model.folder / BUILDING_NAME).is_file() and not (model.folder / MANIFEST_NAME).is_file():
        raise ModelError(
            f"{option} = {name!r} is unfinished; run the stage that makes it again, it goes on where it stopped"
        )
    if option == "pretrained" and model.is_adapter:
        raise ModelError(f"pretrained = {name!r} is an adapter; give the full model that it was trained on")
    if option == "adapter" and not model.is_adapter:
        raise ModelError(f"adapter = {name!r} is a full model; give the PEFT folder that `readapt train` wrote")
    return model


def _work(workspace: Workspace, config: MergeConfig, resolved: _Resolved, sources: dict[str, dict[str, str]]) -> None:
    from readapt_ray.weights import export, model_files

    scales, readapter = resolved.scales, resolved.readapter
    plan = export.plan_shards(readapter, dtype=config.dtype, max_shard_bytes=config.max_shard_bytes)
    leading = resolved.pretrained if resolved.retriever.is_adapter else resolved.retriever
    model_files.write_model_files(
        workspace.location,
        config=model_files.headless_config(leading.read_json("config.json"), dtype=plan.main_dtype, name=leading.name),
        tokenizer=_tokenizer(resolved),
        encoding=resolved.encoding,
        contract={"fingerprint": workspace.fingerprint},
        card=model_files.model_card(
            encoding=resolved.encoding,
            scales=f"readapter {scales.readapter}, knowledge {', '.join(map(str, scales.knowledge))}",
            sources=sources,
            notes=[f"Left out, since no vector depends on it: {each}" for each in readapter.dropped],
        ),
    )
    _remove_cut_short(workspace.location)
    total = max(1, round(plan.num_bytes / _MB))
    export.write_weights(
        readapter,
        scales,
        plan,
        workspace.location,
        report=lambda done: workspace.progress(round(done / _MB), total, unit="MB"),
    )
    workspace.counts |= {
        "num_tensors": len(plan.dtypes),
        "num_parameters": sum(math.prod(readapter.shape(name)) for name in plan.dtypes),
        "num_shards": len(plan.shards),
        "num_bytes": plan.num_bytes,
    }
    workspace.details |= {
        "readapter_scale": scales.readapter,
        "knowledge_scale": list(scales.knowledge),
        "dtype": plan.main_dtype,
        "sources": sources,
        "left_out": list(readapter.dropped),
        "kept_from_one_side": list(readapter.carried),
        "encoding": resolved.encoding.model_dump(mode="json"),
    }


def _tokenizer(resolved: _Resolved) -> Any:
    """The retriever's own; an adapter without one has that of the model it is laid on."""
    retriever = resolved.retriever
    has_own = any((retriever.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return load_tokenizer(retriever if has_own or not retriever.is_adapter else resolved.pretrained)


def _sources(resolved: _Resolved, inputs: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Name and fingerprint of each ingredient; adapters are small enough to be hashed besides."""
    from readapt_ray.weights.adapter import WEIGHTS_NAME

    found = {
        "pretrained": {"name": resolved.pretrained.name, "fingerprint": inputs["pretrained"]},
        "retriever": {"name": resolved.retriever.name, "fingerprint": inputs["retriever"]},
    }
    marks = inputs["adapter"].split(",")
    for number, (adapter, mark) in enumerate(zip(resolved.adapters, marks, strict=True), start=1):
        role = "adapter" if len(marks) == 1 else f"adapter {number}"
        found[role] = {"name": adapter.name, "fingerprint": mark}
        found[role]["sha256"] = Location(str(adapter.folder / WEIGHTS_NAME)).sha256()
    return found


def _remove_cut_short(location: Location) -> None:
    """Delete what a killed merge was in the middle of writing; the lease makes sure that nobody else writes here."""
    if location.is_local:
        for path in location.local_path.glob(".tmp-*.safetensors"):
            path.unlink(missing_ok=True)
