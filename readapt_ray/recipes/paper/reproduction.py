"""Make the artifacts of the paper's experiments, on one or several corpora.

    ROOT/CORPUS/corpus                  passages, queries, qrels
    ROOT/CORPUS/subsets/PASSAGES-SEED   a part of the passages, to train an adapter on; -rows: the same as JSONL
    ROOT/CORPUS/adapters/NAME           knowledge adapters
    ROOT/CORPUS/models/MODEL            merged models
    ROOT/CORPUS/vectors/MODEL, runs/MODEL.trec
    ROOT/EXPERIMENT.json, EXPERIMENT.md results, beside the paper's numbers

Every artifact is made by its stage. So a killed reproduction resumes, and experiments share artifacts. With 7 billion
parameters, each variant takes 14 GB for its model, and its vectors.
"""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from readapt_ray.artifact_files import SUBSET_NAME
from readapt_ray.artifacts import Artifact, Workspace, fingerprint, produce
from readapt_ray.catalog import models
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.config import StageConfig
from readapt_ray.errors import InputError
from readapt_ray.evaluation.measure_options import depth_of
from readapt_ray.recipes.chain import Section, SectionRules, make, pack_options, stage_config
from readapt_ray.recipes.paper.options import Collection, PaperConfig, collection
from readapt_ray.recipes.paper.variants import READAPTED, Variant, variants_of
from readapt_ray.seeds import random_generator
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

NOT_IN_AN_EXPERIMENT: dict[str, dict[str, str]] = {
    "embed": {
        "sample": "the reproduction needs vectors of all passages; estimate with `readapt embed --sample` first",
        "previous": "older vectors fit only one model; a reproduction that is run again encodes nothing twice",
    },
    "search": {
        "index": "the reproduction searches vectors exactly, as the paper does; leave it out",
        "encoding": "queries are encoded as the vectors were; leave it out",
    },
}
"""Stage options that a reproduction refuses, each with the reason and what to do instead."""

RULES = SectionRules(recipe="the reproduction", refused=NOT_IN_AN_EXPERIMENT)

_WHOLE_CORPUS = frozenset({"table1", "baselines"})
"""Experiments whose adapters are all trained on all passages of the corpus."""


