"""The merge stage: pretrained, retriever and knowledge adapters become one model folder, or a bundle of factors.

In: three models (or a bundle and its base) and two scales. Out: a Hugging Face folder that plain
transformers and sentence-transformers load and pool as the retriever asks; with --factors a small
folder from which any pair of scales can be made again. It runs in the driver without Ray, on all
cores; memory is some slices of rows, time is that of reading the inputs and writing the output.
"""

import contextlib
import dataclasses
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pydantic

from readapt_ray.artifacts import (
    BUILDING_NAME,
    MANIFEST_NAME,
    Artifact,
    Workspace,
    fingerprint,
    produce,
)
from readapt_ray.catalog.models import Model, encoding_of, find_model, load_tokenizer
from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.config import StageConfig
from readapt_ray.errors import ModelError
from readapt_ray.retrieval.templates import EncodingOption
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.weights.bundle import Bundle
    from readapt_ray.weights.low_rank import Stored
    from readapt_ray.weights.provenance import Ingredient
    from readapt_ray.weights.readapter import Readapter, Scales

logger = logging.getLogger("readapt_ray")

_MB = 1_000_000


class MergeConfig(StageConfig):
    """The options of `readapt merge`."""

    pretrained: str | None = None
    """The model before any retrieval training: catalog name, folder, URI or hub id; with --bundle, where its base lies now."""
    retriever: str | None = None
    """The same model after it: full weights, or a LoRA or DoRA adapter."""
    adapter: str | tuple[str, ...] | None = None
    """The knowledge adapter of `readapt train`, or the tuned model (folder, URI or hub id); several with commas between."""
    bundle: str | None = None
    """What `readapt merge --factors` wrote: it stands for retriever and adapter, and names its base."""
    readapter_scale: float = 1.0
    """Share of the retrieval skill that is kept; 1.0 keeps all. With --bundle, the bundle's unless given."""
    knowledge_scale: float | tuple[float, ...] = 0.5
    """Share of the new domain that is added; one number, or one for each adapter with commas. As above with --bundle."""
    low_rank: float | None = pydantic.Field(default=None, gt=0, le=1)
    """Replace `retriever - pretrained` by its truncated SVD per matrix at this explained variance (LoRE), such as 0.5."""
    factors: bool = False
    """Write a bundle of factors next to their base instead of a model: small, and good for any pair of scales."""
    accept: tuple[Literal["config", "tokenizer", "vocabulary"], ...] = ()
    """Differences between pretrained and retriever that are meant: config, tokenizer, vocabulary; the retriever's is taken."""
    dtype: Literal["retriever", "float32", "float16", "bfloat16"] = "retriever"
    """Type of the written weights; `retriever` takes for each tensor what the retriever has."""
    max_shard_bytes: int = pydantic.Field(default=5_000_000_000, ge=1)
    """Bound of a weight file in bytes; a larger tensor has a file of its own."""
    encoding: EncodingOption = None
    """How text becomes a vector (a JSON file), for a retriever that nothing is known of; its own contract otherwise."""
    measures: str | None = None
    """Output folder of `readapt tune` or `readapt evaluate` whose result the model card shows."""

    inputs: ClassVar[frozenset[str]] = frozenset({"pretrained", "retriever", "adapter", "bundle", "measures"})

    @pydantic.field_validator("accept", mode="before")
    @classmethod
    def _split_accept(cls, value: Any) -> Any:
        return tuple(each for each in value.split(",") if each) if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _check_models(self) -> "MergeConfig":
        given = {name for name in ("pretrained", "retriever", "adapter") if getattr(self, name) is not None}
        if self.bundle is None and len(given) < 3:
            missing = ", ".join(name for name in ("pretrained", "retriever", "adapter") if name not in given)
            raise ValueError(f"{missing} required: give pretrained, retriever and adapter, or a bundle")
        if self.bundle is not None and given - {"pretrained"}:
            raise ValueError(
                "a bundle holds retriever and adapter; give it alone, or with pretrained for where its base lies"
            )
        if self.bundle is not None and (self.factors or self.low_rank is not None):
            raise ValueError("factors and low_rank write what a bundle already is; give the three models instead")
        return self

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
        return (self.adapter,) if isinstance(self.adapter, str) else self.adapter or ()


