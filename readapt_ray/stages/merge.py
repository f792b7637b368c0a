"""The merge stage: combine pretrained model, retriever and knowledge adapters into one model folder.

In: three models (or a bundle and its base) and their scales. Out: a Hugging Face folder with the pooling and prompts
of the retriever, which transformers and sentence-transformers load; with --factors a small folder (a bundle), from
which the model can be made for any scales. It runs in the driver without Ray, on all cores, or with --num-workers in
tasks on the nodes of a cluster. Memory is some slices of rows. Time is reading the inputs twice (to hash them, to merge
them) and writing the output.
"""

import contextlib
import dataclasses
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pydantic

from readapt_ray.artifacts import Artifact, Workspace, fingerprint, identify, produce
from readapt_ray.catalog.encoding import EncodingOption
from readapt_ray.cluster import merge_shards
from readapt_ray.config import OptionError, StageConfig, UsedWith
from readapt_ray.storage import Location
from readapt_ray.weights.scale_options import KnowledgeScaleOption, LayerScalesOption

if TYPE_CHECKING:
    from readapt_ray.weights.cast_loss import CastLoss
    from readapt_ray.weights.export import WeightPlan
    from readapt_ray.weights.low_rank import FactorRecord
    from readapt_ray.weights.merge_plan import MergePlan
    from readapt_ray.weights.merging import Readapter, Scales

logger = logging.getLogger("readapt_ray")

_MB = 1_000_000