class Reproduction:
    """The experiments with one retriever on some corpora.

    Raises:
        InputError: a corpus, a model or an option is unknown or wrong. This is checked before any stage starts.
    """

    def __init__(self, config: PaperConfig) -> None:
        self.config = config
        self.collections = {each.name: each for each in (collection(text, config.data) for text in config.corpora)}
        self._has_some: dict[tuple[str, str], bool] = {}
        self._general = collection(config.general, config.data) if "table3" in config.experiments else None
        row = models.find_row(config.retriever)
        self.known_as = row.name if row is not None else None
        if config.pretrained is None and row is None:
            raise InputError(f"the catalog does not know {config.retriever!r}; say what it was made from: pretrained")
        self.pretrained = config.pretrained or str(row and row.pretrained)
        self.encoding = models.open_model(config.retriever).encoding
        before = models.open_model(self.pretrained)
        if config.layer_scales:
            from readapt_ray.weights.merge_plan import check_pair

            after = models.open_model(config.retriever)
            check_pair(before, after, accept=(), layer_scales=config.layer_scales)
        self._check_sections()

    def _check_sections(self) -> None:
        """Refuse wrong options before any stage starts.

        Raises:
            InputError: an option is unknown or wrong, or the reproduction sets or refuses it.
        """
        config = self.config
        stage_config("train", config.train, RULES, pretrained="-", corpus="-", method="dora", seed=0, output="-")
        stage_config("embed", config.embed, RULES, retriever="-", corpus="-", encoding=None, output="-")
        wired = {"retriever": "-", "vectors": "-", "queries": "-", "qrels": "-", "drop_self_hits": False}
        stage_config("search", config.search, RULES, **wired, output="-.trec")
        lists = [name for name in ("exclude", "only") if config.train.get(name) is not None]
        if lists and (len(self.collections) > 1 or not _WHOLE_CORPUS.issuperset(config.experiments)):
            raise InputError(
                f"section 'train': {lists[0]} = {config.train[lists[0]]!r} is refused: it names passages of one corpus, and "
                f"the other experiments choose passages themselves; give one corpus, and only {' or '.join(sorted(_WHOLE_CORPUS))}"
            )
        for name in lists:
            if not Location(config.train[name]).is_file():
                raise InputError(
                    f"section 'train': {name} = {config.train[name]!r} is not there; give a file that exists"
                )

    def steps(self, experiment: str, seed: int) -> Iterator[tuple[Collection, Variant]]:
        """Yield each pair of corpus and variant that an experiment searches with one seed.

        Variants without a trained adapter are yielded with the first seed only. Those that do not apply to a corpus are
        left out; to find out, the corpus may be ingested.
        """
        for each in self.collections.values():
            for variant in variants_of(experiment, self.config.sizes):
                if self._applies(each, variant) and (variant.has_seed or seed == self.config.seeds[0]):
                    yield each, variant

    def _applies(self, own: Collection, variant: Variant) -> bool:
        if variant.passages.isdecimal():
            return int(variant.passages) < self.corpus(own).manifest.counts["num_passages"]
        if variant.passages != "all":
            return self._has_passages(own, variant)
        return self._domain(own, variant) is not None

    def _has_passages(self, own: Collection, variant: Variant) -> bool:
        """Return whether the corpus has passages of the variant's kind (judged, unjudged). If not, log it once."""
        key = (own.name, variant.name)
        if key not in self._has_some:
            self._has_some[key] = bool(_wanted(self.corpus(own), own, variant.passages, 0))
            if not self._has_some[key]:
                logger.warning(
                    "%s: no passage is %s in the split %s (every one is %s), so the variant %r is left out",
                    own.name,
                    variant.passages,
                    own.split,
                    "judged" if variant.passages == "unjudged" else "unjudged",
                    variant.name,
                )
        return self._has_some[key]

    def _domain(self, own: Collection, variant: Variant) -> Collection | None:
        """Return the corpus on which a variant's adapter is trained; None if the variant does not apply."""
        if variant.domain == "own":
            return own
        if variant.domain == "general":
            return None if self._general is None or self._general.name == own.name else self._general
        names = list(self.collections)
        return self.collections[names[(names.index(own.name) + 1) % len(names)]] if len(names) > 1 else None

    def corpus(self, own: Collection) -> Artifact:
        """Ingest a corpus unless that is done, and return its artifact."""
        return self._make("ingest", {}, source=own.source, output=self._at(own, "corpus"))

    def run_file(self, own: Collection, variant: Variant, seed: int) -> str:
        """Return the path of a variant's TREC run, whether it exists or not. `own` is the corpus that is searched."""
        return self._at(own, f"runs/{_label(variant, seed)}.trec")

    def search(self, own: Collection, variant: Variant, seed: int) -> Artifact:
        """Make the TREC run of a variant, and before it every artifact that it needs: model, corpus, vectors."""
        model = self._model(own, variant, seed)
        corpus = self.corpus(own)
        vectors = self._make(
            "embed",
            self.config.embed,
            retriever=model,
            corpus=corpus.uri,
            encoding=_with_task(self.encoding, own.task),
            output=self._at(own, f"vectors/{_label(variant, seed)}"),
        )
        return self._make(
            "search",
            {"top_k": depth_of(self.config.measure), **self.config.search},
            retriever=model,
            vectors=vectors.uri,
            queries=(corpus.location / "queries").uri,
            qrels=(corpus.location / f"qrels/{own.split}.parquet").uri,
            drop_self_hits=own.drops_self_hits,
            output=self.run_file(own, variant, seed),
        )

    def _model(self, own: Collection, variant: Variant, seed: int) -> str:
        if variant.is_base:
            return self.config.retriever
        if variant.continues_retriever:
            return self._continued(own, seed)
        source = self._domain(own, variant)
        assert source is not None
        adapter = self._adapter(source, variant, seed)
        scales: Section = {
            "readapter_scale": self.config.readapter_scale
            if variant.readapter_scale is None
            else variant.readapter_scale,
            "knowledge_scale": self.config.knowledge_scale
            if variant.knowledge_scale is None
            else variant.knowledge_scale,
        }
        if self.config.layer_scales and scales["knowledge_scale"]:
            scales["layer_scales"] = self.config.layer_scales
        return self._merged(adapter, scales, self._at(own, f"models/{_label(variant, seed)}"))

    def _merged(self, adapter: str, scales: Section, output: str) -> str:
        return self._make(
            "merge",
            {},
            pretrained=self.pretrained,
            retriever=self.config.retriever,
            adapter=adapter,
            encoding=self.encoding,
            output=output,
            **scales,
        ).uri

    def _adapter(self, source: Collection, variant: Variant, seed: int) -> str:
        name = f"{variant.passages}-{variant.method}-seed{seed}"
        return self._trained(
            source, self._passages(source, variant, seed), self.pretrained, method=variant.method, seed=seed, name=name
        )

    def _continued(self, own: Collection, seed: int) -> str:
        """Train an adapter on the retriever itself, with the language-model head of the pretrained model."""
        from readapt_ray.recipes.paper.headed import add_head

        folder = self._at(own, "models/retriever")
        merged = self._merged(
            self._adapter(own, Variant(name=READAPTED), self.config.seeds[0]),
            {"readapter_scale": 1.0, "knowledge_scale": 0.0},
            folder,
        )
        body = models.open_model(merged).folder
        whole = add_head(
            Location(str(body)), models.open_model(self.pretrained).folder, Location(folder).beside("-with-head")
        )
        return self._trained(
            own, self.corpus(own).uri, whole.uri, method="dora", seed=seed, name=f"continued-seed{seed}"
        )

    def _trained(self, source: Collection, passages: str, pretrained: str, *, method: str, seed: int, name: str) -> str:
        from readapt_ray.stages.train import objective_of

        blocks = self._make(
            "pack",
            pack_options(self.config.train),
            pretrained=pretrained,
            corpus=passages,
            output=self._at(source, f"blocks/{name}"),
        )
        # A retriever's config.json names no head, so take the objective of its pretrained model.
        objective = self.config.train.get("objective") or objective_of(models.open_model(self.pretrained))
        return self._make(
            "train",
            {**self._targets(), **self.config.train, "objective": objective},
            pretrained=pretrained,
            corpus=blocks.uri,
            method=method,
            seed=seed,
            output=self._at(source, f"adapters/{name}"),
        ).uri

    def _targets(self) -> Section:
        row = models.find_row(self.config.retriever)
        return {} if row is None else {"target_modules": row.dora_targets}

    def _passages(self, source: Collection, variant: Variant, seed: int) -> str:
        """Return the URI of the passages to train an adapter on: the corpus, or a part of it that is ingested again."""
        corpus = self.corpus(source)
        if variant.passages == "all":
            return corpus.uri
        name = f"{variant.passages}-seed{seed}" if variant.passages.isdecimal() else variant.passages
        folder = Location(self._at(source, "subsets"))
        wanted = _wanted(corpus, source, variant.passages, seed)

        def write(workspace: Workspace) -> None:
            with (workspace.location / SUBSET_NAME).open_output() as stream:
                for row in _rows(corpus):
                    if row["doc_id"] in wanted:
                        stream.write(json.dumps({"_id": row["doc_id"], **row}, ensure_ascii=False).encode() + b"\n")

        rows = produce(
            "subset",
            StageConfig(output=(folder / f"{name}-rows").uri),
            inputs={"corpus": corpus.fingerprint},
            identity={"doc_ids": fingerprint(sorted(wanted))},
            work=write,
        )
        source_file = (rows.location / SUBSET_NAME).uri
        return self._make("ingest", {"deduplicate": "none"}, source=source_file, output=(folder / name).uri).uri

    def _make(self, stage: str, options: Section, **wired: Any) -> Artifact:
        return make(stage, options, RULES, **wired)

    def _at(self, own: Collection, name: str) -> str:
        """Return the path or URI of an artifact of a corpus."""
        return (Location(self.config.root) / f"{own.name}/{name}").uri


