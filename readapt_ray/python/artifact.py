"""Define artifacts for notebooks, with a short repr and their rows as a table.

The rows depend on the stage: passages, blocks, vectors, queries, a training log, ranked results, or measures per query.
"""

import dataclasses
import datetime
import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from readapt_ray import artifacts, dead_rows
from readapt_ray.errors import InputError
from readapt_ray.progress import duration
from readapt_ray.storage import Location

if TYPE_CHECKING:
    import pandas as pd
    import ray.data

_ROW_FILES = {
    "ingest": "passages",
    "pack": "blocks",
    "embed": "vectors",
    "embed-sample": "vectors",
    "synthesize": "queries",
}
"""Folder of the Parquet files with the rows of each stage."""
_LOGS = ("train", "finetune")


class Artifact(artifacts.Artifact):
    """The output of a stage: its location, its manifest and its rows.

    It can be passed wherever a path is expected: `ra.train(corpus=corpus, ...)`.
    """

    @property
    def path(self) -> Path:
        """Return the absolute local path of the artifact's folder; for `search`, of the file with the run.

        Raises:
            InputError: the artifact is in an object store; use `uri`.
        """
        if not self.location.is_local:
            raise InputError(f"{self.uri!r} is no path on this machine; use .uri, or .location to read its files")
        return self.location.local_path

    def __fspath__(self) -> str:
        """Return the path or URI, so that the artifact can be passed where a path is expected."""
        return self.uri

    def __repr__(self) -> str:
        """Return three lines: stage and counts, path or URI, time and fingerprint."""
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        head, *rest = map(html.escape, self._lines())
        return f"<div><b>{head}</b><br>{'<br>'.join(rest)}</div>"

    def _lines(self) -> list[str]:
        manifest = self.manifest
        when = datetime.datetime.fromisoformat(manifest.created).strftime("%Y-%m-%d %H:%M UTC")
        return [
            f"{manifest.stage}: {artifacts.counted(manifest.counts) or 'complete'}",
            self.uri,
            f"made {when} in {duration(manifest.seconds)}, fingerprint {self.fingerprint}",
        ]

    def to_arrow(self) -> pa.Table:
        """Return all rows as a pyarrow Table, in memory. Deleted (dead) rows are left out.

        The rows are passages (ingest), blocks (pack), vectors (embed), doc_ids (index), lines of the log (train,
        finetune), ranked results (search), measures per query (evaluate), or one row per pair of scales (tune).

        Raises:
            InputError: any other stage made the artifact, such as merge, export or drift; it has no rows.
        """
        stage = self.manifest.stage
        if stage in _LOGS:
            lines = (self.location / "metrics.jsonl").read_text().splitlines()
            return pa.Table.from_pylist([json.loads(line) for line in lines])
        if stage == "search":
            from readapt_ray.evaluation.runs import read_run

            scored = [each for docs in read_run(self.uri).values() for each in docs]
            return pa.Table.from_pylist([each._asdict() for each in scored])
        if stage == "tune":
            return pa.Table.from_pylist(json.loads((self.location / "tune.json").read_text())["grid"])
        read = _live_ids if stage == "index" else dead_rows.read_table
        return pa.concat_tables(map(read, self._row_files()), promote_options="default")

    def to_pandas(self) -> "pd.DataFrame":
        """Return all rows as a pandas DataFrame, in memory; see `to_arrow`.

        Raises:
            InputError: a stage without rows made the artifact, such as merge.
        """
        return self.to_arrow().to_pandas()

    def to_ray(self) -> "ray.data.Dataset":
        """Return the rows as a Ray Dataset; connect to Ray, or start it, if needed.

        Passages, blocks and vectors are read lazily; files with deleted rows come last. The rows of other stages are
        first read into the memory of this process.

        Raises:
            InputError: a stage without rows made the artifact, such as merge.
        """
        from readapt_ray.cluster import connection

        connection.connect()
        import ray.data

        if self.manifest.stage not in _ROW_FILES:
            return ray.data.from_arrow(self.to_arrow())
        files = self._row_files()
        whole = [each.path for each in files if not dead_rows.is_partly(each.name)]
        partly = [each.uri for each in files if dead_rows.is_partly(each.name)]
        datasets = [ray.data.read_parquet(whole, filesystem=self.location.filesystem)] if whole else []
        if partly:
            read = ray.data.from_items(partly).map_batches(_live_rows, batch_size=1, batch_format="pyarrow")
            datasets.append(read)
        return datasets[0].union(datasets[1]) if len(datasets) > 1 else datasets[0]

    def _row_files(self) -> list[Location]:
        stage = self.manifest.stage
        if stage in _ROW_FILES:
            return (self.location / _ROW_FILES[stage]).files(".parquet")
        if stage == "index":
            return (self.location / "shards").files(".parquet")
        if stage == "evaluate":
            return [self.location / "per_query.parquet"]
        if stage == "merge":
            raise InputError(f"{self.uri!r} is a model, which has no rows; encode with ra.Encoder({self.uri!r})")
        raise InputError(f"the output of {stage} has no rows of its own; read the files in {self.uri!r}")


def _live_ids(file: Location) -> pa.Table:
    """Read the doc_ids of an index shard without its deleted vectors, whose row numbers are in a file beside it."""
    table, dead = dead_rows.read_table(file), file.sibling(f"{file.name.removesuffix('.ids.parquet')}.dead")
    if dead.is_file():
        lives = np.ones(table.num_rows, bool)
        lives[dead_rows.read_row_numbers(dead)] = False
        table = table.filter(pa.array(lives))
    return table.filter(pc.is_valid(table["doc_id"]))  # older releases removed the doc_ids instead


def _live_rows(uris: pa.Table) -> pa.Table:
    """Read the file of a URI without its dead rows, in a Ray task."""
    return dead_rows.read_table(Location(uris["item"][0].as_py()))


def for_notebook(artifact: artifacts.Artifact) -> Artifact:
    """Return the same location and manifest as an artifact for notebooks, with a repr and tables."""
    return Artifact(**{each.name: getattr(artifact, each.name) for each in dataclasses.fields(artifact)})


def open_artifact(uri: str | Path, stage: str = "") -> Artifact:
    """Open a complete artifact. Only its manifest is read.

    Args:
        uri: its folder or URI; for the output of `search`, the .trec file.
        stage: stage that must have made it, such as "embed". If omitted, any stage.

    Raises:
        ArtifactMissingError: there is no artifact, it is unfinished, or another stage made it.
    """
    return for_notebook(artifacts.open_artifact(str(uri), stage))


class Results:
    """Rows that print as a table.

    Args:
        rows: one dict per row: the values by name of the column.
        text: the table as text, for printing.
    """

    def __init__(self, rows: list[dict[str, Any]], text: str) -> None:
        self.rows = rows
        self._text = text

    def __repr__(self) -> str:
        """Return the table as text."""
        return self._text

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self._text)}</pre>"

    def to_pandas(self) -> "pd.DataFrame":
        """Return the rows as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows)
