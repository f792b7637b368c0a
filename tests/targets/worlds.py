"""Passages, their vectors and the exports of both, for the tests of targets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.config import StageConfig
from readapt_ray.records import content_hash
from readapt_ray.retrieval.vector_files import to_stored_columns, write_stored

DIMENSION = 16
ENCODER = {"fingerprint": "e" * 32, "model": "tiny", "dimension": DIMENSION, "dtype": "float32", "encoding": {}}
Passages = Mapping[str, Mapping[str, Any]]


def doc_id(number: int) -> str:
    """A doc_id with the characters that queries must quote."""
    return f"d'\"\\é{number:03d}"


def passages(num: int, **more: Any) -> dict[str, dict[str, Any]]:
    """Passages with a title, a text and a kept column; each third has no title and each fourth no url."""
    return {
        doc_id(number): {
            "title": f"Title {number}" if number % 3 else "",
            "text": f"the text of number {number}",
            "url": f"https://example.org/{number}" if number % 4 else None,
            **more,
        }
        for number in range(num)
    }


def vector_of(text: str, dimension: int = DIMENSION) -> np.ndarray:
    """A unit vector that depends on the text alone."""
    seed = int.from_bytes(content_hash("", text)[:4], "big")
    vector = np.random.default_rng(seed).normal(size=dimension).astype(np.float32)
    return vector / np.linalg.norm(vector)


def matrix_of(rows: Passages, dimension: int = DIMENSION) -> np.ndarray:
    return np.stack([vector_of(f"{row['title']} {row['text']}", dimension) for row in rows.values()])


def write(folder: Path, rows: Passages, *, num_files: int = 4, encoder: Any = ENCODER, dtype: str = "float32") -> None:
    """Write `corpus` and `vectors` as the stages would; the files of vectors hold other rows than those of passages."""
    _corpus(folder / "corpus", rows)
    corpus = artifacts.open_artifact(str(folder / "corpus"), "ingest")
    names, vectors = list(rows), matrix_of(rows, encoder["dimension"])

    def fill(workspace: Workspace) -> None:
        for number in range(num_files):
            location = workspace.location / "vectors" / f"part-{number:05d}.parquet"
            own = range(number, len(names), num_files)
            doc_ids = [names[row] for row in own]
            hashes = [content_hash(rows[each]["title"], rows[each]["text"]) for each in doc_ids]
            stored = to_stored_columns(doc_ids, vectors[list(own)], dtype)
            write_stored(location, doc_ids, stored, pa.array(hashes, pa.binary(16)), metadata={"encoder": encoder})
        workspace.counts["num_vectors"] = len(names)
        workspace.details |= {"encoder": encoder, "vector_dtype": dtype}

    config = StageConfig(output=str(folder / "vectors"))
    identity = {"encoder": encoder["fingerprint"], "dtype": dtype}
    artifacts.produce("embed", config, inputs={"corpus": corpus.fingerprint}, identity=identity, work=fill)


def _corpus(folder: Path, rows: Passages) -> Artifact:
    def fill(workspace: Workspace) -> None:
        names = sorted(rows, reverse=True)
        for number, own in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
            path = workspace.location.local_path / f"passages/part-{number:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            columns: dict[str, Sequence[Any]] = {"doc_id": own}
            columns |= {column: [rows[name][column] for name in own] for column in next(iter(rows.values()))}
            types = {"doc_id": pa.string(), "title": pa.string(), "text": pa.string(), "url": pa.string()}
            arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
            pq.write_table(pa.table(arrays), path)
        workspace.counts["num_passages"] = len(rows)

    content = artifacts.fingerprint(dict(rows))
    return artifacts.produce("ingest", StageConfig(output=str(folder)), inputs={"source": content}, work=fill)


def exact(rows: Passages, num: int = 10) -> list[list[str]]:
    """The ten best of each passage's vector, by numpy."""
    vectors, names = matrix_of(rows), list(rows)
    return [[names[at] for at in np.argsort(-scores)[:num]] for scores in vectors @ vectors.T]
