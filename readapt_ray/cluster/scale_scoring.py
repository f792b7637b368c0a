"""Measure pairs of merge scales on Ray actors, which change the scales of an encoder in memory.

In: pairs of scales, and a sample of queries, passages and judgements. Out: the measure of every query with every pair,
in one file per pair, so that a killed search resumes. A pair costs one pass over the weights and one encoding of the
sample.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from readapt_ray.artifacts import Workspace
from readapt_ray.catalog import models
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.cluster import autoscaling, connection, on_worker, placement
from readapt_ray.errors import InputError
from readapt_ray.evaluation.measure_options import depth_of
from readapt_ray.evaluation.scale_search import ScalePair
from readapt_ray.records import Passage, Query, ScoredDoc
from readapt_ray.storage import Location
from readapt_ray.weights.scale_options import LayerScale

if TYPE_CHECKING:
    from readapt_ray.evaluation.measures import Measurement

logger = logging.getLogger("readapt_ray")

MODELS = ("pretrained", "retriever", "adapter")
_MAX_VAIN_LOSSES = 3


@dataclass(frozen=True)
class Sample:
    """Passages and queries of the search, and judgements: the relevance by query_id, then by doc_id."""

    passages: list[Passage]
    queries: list[Query]
    judgements: dict[str, dict[str, int]]


@dataclass(frozen=True)
class ScoringJob:
    """The options of every actor; the sample is passed separately."""

    models: dict[str, str]
    """MODEL of each role in `MODELS`, by a name that workers can open."""
    fingerprints: Mapping[str, str]
    """Fingerprint of each model, as the driver found it."""
    encoding: Encoding
    measure: str
    """Canonical name, such as nDCG@10."""
    drop_self_hits: bool
    """Leave out a passage whose doc_id is the query_id."""
    dtype: str
    """Data type that the models compute in."""
    accept_vocabulary: bool
    layers: tuple[LayerScale, ...] = ()
    """Factors of the knowledge scale for ranges of layers; empty for 1.0 everywhere."""
    driver_node: str = ""


class ScaleScoring:
    """A pool of actors that scores pairs of scales; it starts at the first pair that has no stored result.

    An actor gets a pair only after it has loaded the models. So an actor that waits for room delays no pair. If an
    actor dies, another one gets its pair.

    Args:
        num_workers: number of actors, at most one per pair; None for one per GPU, or one actor without GPUs.
        job: the options of every actor.
        sample: what is encoded and measured.
        workspace: receives the progress, and the results in `grid/`.
    """

    def __init__(self, num_workers: int | None, job: ScoringJob, sample: Sample, workspace: Workspace) -> None:
        self.values: dict[ScalePair, dict[str, float]] = {}
        """The measure of every judged query, by query_id, of each pair that was scored."""
        self.seconds: dict[str, float] = {}
        """Seconds by part ("weights", "encoding", "measuring"), summed over the pairs that this process scored."""
        self._num_workers, self._job, self._sample, self._workspace = num_workers, job, sample, workspace
        self._num_actors = 0
        self._each: dict[str, float] = {}
        """Resources of one actor."""
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, ScalePair | None]] = {}
        """The busy actors: pending answer -> (actor, pair); the pair is None while the actor loads models."""
        self._new_actor: Callable[[], Any] | None = None

    def score(self, pairs: Sequence[ScalePair]) -> None:
        """Score these pairs into `values`; read the stored result of a pair if there is one.

        A new result is stored at once. It may be called again with other pairs; the actors stay until `stop`.

        Args:
            pairs: pairs (readapter_scale, knowledge_scale).

        Raises:
            ReadaptError: an actor raised it; or a WorkerError: actors died three times in a row.
        """
        from ray.exceptions import RayError

        waiting = []
        for pair in pairs:
            if self._cell(pair).is_file():
                self.values[pair] = json.loads(self._cell(pair).read_text())
            else:
                waiting.append(pair)
        total = len(self.values) + len(waiting)
        try:
            for pair, values, seconds in self._scored(waiting):
                self._cell(pair).write_text(json.dumps(values))
                self.values[pair] = values
                self.seconds = {name: self.seconds.get(name, 0.0) + spent for name, spent in seconds.items()}
                self._workspace.progress(len(self.values), total, unit="pairs")
        except RayError as error:
            raise connection.cause_of(error) from None

    def _scored(self, pairs: Sequence[ScalePair]) -> Iterator[tuple[ScalePair, dict[str, float], dict[str, float]]]:
        if not pairs:
            return
        import ray
        from ray.exceptions import RayActorError

        if self._new_actor is None:
            self._start_all(len(pairs))
        waiting = list(pairs)
        num_left, num_vain_losses = len(pairs), 0
        with (
            autoscaling.requested(min(self._num_actors, len(pairs)), self._each, least=1),
            placement.warn_while_too_small(1, self._each, who="actors"),
        ):
            while num_left:
                while waiting and self._idle:
                    actor, pair = self._idle.pop(), waiting.pop(0)
                    self._busy[actor.score.remote(pair)] = actor, pair
                (answer,), _ = ray.wait(list(self._busy))
                actor, due = self._busy.pop(answer)
                try:
                    found = ray.get(answer)
                except RayActorError as error:
                    num_vain_losses += 1
                    if num_vain_losses >= _MAX_VAIN_LOSSES:
                        raise
                    logger.warning("tune: %s; another actor takes its place", connection.cause_of(error))
                    ray.kill(actor)
                    self._start()
                    waiting += [] if due is None else [due]
                    continue
                self._idle.append(actor)
                if due is not None:
                    num_left, num_vain_losses = num_left - 1, 0
                    yield found

    def _start_all(self, num_pairs: int) -> None:
        import ray

        on_gpus = bool(connection.connect().num_gpus)
        self._each = {"CPU": 1, "GPU": int(on_gpus)}
        count = self._num_workers or (max(1, placement.room_for(self._each)) if on_gpus else 1)
        count = min(count, num_pairs)
        placement.check_placement(count, self._each, who="actors")
        self._num_actors = count
        remote = ray.remote(num_cpus=1, num_gpus=int(on_gpus))(_ScaleScorer)
        job, sample = replace(self._job, driver_node=on_worker.this_node()), ray.put(self._sample)
        self._new_actor = lambda: remote.remote(job, sample)
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        assert self._new_actor is not None
        actor = self._new_actor()
        self._busy[actor.load.remote()] = actor, None

    def stop(self) -> None:
        """Stop all actors; pairs that are being scored are lost. Does nothing if no actor was started."""
        import ray

        for actor in [*self._idle, *(actor for actor, _ in self._busy.values())]:
            ray.kill(actor)

    def _cell(self, pair: ScalePair) -> Location:
        return self._workspace.location / "grid" / f"{pair[0]:g}_{pair[1]:g}.json"


class _ScaleScorer:
    """An actor that holds the sample, and an encoder whose scales can be changed."""

    def __init__(self, job: ScoringJob, sample: Sample) -> None:
        self._job, self._sample = job, sample

    def load(self) -> None:
        """Load the models, and tokenise the sample.

        Raises:
            FingerprintMismatchError: a model differs from the driver's model of that name.
            ModelError: the models do not fit each other, or hold NaN.
            PlacementError: this node differs from the driver's.
        """
        import torch

        from readapt_ray.nn import attention
        from readapt_ray.retrieval.encoder import DTYPES, Encoder
        from readapt_ray.weights.adapter import Adapter
        from readapt_ray.weights.dense import load_dense
        from readapt_ray.weights.live_scales import LiveReadapter
        from readapt_ray.weights.loading import load_model
        from readapt_ray.weights.merging import Readapter, open_retriever
        from readapt_ray.weights.weight_files import Checkpoint

        on_worker.check_node()
        job = self._job
        pretrained, retriever, adapter = (self._same_model(name) for name in MODELS)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = load_model(retriever, dtype=DTYPES[job.dtype], device=device)
        before = Checkpoint(pretrained.folder, name=pretrained.name)
        after = open_retriever(retriever.folder, before, name=retriever.name)
        knowledge = [Adapter(adapter.folder, before, name=adapter.name)]
        readapter = Readapter(before, after, knowledge, accept_vocabulary=job.accept_vocabulary)
        self._live = LiveReadapter(network, readapter, layers=job.layers)
        self._encoder = Encoder(
            network,
            retriever.tokenizer,
            job.encoding,
            identify=str,
            packed=attention.has_kernel(torch.device(device), DTYPES[job.dtype]),
            dense=load_dense(retriever, device=device),
        )
        passages, queries = self._sample.passages, self._sample.queries
        self._passage_ids = self._encoder.tokenize(
            [each.text for each in passages], "passage", [each.title for each in passages]
        )
        self._query_ids = self._encoder.tokenize([each.text for each in queries], "query")

    def _same_model(self, name: str) -> models.OpenModel:
        model, expected = models.open_model(self._job.models[name]), {self._job.fingerprints[name]}
        on_worker.check_same_model(model.name, lambda: model.fingerprint, expected, driver_node=self._job.driver_node)
        return model

    def score(self, pair: ScalePair) -> tuple[ScalePair, dict[str, float], dict[str, float]]:
        """Return the pair, the measure of every query with these scales, and the seconds of each part."""
        marks = [time.monotonic()]
        self._live.set_scales(*pair)
        marks.append(time.monotonic())
        passages, queries = self._encoder.encode_ids(self._passage_ids), self._encoder.encode_ids(self._query_ids)
        marks.append(time.monotonic())
        measure = self._job.measure
        found = measure_sample(
            self._sample,
            queries @ passages.T,
            measure,
            drop_self_hits=self._job.drop_self_hits,
            name=f"scales ({pair[0]:g}, {pair[1]:g})",
        )
        marks.append(time.monotonic())
        values = dict(zip(found.query_ids, found.values[measure].tolist(), strict=True))
        return pair, values, dict(zip(("weights", "encoding", "measuring"), np.diff(marks).tolist(), strict=True))


def measure_sample(
    sample: Sample, scores_QP: np.ndarray, measure: str, *, drop_self_hits: bool = False, name: str = "sample"
) -> "Measurement":
    """Rank the passages of a sample for each query, and compute a measure of each ranking.

    Passages with the same doc_id are parts of one document; its score is the best score of its parts. Only judged
    queries are measured; one without results counts 0.

    Args:
        sample: Q queries, P passages, and judgements.
        scores_QP: score of each query with each passage, [Q, P].
        measure: canonical name of the measure; a ranking is as deep as it needs (nDCG@10: 10).
        drop_self_hits: leave out a passage whose doc_id is the query_id.
        name: name of the scores in error messages.

    Raises:
        InputError: a score is NaN or infinite.
    """
    from readapt_ray.evaluation.measures import measure_run, parse_measures
    from readapt_ray.evaluation.runs import Run

    if not np.isfinite(scores_QP).all():
        row, column = np.argwhere(~np.isfinite(scores_QP))[0]
        raise InputError(
            f"{name}: query {sample.queries[row].query_id!r} has the score {scores_QP[row, column]} with "
            f"{sample.passages[column].doc_id!r}; give --dtype bfloat16 or float32, or leave these scales out"
        )
    doc_ids, scores_QD = _best_of_documents([each.doc_id for each in sample.passages], scores_QP)
    if drop_self_hits:
        columns_of = {doc_id: column for column, doc_id in enumerate(doc_ids)}
        themselves = [
            (row, columns_of[each.query_id]) for row, each in enumerate(sample.queries) if each.query_id in columns_of
        ]
        scores_QD = scores_QD.copy()
        scores_QD[tuple(np.array(themselves, np.int64).reshape(-1, 2).T)] = -np.inf
    top_k = min(depth_of(measure), scores_QD.shape[1])
    best = np.argpartition(-scores_QD, top_k - 1, axis=1)[:, :top_k]
    results = {
        query.query_id: [
            ScoredDoc(query.query_id, doc_ids[column], float(row[column]))
            for column in columns
            if row[column] != -np.inf
        ]
        for query, row, columns in zip(sample.queries, scores_QD, best.tolist(), strict=True)
    }
    return measure_run(Run.of(results), sample.judgements, parse_measures([measure]), name=name)


def _best_of_documents(doc_ids: Sequence[str], scores_QP: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the D distinct doc_ids, and the best score of each one's passages, [Q, D]."""
    codes = {doc_id: code for code, doc_id in enumerate(dict.fromkeys(doc_ids))}
    if len(codes) == len(doc_ids):
        return list(doc_ids), scores_QP
    owners = np.array([codes[doc_id] for doc_id in doc_ids])
    order = np.argsort(owners, kind="stable")
    starts = np.searchsorted(owners[order], np.arange(len(codes)))
    return list(codes), np.maximum.reduceat(scores_QP[:, order], starts, axis=1)