@dataclass(frozen=True, kw_only=True)
class _Resolved:
    """What the names in the config stand for; all of it fits together."""

    models: tuple[tuple[str, Model], ...]
    """Role and model of each input."""
    readapter: "Readapter"
    scales: "Scales"
    encoding: Encoding
    config_of: Model
    tokenizer_of: Model
    bundle: "Bundle | None" = None


def merge(config: MergeConfig) -> Artifact:
    """Merge the models into a model folder (RE-AdaptIR, section 2.2), or write the factors that it would be made of.

    Raises:
        ModelError: a model cannot be found or read, holds NaN, or nothing says how the retriever encodes.
        WeightMismatchError: the models do not fit each other; what differs is listed.
        InputError: as many scales as adapters, or one, are due.
        ArtifactConflictError: the output holds something else.
    """
    from readapt_ray.weights.model_card import measures_of
    from readapt_ray.weights.provenance import describe

    resolved = _resolve_bundle(config) if config.bundle is not None else _resolve(config)
    sources = describe(resolved.models)
    if resolved.bundle is not None:
        resolved.bundle.check_base(sources[0].fingerprint, sources[0].name)
    inputs: dict[str, str] = {}
    for source in sources:
        option = source.role.split(" ")[0]
        inputs[option] = f"{inputs[option]},{source.fingerprint}" if option in inputs else source.fingerprint
    measures = measures_of(config.measures) if config.measures is not None else []
    if measures:
        inputs["measures"] = fingerprint(measures)
    work = _write_factors if config.factors else _write_model
    return produce(
        "merge",
        config,
        inputs=inputs,
        work=lambda workspace: work(workspace, config, resolved, sources, measures),
        identity={
            "encoding": resolved.encoding.model_dump(mode="json"),
            "scales": [resolved.scales.readapter, *resolved.scales.knowledge],
        },
    )


def _resolve(config: MergeConfig) -> _Resolved:
    """Everything that headers, configs and tokenizers can tell is checked here, before a weight is read."""
    from readapt_ray.weights.adapter import Adapter
    from readapt_ray.weights.agreement import check_configs, check_tokenizers
    from readapt_ray.weights.checkpoint import Checkpoint
    from readapt_ray.weights.live import spread
    from readapt_ray.weights.readapter import Readapter, Scales, open_retriever

    pretrained, retriever = _find("pretrained", config.pretrained), _find("retriever", config.retriever)
    adapters = [_find("adapter", name) for name in config.adapters]
    before = Checkpoint(pretrained.folder, name=pretrained.name)
    knowledge = [open_retriever(adapter.folder, before, name=adapter.name) for adapter in adapters]
    after = open_retriever(retriever.folder, before, name=retriever.name)
    accept_vocabulary = "vocabulary" in config.accept
    readapter = Readapter(before, after, knowledge, accept_vocabulary=accept_vocabulary)
    for model, source in [(retriever, after), *zip(adapters, knowledge, strict=True)]:
        if not isinstance(source, Adapter) and not (model is retriever and "config" in config.accept):
            check_configs(pretrained, model)
    if "tokenizer" not in config.accept:
        check_tokenizers(pretrained, retriever, accept_vocabulary=accept_vocabulary)
    config_of = pretrained if retriever.is_adapter else retriever
    roles = [f"adapter {number}" for number in range(1, 1 + len(adapters))] if len(adapters) > 1 else ["adapter"]
    return _Resolved(
        models=(("pretrained", pretrained), ("retriever", retriever), *zip(roles, adapters, strict=True)),
        readapter=readapter,
        scales=Scales(config.readapter_scale, spread(config.knowledge_scale, len(adapters))),
        encoding=config.encoding or encoding_of(retriever),
        config_of=config_of,
        tokenizer_of=retriever if _has_tokenizer(retriever) or not retriever.is_adapter else pretrained,
    )


