"""The bridge stage: fit a map with which a new model's queries search an old model's vectors, while re-embedding runs.

In: vectors of an old model, and a new model. Out: `map.safetensors`; `calibration.safetensors` with both models'
vectors of up to 1,000 withheld passages; and the new model's vectors of a sample of passages. 80% of the sample fit
several maps (`retrieval/query_maps.py`), and 10% choose the best map. On the last 10%, and on queries of the corpus if
it has some, recall is measured; the ground truth is what the new model finds with its own vectors. The search is among
withheld passages, and fitted ones in the same proportion as in the whole corpus. It costs encoding the sample, reading
the doc_ids of the corpus, and some minutes on the driver, which holds 1.5 GB with 20,000 vectors of 4,096 numbers.
"""

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from readapt_ray.artifacts import Artifact, Workspace, fingerprint, open_artifact, produce
from readapt_ray.catalog.encoding import EncodingOption
from readapt_ray.catalog.models import open_model
from readapt_ray.catalog.query_models import passages_model
from readapt_ray.cluster import bridge_sample, connection, on_worker
from readapt_ray.cluster.bridge_sample import NewEncoder
from readapt_ray.cluster.encoding_dtype import encoding_dtype
from readapt_ray.cluster.query_vectors import encode_queries
from readapt_ray.cluster.recall_queries import query_encoder_of
from readapt_ray.config import StageConfig
from readapt_ray.errors import FingerprintMismatchError, InputError, ReadaptError
from readapt_ray.made_of import open_input
from readapt_ray.progress import amount
from readapt_ray.retrieval.bridge import CALIBRATION_NAME, MAP_NAME
from readapt_ray.retrieval.query_encoder import describe_encoder
from readapt_ray.seeds import random_generator

if TYPE_CHECKING:
    from readapt_ray.evaluation.bridge_recall import BridgeQueries
    from readapt_ray.retrieval.query_maps import QueryMap

logger = logging.getLogger("readapt_ray")

_FIT_SHARE, _CHOICE_SHARE = 0.8, 0.1
_LEAST_SAMPLE = 500
_MAX_QUERIES = 1000
_FEW_QUERIES = 50


class BridgeConfig(StageConfig):
    """The options of `readapt bridge`."""

    old_vectors: str
    """Vectors to search: the output of `readapt embed` with the old model."""
    retriever: str
    """New model, whose queries will search these vectors: a catalog name, a folder, a GGUF file, a URI or a hub id."""
    corpus: str | None = None
    """Passages of the vectors, if they are no longer where they were embedded from: the output of `readapt ingest`."""
    sample: int = Field(default=20_000, ge=1)
    """Passages to encode with the new model; all if there are fewer. At least 500, and at least 1.25 times the larger
    of the two models' dimensions."""
    encoding: EncodingOption = None
    """JSON file with pooling, prompts and special tokens. If omitted, what the retriever's folder or the catalog
    says."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Data type that the new model computes in; auto is bfloat16 on GPUs and on CPUs with AMX or AVX512_BF16, else
    float32."""
    seed: int = 0
    """Seed of the sample, of its parts and of the training of the residual map."""

    inputs: ClassVar[frozenset[str]] = frozenset({"old_vectors", "retriever", "corpus", "encoding"})


def bridge(config: BridgeConfig) -> Artifact:
    """Fit a bridge: a map by which a new model's queries search an old model's vectors.

    Does nothing if the output holds a bridge of the same options and inputs. A bridge that is not worth it is written
    too: the manifest's `not_worth_it` says why, and a warning is logged.

    Raises:
        ArtifactMissingError: the old vectors are not the output of `readapt embed`, or their corpus is missing.
        FingerprintMismatchError: the corpus is not the one of the vectors, or the new model itself made the vectors.
        InputError: the sample or the corpus is too small (the message says how many passages are needed), or the new
            model encodes only queries.
        ArtifactConflictError: the output folder holds another bridge.
    """
    old = open_artifact(config.old_vectors, "embed")
    corpus = _open_corpus(config, old)
    old_encoder = old.manifest.details["encoder"]
    check_sample(config.sample, old.manifest.counts["num_vectors"], int(old_encoder["dimension"]))
    model = open_model(config.retriever)
    if (passages := passages_model(model)) is not None:
        raise InputError(
            f"{config.retriever!r} is for queries over vectors of {passages.name!r}, and needs no bridge to these"
        )
    config = config.model_copy(update={"dtype": encoding_dtype(config, config.dtype)})
    encoding = config.encoding or model.encoding
    new = NewEncoder(model, encoding, describe_encoder(model, encoding, config.dtype))
    if new.description["fingerprint"] == old_encoder["fingerprint"]:
        raise FingerprintMismatchError(
            f"{config.old_vectors!r} was made by {config.retriever!r} itself; its queries need no bridge"
        )
    return produce(
        "bridge",
        config,
        inputs={
            "old_vectors": old.fingerprint,
            "retriever": model.fingerprint,
            "encoding": fingerprint(encoding.model_dump(mode="json")),
            "corpus": corpus.fingerprint,
        },
        identity={"encoder": new.description["fingerprint"]},
        work=lambda workspace: _build(config, old, corpus, new, workspace),
    )