def _label(variant: Variant, seed: int) -> str:
    name = variant.name.replace(" ", "-").replace(",", "")
    return f"{name}-seed{seed}" if variant.has_seed else name


def _with_task(encoding: Encoding, task: str) -> Encoding:
    """Put the corpus's task instruction into the encoding, if the retriever's query template has a place for it."""
    return encoding.model_copy(update={"task": task}) if task and "{task}" in encoding.query_template else encoding


def _rows(corpus: Artifact) -> Iterator[dict[str, Any]]:
    for file in (corpus.location / "passages").files(".parquet"):
        with file.open_input() as stream:
            for batch in pq.ParquetFile(stream).iter_batches(columns=["doc_id", "title", "text"]):
                yield from batch.to_pylist()


def _wanted(corpus: Artifact, source: Collection, passages: str, seed: int) -> set[str]:
    """Return the doc_ids of a part of the corpus. With the same seed, a larger random part contains every smaller one."""
    doc_ids = [row["doc_id"] for row in _rows(corpus)]
    if passages.isdecimal():
        order = random_generator(seed, "passages").permutation(len(doc_ids))
        return {doc_ids[index] for index in order[: int(passages)].tolist()}
    with (corpus.location / "qrels" / f"{source.split}.parquet").open_input() as stream:
        judged = set(pq.read_table(stream, columns=["doc_id"])["doc_id"].to_pylist())
    return judged & set(doc_ids) if passages == "judged" else set(doc_ids) - judged