def _resolve_bundle(config: MergeConfig) -> _Resolved:
    from readapt_ray.weights.bundle import open_bundle
    from readapt_ray.weights.checkpoint import Checkpoint
    from readapt_ray.weights.live import spread
    from readapt_ray.weights.readapter import Scales

    model = find_model(str(config.bundle))
    bundle = open_bundle(model)
    pretrained = _find("pretrained", config.pretrained or bundle.base_name)
    readapter = bundle.readapter(Checkpoint(pretrained.folder, name=pretrained.name))
    given = config.model_fields_set
    readapter_scale = config.readapter_scale if "readapter_scale" in given else bundle.scales.readapter
    knowledge_scale = config.knowledge_scale if "knowledge_scale" in given else bundle.scales.knowledge
    return _Resolved(
        models=(("pretrained", pretrained), ("bundle", model)),
        readapter=readapter,
        scales=Scales(readapter_scale, spread(knowledge_scale, len(readapter.knowledge))),
        encoding=config.encoding or bundle.encoding,
        config_of=model,
        tokenizer_of=model,
        bundle=bundle,
    )


def _find(option: str, name: str | None) -> Model:
    from readapt_ray.weights.pickled import safe_folder

    model = find_model(str(name))
    if (model.folder / BUILDING_NAME).is_file() and not (model.folder / MANIFEST_NAME).is_file():
        raise ModelError(
            f"{option} = {name!r} is unfinished; run the stage that makes it again, it goes on where it stopped"
        )
    if option == "pretrained" and model.is_adapter:
        raise ModelError(f"pretrained = {name!r} is an adapter; give the full model that it was trained on")
    return replace(model, folder=safe_folder(model.folder, model.name))