def _open_corpus(config: BridgeConfig, old: Artifact) -> Artifact:
    corpus = open_artifact(config.corpus, "ingest") if config.corpus else open_input(old, "corpus", "ingest")
    if corpus.fingerprint != old.manifest.inputs["corpus"]:
        raise FingerprintMismatchError(
            f"corpus {corpus.uri!r} is not the one that {config.old_vectors!r} was made of; give that with --corpus, or "
            f"embed this one: a bridge needs vectors of the same passages by both models"
        )
    return corpus


def check_sample(size: int, num_vectors: int, dimension: int) -> None:
    """Refuse a sample that is too small to fit a map between vectors of this dimension.

    At least 500 passages are needed, and 1.25 times the dimension.

    Args:
        size: passages in the sample.
        num_vectors: passages in the whole corpus.
        dimension: dimension of the vectors of one of the two models; check both models.

    Raises:
        InputError: the sample or the corpus is too small; the message says how many passages are needed.
    """
    least = max(_LEAST_SAMPLE, math.ceil(dimension / _FIT_SHARE))
    if num_vectors < least:
        raise InputError(
            f"the corpus has {amount(num_vectors, 'vectors')}, and a bridge between models of {dimension:,} dimensions takes a sample of "
            f"{least:,}; embed the corpus with the new model, which takes no longer"
        )
    if size < least:
        raise InputError(
            f"sample = {size:,}: a bridge between models of {dimension:,} dimensions takes {least:,} passages at least; give "
            f"--sample {least} or more"
        )


def _build(config: BridgeConfig, old: Artifact, corpus: Artifact, new: NewEncoder, workspace: Workspace) -> None:
    """Encode the sample, fit maps, choose one, measure it and write it."""
    from readapt_ray.evaluation.bridge_recall import BridgeQueries, measure_bridge, objection

    connection.connect()
    doc_ids, old_vectors = bridge_sample.old_sample(old, config.sample, config.seed)
    new_vectors = bridge_sample.new_sample(
        doc_ids,
        corpus,
        new,
        on_worker.absolute(workspace.location) / "vectors",
        check=lambda dimension: check_sample(len(doc_ids), old.manifest.counts["num_vectors"], dimension),
        progress=lambda done, total: workspace.progress(done, total, unit="passages"),
    )
    workspace.progress(0, note="fitting maps")
    parts = _parts(len(doc_ids), old.manifest.counts["num_vectors"], config.seed)
    best, recalls = _chosen_map(new_vectors, old_vectors, parts, config.seed)
    new_pool, old_pool, last = new_vectors[parts.pool], old_vectors[parts.pool], parts.last
    asked = {"passages": BridgeQueries(new_pool[last], old_pool[last], last)}
    if (queries := _asked(corpus, old, new, config.seed)) is not None:
        asked["queries"] = queries
    measured = {what: measure_bridge(best, each, new_pool, old_pool) for what, each in asked.items()}
    told_by = "queries" if measured.get("queries", {}).get("num_queries", 0) >= _FEW_QUERIES else "passages"
    workspace.counts |= {"num_passages": len(doc_ids), "num_queries": measured[told_by]["num_queries"]}
    workspace.details |= {
        "old_encoder": old.manifest.details["encoder"],
        "new_encoder": {**new.description, "dimension": new_vectors.shape[1]},
        "map": best.name,
        "map_sha256": _written(workspace, MAP_NAME, best.to_bytes()),
        "calibration_sha256": _written(workspace, CALIBRATION_NAME, _calibration(new_vectors, old_vectors, parts)),
        "recall_of_maps": recalls,
        "recall_at_10": measured,
        "num_searched": len(parts.pool),
        "not_worth_it": objection(measured[told_by]),
    }
    _log_result(workspace.details)


def _written(workspace: Workspace, name: str, content: bytes) -> str:
    """Write a file; return its SHA-256."""
    (workspace.location / name).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _calibration(new: NDArray[np.float32], old: NDArray[np.float32], parts: "_Parts") -> bytes:
    """Return both models' vectors of withheld passages, with which scores of the two models are calibrated."""
    from readapt_ray.retrieval.calibration import MAX_PASSAGES, Calibration

    rows = parts.pool[: len(parts.last) + len(parts.choice)][:MAX_PASSAGES]
    return Calibration(old[rows], new[rows]).to_bytes()