class MergeConfig(StageConfig):
    """The options of `readapt merge`."""

    pretrained: str | None = None
    """Model before retrieval training: a catalog name, a folder, a GGUF file, a URI or a hub id. With bundle, give it
    only if the base model is now in another place."""
    retriever: str | None = None
    """The same model after retrieval training: full weights, or a LoRA or DoRA adapter."""
    adapter: str | tuple[str, ...] | None = None
    """Knowledge adapter (the output of `readapt train`) or tuned model: a folder, a URI or a hub id; or several,
    separated by commas."""
    bundle: str | None = None
    """Output of `readapt merge --factors`; use it instead of retriever and adapter."""
    readapter_scale: float = 1.0
    """Weight of the retriever's change to the pretrained model; 1.0 keeps it as it is. With bundle, the bundle's
    scale if omitted."""
    knowledge_scale: KnowledgeScaleOption = 0.5
    """Weight of the adapter's change to the pretrained model; choose it with `readapt tune`. One number, or one per
    adapter, separated by commas. With bundle, the bundle's scale if omitted."""
    layer_scales: LayerScalesOption = ()
    """Factors of knowledge_scale in ranges of layers, such as 0-11=0.8,12-23=0.2; layers count from 0. Other layers,
    embeddings and the last norm have a factor of 1. With bundle, the bundle's if omitted."""
    low_rank: float | None = pydantic.Field(default=None, gt=0, le=1)
    """Replace the retriever's change by its truncated SVD that explains this fraction of the variance per matrix
    (LoRE), such as 0.5."""
    factors: bool = False
    """Write low-rank factors (a bundle) instead of a whole model: much smaller, and any pair of scales can be made
    from it later."""
    accept: tuple[Literal["config", "tokenizer", "vocabulary", "base"], ...] = ()
    """Mismatches to allow, separated by commas: config, tokenizer, vocabulary (the retriever's is used), base (an
    adapter's base model)."""
    queries_only: bool = False
    """Make a model that encodes only queries. Passages keep the retriever's vectors: `search` and `serve` accept them
    with this model, and `embed` encodes passages with the retriever."""
    dtype: Literal["retriever", "float32", "float16", "bfloat16"] = "retriever"
    """Data type of the written weights; retriever keeps the type of each of the retriever's tensors."""
    max_shard_bytes: int = pydantic.Field(default=5_000_000_000, ge=1)
    """Maximum size of a weight file in bytes; a larger tensor gets its own file."""
    encoding: EncodingOption = None
    """JSON file with pooling, prompts and special tokens, for a retriever whose folder and the catalog do not have
    them. If omitted, the retriever's own."""
    num_workers: int = pydantic.Field(default=0, ge=0)
    """Ray tasks that write weight files at the same time, on any node of the cluster. 0 writes them on this machine
    with all its cores."""
    num_cpus_per_worker: int = pydantic.Field(default=1, ge=1)
    """CPUs, and so threads, per Ray task."""
    measures: str | None = None
    """Output of `readapt tune` or `readapt evaluate` whose result is shown in the model card."""
    push: str | None = None
    """Also send the model with its card to the Hugging Face hub: hub:OWNER/NAME. The repository is private. HF_TOKEN
    must hold a token that may write."""
    public: bool = False
    """Let anybody read the repository of push. Its card names the input models as they were given here."""

    inputs: ClassVar[frozenset[str]] = frozenset({"pretrained", "retriever", "adapter", "bundle", "measures"})
    safety: ClassVar[frozenset[str]] = StageConfig.safety | {"accept"}
    used_with: ClassVar[UsedWith] = {"num_cpus_per_worker": ("num_workers", ()), "public": ("push", ())}
    operational: ClassVar[frozenset[str]] = frozenset(
        {"accept", "num_workers", "num_cpus_per_worker", "push", "public"}
    )

    @pydantic.model_validator(mode="after")
    def _check_models(self) -> "MergeConfig":
        given = {name for name in ("pretrained", "retriever", "adapter") if getattr(self, name) is not None}
        if self.bundle is None and len(given) < 3:
            missing = ", ".join(f"{{{name}}}" for name in ("pretrained", "retriever", "adapter") if name not in given)
            raise OptionError(f"{missing} required: give {{pretrained}}, {{retriever}} and {{adapter}}, or {{bundle}}")
        if self.bundle is not None and given - {"pretrained"}:
            raise OptionError(
                "a {bundle} holds {retriever} and {adapter}; give it alone, or with {pretrained} for where its base model is"
            )
        if self.bundle is not None and (self.factors or self.low_rank is not None):
            raise OptionError("{factors} and {low_rank} write what a bundle already is; give the three models instead")
        if self.queries_only and (self.bundle is not None or self.factors):
            raise OptionError(
                "{queries_only} names the {retriever} as the model of the passages, and writes a model; give the three models, "
                "without {factors}"
            )
        if self.push is not None and self.factors:
            raise OptionError("{push} sends a whole model; leave {factors} out")
        if self.num_workers and (self.factors or self.low_rank is not None):
            raise OptionError(
                "{num_workers} spreads the weight files of a model over the cluster; factors and a low rank are computed on "
                "one machine, so leave it 0"
            )
        return self

    @pydantic.field_validator("adapter", mode="before")
    @classmethod
    def _adapters_or_one(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            if not value or not all(isinstance(each, str) and each.strip() for each in value):
                raise ValueError("give the folder or URI of one adapter, or several with commas between them")
            return value[0].strip() if len(value) == 1 else tuple(each.strip() for each in value)
        return value

    @property
    def adapters(self) -> tuple[str, ...]:
        """The knowledge adapters as the user named them; empty with a bundle."""
        return (self.adapter,) if isinstance(self.adapter, str) else self.adapter or ()


@dataclass(frozen=True)
class _Merge:
    """The options, opened models and scales of one merge."""

    config: MergeConfig
    plan: "MergePlan"
    scales: "Scales"
    measures: list[str]
    """Lines of Markdown for the model card."""


def merge(config: MergeConfig) -> Artifact:
    """Merge the models into a model folder (RE-AdaptIR, section 2.2), or write a bundle of factors for such a merge.

    A killed merge resumes with the missing files. If the output is complete and of the same options and inputs, nothing
    is merged, but `push` is done.

    Raises:
        ModelError: a model cannot be found or read, holds NaN, or nothing says how the retriever encodes.
        WeightMismatchError: the models do not fit each other; the message lists what differs.
        InputError: there is neither one knowledge scale nor one per adapter; the model lacks layers of layer_scales; or
            `push` or `measures` names something else.
        ArtifactConflictError: the output folder holds something else.
    """
    from readapt_ray.catalog.models import open_model
    from readapt_ray.catalog.query_models import refuse_query_model
    from readapt_ray.weights import push
    from readapt_ray.weights.merge_plan import MergeModels, plan_merge
    from readapt_ray.weights.model_card import measures_of

    repo_id = push.repository(config.push) if config.push is not None else None
    if config.retriever is not None:
        refuse_query_model(open_model(config.retriever))
    models = MergeModels(**{field.name: getattr(config, field.name) for field in dataclasses.fields(MergeModels)})
    plan = plan_merge(models, as_factors=config.factors or config.low_rank is not None)
    given = {
        name: getattr(config, name) if name in config.model_fields_set or plan.bundle is None else None
        for name in ("readapter_scale", "knowledge_scale", "layer_scales")
    }
    merged = _Merge(config, plan, plan.scales(**given), measures_of(config.measures) if config.measures else [])
    work = _write_factors if config.factors else _write_model
    made = produce("merge", work=lambda workspace: work(workspace, merged), **_identity(merged))
    if repo_id is not None:
        push.push(made.location, repo_id, is_public=config.public, fingerprint=made.fingerprint)
    return made


def _identity(merged: _Merge) -> dict[str, Any]:
    """Return everything that decides the result. Merging models or merging their bundle gives the same."""
    by_option: dict[str, list[str]] = {}
    for role, identified in merged.plan.made_of:
        by_option.setdefault(role.split(" ")[0], []).append(identified)
    inputs = {option: ",".join(found) for option, found in by_option.items()}
    scales, bundle = merged.scales, merged.plan.bundle
    own = {
        "readapter_scale": scales.readapter,
        "knowledge_scale": scales.knowledge[0] if len({*scales.knowledge}) == 1 else scales.knowledge,
        "layer_scales": tuple(map(str, scales.layers)),
        "low_rank": bundle.content["low_rank"] if bundle else merged.config.low_rank,
    }
    return {
        "config": merged.config.model_copy(update=own),
        "inputs": inputs | ({"measures": fingerprint(merged.measures)} if merged.measures else {}),
        "identity": {
            "encoding": merged.plan.encoding.model_dump(mode="json"),
            "scales": [scales.readapter, *scales.knowledge],
        },
    }


def _model_fingerprint(merged: _Merge) -> str:
    """Return the fingerprint that a merge of this bundle with the default output options will have."""
    made = _identity(merged)
    names = ("factors", "dtype", "max_shard_bytes")
    as_model = {name: MergeConfig.model_fields[name].default for name in names}
    return identify("merge", made.pop("config").model_copy(update=as_model), **made)


def _write_model(workspace: Workspace, merged: _Merge) -> None:
    from readapt_ray.weights import export

    config, models = merged.config, merged.plan
    with _low_rank(workspace, config, models.readapter) as (readapter, stored):
        plan = export.plan_shards(readapter, dtype=config.dtype, max_shard_bytes=config.max_shard_bytes)
        _write_small_files(workspace, merged, plan)
        loss = _write_weights(workspace, merged, readapter, plan)
    lost = sorted({*models.readapter.carried} - {*readapter.carried})
    left_out = [*models.left_out, *models.readapter.dropped, *lost]
    (workspace.location / "README.md").write_text(_card(merged, plan, loss, left_out, stored))
    export.forget_progress(plan, workspace.location)
    workspace.counts |= {
        "num_tensors": len(plan.dtypes),
        "num_parameters": sum(math.prod(readapter.shape(name)) for name in plan.dtypes),
        "num_shards": len(plan.shards),
        "num_bytes": plan.num_bytes,
    }
    workspace.details |= _details(merged, left_out, stored) | {
        "dtype": plan.main_dtype,
        "kept_from_one_side": list(readapter.carried),
        "survives_cast": loss.survives(),
    }


def _write_small_files(workspace: Workspace, merged: _Merge, plan: "WeightPlan") -> None:
    """Write config, tokenizer and encoding."""
    from readapt_ray.weights import model_files

    models = merged.plan
    model_files.write_model_files(
        workspace.location,
        config=model_files.headless_config(models.config_of.config, dtype=plan.main_dtype, name=models.config_of.name),
        tokenizer=models.tokenizer_of.tokenizer,
        encoding=models.encoding,
        contract={
            "fingerprint": workspace.fingerprint,
            **(_passages_entry(merged) if merged.config.queries_only else {}),
        },
        dense_of=models.dense_of,
    )


def _passages_entry(merged: _Merge) -> dict[str, Any]:
    """Return the entry of readapt.json that names the retriever, which encodes the passages."""
    from readapt_ray.catalog.models import open_model
    from readapt_ray.catalog.query_models import describe_passages

    return describe_passages(open_model(str(merged.config.retriever)), merged.plan.encoding).to_json()


def _write_weights(workspace: Workspace, merged: _Merge, readapter: "Readapter", plan: "WeightPlan") -> "CastLoss":
    """Write the missing weight files, on this machine or in tasks on the cluster."""
    from readapt_ray.weights import export

    config, total = merged.config, max(1, round(plan.num_bytes / _MB))

    def report(done: int) -> None:
        workspace.progress(round(done / _MB), total, unit="MB")

    if not config.num_workers:
        return export.write_weights(readapter, merged.scales, plan, workspace.location, report=report)
    job = merge_shards.ShardJob(
        models=merged.plan.models,
        fingerprints=tuple(each.fingerprint for each in merged.plan.sources),
        scales=merged.scales,
        plan=plan,
        target=workspace.location,
        num_threads=config.num_cpus_per_worker,
    )
    return merge_shards.write_on_cluster(job, num_workers=config.num_workers, report=report)


def _card(
    merged: _Merge, plan: "WeightPlan", loss: "CastLoss", left_out: Sequence[str], stored: list["FactorRecord"]
) -> str:
    from readapt_ray.weights.model_card import model_card, truncation_note

    scales = merged.scales
    notes = [f"Left out, since no vector depends on it: {each}" for each in left_out]
    return model_card(
        encoding=merged.plan.encoding,
        scales=f"readapter {scales.readapter}, knowledge {', '.join(map(str, scales.knowledge))}"
        + "".join(f", times {each.scale} in layers {each.layers}" for each in scales.layers),
        command=_command(merged.config),
        sources=merged.plan.sources,
        survives=loss.survives(),
        dtype=plan.main_dtype,
        measures=merged.measures,
        notes=[*_queries_note(merged.config), *notes, *truncation_note(stored)],
    )


def _queries_note(config: MergeConfig) -> list[str]:
    return [f"For queries alone: passages are encoded by {config.retriever}."] if config.queries_only else []


@contextlib.contextmanager
def _low_rank(
    workspace: Workspace, config: MergeConfig, whole: "Readapter"
) -> Iterator[tuple["Readapter", list["FactorRecord"]]]:
    """Yield the models, with the retriever's difference truncated if low_rank is set, and records of the truncation."""
    from readapt_ray.weights.low_rank import StoredDifference, write_difference
    from readapt_ray.weights.merging import Readapter

    if config.low_rank is None:
        yield whole, []
        return
    with tempfile.TemporaryDirectory(prefix="readapt-low-rank-") as temporary:
        # If the output is on a local disk, the factors are kept there, so that a killed merge can resume with them.
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


def _write_factors(workspace: Workspace, merged: _Merge) -> None:
    from readapt_ray.weights.bundle import write_bundle

    models, readapter = merged.plan, merged.plan.readapter
    stored = write_bundle(
        workspace.location,
        readapter,
        scales=merged.scales,
        variance=merged.config.low_rank,
        encoding=models.encoding,
        config_of=models.config_of,
        tokenizer_of=models.tokenizer_of,
        dense_of=models.dense_of,
        sources={each.role: each.to_json() for each in merged.plan.sources},
        model_fingerprint=_model_fingerprint(merged),
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
    workspace.details |= _details(merged, [*readapter.dropped, *readapter.carried], stored)
    workspace.details |= {"measures": merged.measures} if merged.measures else {}


def _element_report(workspace: Workspace, readapter: "Readapter") -> Callable[[int], None]:
    total = sum(math.prod(readapter.shape(name)) for name in readapter.names()) // _MB
    return lambda done: workspace.progress(done // _MB, max(1, total), unit="M weights", note="factors")


def _details(merged: _Merge, left_out: list[str], stored: list["FactorRecord"]) -> dict[str, Any]:
    details = {
        "readapter_scale": merged.scales.readapter,
        "knowledge_scale": list(merged.scales.knowledge),
        **({"layer_scales": list(map(str, merged.scales.layers))} if merged.scales.layers else {}),
        "sources": {each.role: each.to_json() for each in merged.plan.sources},
        "left_out": left_out,
        "encoding": merged.plan.encoding.model_dump(mode="json"),
    }
    if stored:
        details["low_rank"] = [dataclasses.asdict(each) for each in stored]
    return details


def _command(config: MergeConfig) -> str:
    from readapt_ray.weights.provenance import command_line

    left_out = {"overwrite", "encoding", "num_workers", "num_cpus_per_worker", "push", "public"}
    given = config.model_fields_set - left_out
    options = {name: value for name, value in config.settings().items() if name in given}
    return command_line("merge", {**options, "output": "FOLDER"})