def _has_tokenizer(model: Model) -> bool:
    return any((model.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _write_model(
    workspace: Workspace,
    config: MergeConfig,
    resolved: _Resolved,
    sources: Sequence["Ingredient"],
    measures: list[str],
) -> None:
    from readapt_ray.weights import export, model_files
    from readapt_ray.weights.model_card import model_card, truncation_note

    scales = resolved.scales
    with _low_rank(workspace, config, resolved) as (readapter, stored):
        plan = export.plan_shards(readapter, dtype=config.dtype, max_shard_bytes=config.max_shard_bytes)
        model_files.write_model_files(
            workspace.location,
            config=model_files.headless_config(
                resolved.config_of.read_json("config.json"), dtype=plan.main_dtype, name=resolved.config_of.name
            ),
            tokenizer=load_tokenizer(resolved.tokenizer_of),
            encoding=resolved.encoding,
            contract={"fingerprint": workspace.fingerprint},
        )
        total = max(1, round(plan.num_bytes / _MB))
        loss = export.write_weights(
            readapter,
            scales,
            plan,
            workspace.location,
            report=lambda done: workspace.progress(round(done / _MB), total, unit="MB"),
        )
    left_out = [*readapter.dropped, *(resolved.bundle.content["left_out"] if resolved.bundle else ())]
    notes = [f"Left out, since no vector depends on it: {each}" for each in left_out]
    card = model_card(
        encoding=resolved.encoding,
        scales=f"readapter {scales.readapter}, knowledge {', '.join(map(str, scales.knowledge))}",
        command=_command(config),
        sources=sources,
        survives=loss.survives(),
        dtype=plan.main_dtype,
        measures=measures,
        notes=[*notes, *truncation_note(stored)],
    )
    (workspace.location / "README.md").write_text(card)
    export.forget_progress(plan, workspace.location)
    workspace.counts |= {
        "num_tensors": len(plan.dtypes),
        "num_parameters": sum(math.prod(readapter.shape(name)) for name in plan.dtypes),
        "num_shards": len(plan.shards),
        "num_bytes": plan.num_bytes,
    }
    workspace.details |= _details(resolved, sources, left_out, stored) | {
        "dtype": plan.main_dtype,
        "kept_from_one_side": list(readapter.carried),
        "survives_cast": loss.survives(),
    }


@contextlib.contextmanager
def _low_rank(
    workspace: Workspace, config: MergeConfig, resolved: _Resolved
) -> Iterator[tuple["Readapter", list["Stored"]]]:
    """The models, with the retriever's difference truncated where that was asked for."""
    from readapt_ray.weights.low_rank import StoredDifference, write_difference
    from readapt_ray.weights.readapter import Readapter

    if config.low_rank is None:
        yield resolved.readapter, []
        return
    whole = resolved.readapter
    with tempfile.TemporaryDirectory(prefix="readapt-low-rank-") as temporary:
        # On a disk the factors lie beside the output, where a killed merge finds those that it had made.
        folder = workspace.location if workspace.location.is_local else Location(temporary)
        file = folder / "low-rank.factors"
        stored = write_difference(
            whole.pretrained, whole.retriever, file, variance=config.low_rank, report=_element_report(workspace, whole)
        )
        dtypes = {name: whole.dtype(name) for name in whole.names()}
        truncated = StoredDifference(file.local_path, whole.pretrained, name=whole.retriever.name, dtypes=dtypes)
        yield Readapter(whole.pretrained, truncated, whole.knowledge), stored
        file.delete()
        Location(f"{file.uri}.json").delete()


def _write_factors(
    workspace: Workspace,
    config: MergeConfig,
    resolved: _Resolved,
    sources: Sequence["Ingredient"],
    measures: list[str],
) -> None:
    from readapt_ray.weights.bundle import write_bundle

    readapter = resolved.readapter
    stored = write_bundle(
        workspace.location,
        readapter,
        scales=resolved.scales,
        variance=config.low_rank,
        encoding=resolved.encoding,
        config_of=resolved.config_of,
        tokenizer_of=resolved.tokenizer_of,
        sources={each.role: each.to_json() for each in sources},
        report=_element_report(workspace, readapter),
    )
    num_bytes = sum(info.size for _, info in workspace.location.listing(".safetensors", recursive=True))
    model_bytes = sum(math.prod(readapter.shape(name)) * readapter.dtype(name).itemsize for name in readapter.names())
    if num_bytes > model_bytes / 2:
        logger.warning(
            "the factors take %d MB, against %d MB of the model: the retriever is kept as a whole; --low-rank 0.5 truncates it",
            num_bytes // _MB,
            model_bytes // _MB,
        )
    workspace.counts |= {"num_tensors": len(readapter.names()), "num_bytes": num_bytes}
    workspace.details |= _details(resolved, sources, [*readapter.dropped, *readapter.carried], stored)
    workspace.details |= {"measures": measures} if measures else {}


def _element_report(workspace: Workspace, readapter: "Readapter") -> Callable[[int], None]:
    total = sum(math.prod(readapter.shape(name)) for name in readapter.names()) // _MB
    return lambda done: workspace.progress(done // _MB, max(1, total), unit="M weights", note="factors")


def _details(
    resolved: _Resolved, sources: Sequence["Ingredient"], left_out: list[str], stored: list["Stored"]
) -> dict[str, Any]:
    details = {
        "readapter_scale": resolved.scales.readapter,
        "knowledge_scale": list(resolved.scales.knowledge),
        "sources": {each.role: each.to_json() for each in sources},
        "left_out": left_out,
        "encoding": resolved.encoding.model_dump(mode="json"),
    }
    if stored:
        details["low_rank"] = [dataclasses.asdict(each) for each in stored]
    return details


def _command(config: MergeConfig) -> str:
    from readapt_ray.weights.provenance import command_line

    options = {name: value for name, value in config.settings().items() if name in config.model_fields_set}
    return command_line("merge", {**options, "overwrite": None, "encoding": None, "output": "FOLDER"})