@dataclass(frozen=True)
class _Parts:
    """The split of a sample's rows into parts that fit maps, choose one and measure it."""

    fit: NDArray[np.int64]
    """Rows that maps are fitted on."""
    pool: NDArray[np.int64]
    """Rows that are searched: all withheld rows, and fitted rows in the same proportion to them as in the corpus.

    A map ranks passages that it was fitted on too well: among some hundred of them it finds a quarter of the ten best,
    even if the models have nothing in common. So their share must not be larger than in the corpus.
    """
    last: NDArray[np.int64]
    """Positions in `pool` of the passages that measure the map."""
    choice: NDArray[np.int64]
    """Positions in `pool` of the passages that choose the map."""


def _chosen_map(
    new: NDArray[np.float32], old: NDArray[np.float32], parts: _Parts, seed: int
) -> tuple["QueryMap", dict[str, float]]:
    """Fit several maps; return the best one, and the recall of each on the passages that choose."""
    from readapt_ray.evaluation.bridge_recall import nearest
    from readapt_ray.retrieval.neighbours import overlaps
    from readapt_ray.retrieval.query_maps import fit_maps

    new_pool, old_pool, choice = new[parts.pool], old[parts.pool], parts.choice
    truth = nearest(new_pool[choice], new_pool, choice)

    def recall_of(query_map: "QueryMap") -> float:
        return float(overlaps(nearest(query_map(new_pool[choice]), old_pool, choice), truth).mean())

    maps = list(fit_maps(new[parts.fit], old[parts.fit], seed=seed, recall=recall_of))
    recalls = {each.name: round(recall_of(each), 4) for each in maps}
    return max(maps, key=lambda each: recalls[each.name]), recalls


def _parts(size: int, num_vectors: int, seed: int) -> _Parts:
    """Split the rows of a sample at random into parts that fit, choose and measure.

    Args:
        size: rows of the sample.
        num_vectors: number of passages in the corpus.
        seed: random seed.
    """
    order = random_generator(seed, "parts of a bridge's sample").permutation(size)
    ends = (int(_FIT_SHARE * size), int((_FIT_SHARE + _CHOICE_SHARE) * size))
    fit, choice, last = np.split(order, ends)
    num_withheld = len(choice) + len(last)
    num_fitted = round(num_withheld * len(fit) / (num_vectors - len(fit)))
    pool = np.concatenate([last, choice, fit[:num_fitted]])
    return _Parts(fit, pool, np.arange(len(last)), np.arange(len(last), num_withheld))


def _asked(corpus: Artifact, old: Artifact, new: NewEncoder, seed: int) -> "BridgeQueries | None":
    """Encode at most a thousand queries of the corpus with both models; None if it has no queries."""
    import ray

    from readapt_ray.evaluation.bridge_recall import BridgeQueries
    from readapt_ray.sources.judgements import read_queries

    if not (corpus.location / "queries").is_folder():
        return None
    texts = [each.text for each in read_queries(corpus.uri)]
    chosen = random_generator(seed, "queries of a bridge").permutation(len(texts))[:_MAX_QUERIES]
    texts = [texts[place] for place in chosen.tolist()]
    if not texts:
        return None
    found = encode_queries(texts, new.model, new.encoding, new.description)
    vectors = np.concatenate(ray.get(found))
    try:
        before = query_encoder_of(old)
        kept = np.concatenate(ray.get(encode_queries(texts, before.model, before.encoding, before.description)))
    except (ReadaptError, ray.exceptions.RayError, KeyError) as error:
        logger.warning(
            "bridge: the old model is not compared on queries, since it is not there (%s)", connection.cause_of(error)
        )
        return BridgeQueries(vectors, None)
    return BridgeQueries(vectors, kept)


def _log_result(details: Mapping[str, Any]) -> None:
    for name, mean in details["recall_of_maps"].items():
        logger.info("bridge: %s: recall@10 %.3f on passages that chose the map", name, mean)
    for what, measured in details["recall_at_10"].items():
        parts = [
            f"{name.replace('_', ' ')} {each['mean']:.3f} ({each['interval'][0]:.3f} to {each['interval'][1]:.3f})"
            for name, each in measured.items()
            if name != "num_queries"
        ]
        logger.info(
            "bridge: recall@10 by the %s map on %s %s: %s",
            details["map"],
            f"{measured['num_queries']:,}",
            "withheld passages" if what == "passages" else what,
            ", ".join(parts),
        )
    if details["not_worth_it"]:
        logger.warning("bridge: not worth it: %s; embed the corpus with the new model first", details["not_worth_it"])
