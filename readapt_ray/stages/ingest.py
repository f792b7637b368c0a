"""Ingest: from any source to clean passages in Parquet, with queries and judgements where it has them.

Enters a source by name, one row at a time; leaves `passages/part-00000.parquet` ..., perhaps
`queries/part-00000.parquet` and `qrels/<split>.parquet`. A folder of tables without labels, of 64 MB or more, is read
by Ray tasks (`cluster/parallel_ingest.py`), unless near duplicates are dropped. Anything else is read by one process, some
30,000 passages of 80 words a second. In its memory: one part, 32 to 48 bytes a passage for its id and as many again for its
text where exact duplicates are dropped (4 KB for near ones), and the queries and judgements. Parts do not depend on when a
process was killed: the next one reads the source again and keeps the parts that are there.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from readapt_ray.artifacts import Artifact, Workspace, open_artifact, produce
from readapt_ray.cluster import on_worker, parallel_ingest
from readapt_ray.config import OptionError, StageConfig, UsedWith
from readapt_ray.errors import CorpusError
from readapt_ray.evaluation.tables import named
from readapt_ray.records import QREL_SCHEMA, QUERY_SCHEMA, Passage, Qrel, Query
from readapt_ray.retrieval.footers import named_footers
from readapt_ray.sources import row_checks
from readapt_ray.sources.cleaning import num_bytes
from readapt_ray.sources.columns import ColumnChoice, ColumnsOption
from readapt_ray.sources.duplicates import Deduplication, RowTable, digest, duplicate_finder
from readapt_ray.sources.labels import repointed, with_passage
from readapt_ray.sources.opening import Format, open_source
from readapt_ray.sources.parts import DIGEST, FIRST_ID, EarlierPart, PartWriter
from readapt_ray.sources.piece_files import PieceJob
from readapt_ray.sources.pieces import plan_pieces
from readapt_ray.sources.read_options import DEFAULT_MAX_PASSAGE_CHARS, DEFAULT_MAX_TEXT_BYTES, ReadOptions
from readapt_ray.sources.row_checks import RowChecks
from readapt_ray.sources.source import BadRow, Source, in_words
from readapt_ray.sources.splitting import Splitting, open_splitting, split_part, total
from readapt_ray.sources.table_sources import TableSource
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_Record = TypeVar("_Record", Query, Qrel)

MIN_PARALLEL_BYTES = 64 << 20
"""A source of fewer bytes, decompressed, is read sooner by one process than Ray starts."""
_NUM_NAMED = 20
_ROWS_PER_PROGRESS = 500


class IngestConfig(StageConfig):
    """The options of `ingest`."""

    source: str
    """Corpus to read: a path or URI, ir_datasets:NAME, hub:OWNER/NAME, python-docs:PACKAGE,... or a corpus name of
    the catalog."""
    previous: str | None = None
    """Passages of an earlier state of the corpus. Files of passages that did not change are shared with it, not written."""
    format: Format = "auto"
    """Format of the source. auto recognises it by the file names; set it when that fails."""
    columns: ColumnsOption = ()
    """Columns that hold doc_id, title and text, if they are not called so: doc_id=docid,text=abstract+body joins two. Usual
    names are known: id, docid, pid, content, contents, passage, body, headline and more. query_id, query and relevance are
    fields of the queries and qrels."""
    keep: tuple[str, ...] = ()
    """Other columns to carry along, such as url,date; search and serve give them back, and filters can use them. With
    NAME:TYPE (string, int64, float64, bool) a type is set."""
    bad_rows: Literal["skip", "fail"] = "skip"
    """What to do with a row that cannot become a passage: skip leaves it out and counts it, fail stops."""
    deduplicate: Literal["auto", "none", "exact", "near"] = "auto"
    """Which duplicates to drop: none, exact (same title and text), or near (also nearly the same). auto is exact,
    but none for a source with judgements, so that scores stay comparable with published ones."""
    near_threshold: float = Field(default=0.8, ge=0.1, le=0.95)
    """Jaccard similarity of three-word sequences above which two passages are near duplicates (estimated with
    MinHash, error about 0.04). Used with deduplicate = near."""
    max_text_bytes: int = Field(default=DEFAULT_MAX_TEXT_BYTES, ge=1, le=1 << 30)
    """Maximum size of title and text together, in bytes of UTF-8; a row of this size or more is a bad row."""
    max_passage_chars: int = Field(default=DEFAULT_MAX_PASSAGE_CHARS, ge=1)
    """Maximum length of a passage from a text or Markdown file, in characters; longer files are split between
    paragraphs."""
    split_tokens: int | None = Field(default=None, ge=1)
    """Split documents of any format into passages of at most this many tokens, between paragraphs or sentences. Passages
    are called doc#1, doc#2 ...; searches give back documents, by their best passage. If omitted, rows are not split."""
    overlap: int = Field(default=0, ge=0)
    """Tokens with which a passage repeats the end of the one before, at most. Used with split_tokens."""
    tokenizer: str | None = None
    """Model whose tokenizer counts for split_tokens: the retriever."""
    rows_per_file: int = Field(default=65_536, ge=1)
    """Passages per Parquet file; documents where these are split."""

    inputs: ClassVar[frozenset[str]] = frozenset({"source", "tokenizer"})
    safety: ClassVar[frozenset[str]] = StageConfig.safety | {"bad_rows"}
    operational: ClassVar[frozenset[str]] = frozenset({"previous"})
    used_with: ClassVar[UsedWith] = {
        "overlap": ("split_tokens", ()),
        "tokenizer": ("split_tokens", ()),
    }

    @model_validator(mode="after")
    def _splits_by_a_tokenizer(self) -> Self:
        if self.split_tokens is None:
            return self
        if self.tokenizer is None:
            raise OptionError("{split_tokens} needs a {tokenizer}: the model that will encode the passages")
        if self.overlap >= self.split_tokens:
            raise OptionError("{overlap} = {value!r} must be less than {split_tokens}", value=self.overlap)
        return self

    def read_options(self) -> ReadOptions:
        """Return how the source is read."""
        return ReadOptions(
            max_text_bytes=self.max_text_bytes,
            max_passage_chars=self.max_text_bytes if self.split_tokens else self.max_passage_chars,
            columns=ColumnChoice.parse(self.columns, self.keep),
        )


def ingest(config: IngestConfig) -> Artifact:
    """Read a source into passages, unless they are there.

    Raises:
        ArtifactMissingError: `previous` is not the output of `readapt ingest`.
        InputError: the source is missing, empty, without text, or of an unknown format; no passage is left; or a row is bad
            under `bad_rows="fail"`.
    """
    options = config.read_options()
    source = open_source(config.source, config.format, options)
    source.check()
    deduplicate = _resolved(config.deduplicate, source)
    resolved = config.model_copy(update={"format": source.format, "deduplicate": deduplicate})
    # An option that changes nothing here has its default, so that its value makes no other artifact.
    splitting = None
    if config.split_tokens is not None:
        splitting = open_splitting(config.split_tokens, config.overlap, str(config.tokenizer))
    idle = {
        "near_threshold": deduplicate != "near",
        "max_passage_chars": source.format != "text" or splitting is not None,
        "overlap": splitting is None,
    }
    defaults = {name: IngestConfig.model_fields[name].default for name, is_idle in idle.items() if is_idle}
    resolved = resolved.model_copy(update=defaults)

    def work(workspace: Workspace) -> None:
        if not _in_parallel(workspace, resolved, source, options, splitting):
            _Ingestion(workspace, resolved, source, deduplicate).run()
            if splitting:
                files = (workspace.location / "passages").files(".parquet")
                _record_split(workspace, splitting, [split_part(file, splitting) for file in files])

    inputs = {"source": source.fingerprint()}
    if splitting:
        inputs["tokenizer"] = splitting.tokenizer_fingerprint
    return produce("ingest", resolved, inputs=inputs, work=work)


def _record_split(workspace: Workspace, splitting: Splitting, counts: list[dict[str, int]]) -> None:
    """Put into the manifest what the passages are, and of how many documents."""
    found = total(counts)
    num_split = found.pop("num_split_documents")
    workspace.counts |= found
    workspace.details["split"] = {
        "tokens": splitting.max_tokens,
        "overlap": splitting.overlap,
        "tokenizer": splitting.tokenizer,
        "num_split_documents": num_split,
    }
    logger.info(
        "ingest: %d of %d documents were split, which gives %d passages of at most %d tokens",
        *(num_split, found["num_documents"], found["num_passages"], splitting.max_tokens),
    )


def _resolved(deduplicate: Literal["auto"] | Deduplication, source: Source) -> Deduplication:
    automatic: Deduplication = "none" if source.has_qrels and not source.labels_from_passages else "exact"
    return automatic if deduplicate == "auto" else deduplicate


def _in_parallel(
    workspace: Workspace, config: IngestConfig, source: Source, options: ReadOptions, splitting: Splitting | None
) -> bool:
    """Read a large source of rows without labels on the cluster; False where one process is to read it."""
    if type(source) is not TableSource or config.deduplicate == "near":
        return False
    pieces, total_bytes = plan_pieces(source)
    if total_bytes < MIN_PARALLEL_BYTES:
        return False
    job = PieceJob(
        output=on_worker.absolute(workspace.location),
        table_format=source.format,
        options=options,
        kept=source.kept,
        splitting=splitting,
        rows_per_file=config.rows_per_file,
        drops_duplicates=config.deduplicate == "exact",
        num_pieces=len(pieces),
        num_partitions=parallel_ingest.num_partitions(total_bytes),
        earlier=_earlier_parts(config),
    )
    run = parallel_ingest.ParallelIngest(workspace, pieces, job, fails_on_bad_rows=config.bad_rows == "fail")
    run.run()
    if splitting:
        _record_split(workspace, splitting, run.split_counts)
    workspace.details |= {"source": source.description(), "num_pieces": len(pieces)}
    return True


def _earlier_parts(config: IngestConfig) -> dict[str, EarlierPart]:
    """Return the parts of the earlier corpus by their first doc_id; none if documents are split, which writes parts again."""
    if config.previous is None or config.split_tokens is not None:
        return {}
    folder = on_worker.absolute(open_artifact(config.previous, "ingest").location / "passages")
    said = {name: footer.metadata for name, footer in named_footers(folder).items() if DIGEST in footer.metadata}
    return {each[FIRST_ID]: EarlierPart(folder / name, each[DIGEST]) for name, each in said.items()}


class _BadRows:
    """Counts what is left out, names the first of them, and stops where the policy says so."""

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._reasons: Counter[str] = Counter()
        self._first: list[BadRow] = []

    def add(self, row: BadRow) -> None:
        if self._policy == "fail":
            raise CorpusError(f"bad row at {row.told}; mend it, or leave such rows out with --bad-rows skip")
        self._reasons[row.reason] += 1
        if len(self._first) < _NUM_NAMED:
            self._first.append(row)
            logger.warning("ingest: left out %s", row.told)

    def good(self, records: Iterable[_Record | BadRow]) -> list[_Record]:
        found = []
        for record in records:
            if isinstance(record, BadRow):
                self.add(record)
            else:
                found.append(record)
        return found

    def summary(self) -> dict[str, Any]:
        return {
            "total": self._reasons.total(),
            "by_reason": dict(sorted(self._reasons.items())),
            "first": [row.as_json() for row in self._first],
        }


class _Ingestion:
    """One run over a source. `_ids` gives for each id its row, doubled; odd where it is a dropped duplicate of that row."""

    def __init__(self, workspace: Workspace, config: IngestConfig, source: Source, deduplicate: Deduplication) -> None:
        self._workspace, self._config, self._source = workspace, config, source
        self._deduplicate = deduplicate
        self._bad_rows = _BadRows(config.bad_rows)
        self._writer = PartWriter(
            workspace.location / "passages",
            rows_per_file=config.rows_per_file,
            kept=source.kept,
            earlier=_earlier_parts(config),
        )
        self._ids = RowTable()
        self._first_dropped: list[tuple[str, int]] = []
        self._num_dropped = 0
        self._checks: RowChecks[str] = RowChecks(source.kept, max_text_bytes=config.max_text_bytes)

    def run(self) -> None:
        """Passages first, then what points at them."""
        self._write_passages()
        self._write_labels()
        self._workspace.details |= {
            "source": self._source.description(),
            "kinds": dict(sorted(self._checks.kinds.items())),
            "unfit_values": row_checks.told(self._checks.unfit, self._source.kept, str),
            "bad_rows": self._bad_rows.summary(),
            "duplicates": self._duplicates(),
        }

    def _write_passages(self) -> None:
        earlier = duplicate_finder(
            self._deduplicate,
            near_threshold=self._config.near_threshold,
            title_tells_apart=self._source.title_tells_apart,
        )
        total_bytes = 0
        for row in self._source.rows():
            passage = self._checks.passage(row, row.place)
            if isinstance(passage, BadRow):
                self._bad_rows.add(passage)
                continue
            key = digest(passage.doc_id)
            if self._ids.get(key) is not None:
                self._bad_rows.add(BadRow(row.place, "duplicate_id"))
                continue
            kept = earlier(passage, self._writer.num_rows)
            if kept is not None:
                self._drop(passage, key, kept)
                continue
            self._ids.put(key, 2 * self._writer.num_rows)
            size_bytes = num_bytes(passage.title) + num_bytes(passage.text)
            total_bytes += size_bytes
            self._writer.add(passage, size_bytes)
            if self._writer.num_rows % _ROWS_PER_PROGRESS == 0:
                self._show_progress()
        self._writer.close()
        if not self._writer.num_rows:
            raise CorpusError(
                f"no passages are left of {self._config.source!r}: every row is bad ({in_words(self._bad_rows.summary()['by_reason'])}); "
                f"the log names the first of them"
            )
        if self._checks.num_changed_ids:
            logger.info(
                "ingest: %d doc_ids had white space, which TREC files cannot hold: it is cut off at the ends and encoded "
                "inside, a space as %%20; so it is in queries and judgements",
                self._checks.num_changed_ids,
            )
        self._workspace.counts |= {"num_passages": self._writer.num_rows, "num_bytes": total_bytes}

    def _drop(self, passage: Passage, key: bytes, kept_row: int) -> None:
        self._num_dropped += 1
        self._ids.put(key, 2 * kept_row + 1)
        if len(self._first_dropped) < _NUM_NAMED:
            self._first_dropped.append((passage.doc_id, kept_row))

    def _show_progress(self) -> None:
        done, share = self._writer.num_rows, self._source.fraction_read
        self._workspace.progress(done, max(done, round(done / share)) if share > 0 else None, unit="passages")

    def _duplicates(self) -> dict[str, Any]:
        kept_ids = self._writer.doc_ids(row for _, row in self._first_dropped)
        return {
            "dropped": self._num_dropped,
            "first": [{"doc_id": doc_id, "kept": kept_ids[row]} for doc_id, row in self._first_dropped],
        }

    def _write_labels(self) -> None:
        queries = self._bad_rows.good(self._source.queries())
        splits = {split: self._bad_rows.good(qrels) for split, qrels in self._source.qrels().items()}
        details: dict[str, Any] = {}
        if self._source.labels_from_passages:
            for split, qrels in splits.items():
                queries, splits[split], details["queries_left_out"] = with_passage(queries, qrels, self._is_kept)
        elif self._num_dropped:
            splits, details["qrels_moved_to_kept_duplicates"] = self._repointed(splits)
        if queries:
            self._write("queries/part-00000.parquet", queries, QUERY_SCHEMA)
            self._workspace.counts["num_queries"] = len(queries)
        for split, qrels in splits.items():
            if qrels:
                self._write(f"qrels/{split}.parquet", qrels, QREL_SCHEMA)
        if splits:
            self._workspace.counts["num_qrels"] = sum(map(len, splits.values()))
            details |= self._unknown(queries, splits)
        self._workspace.details["labels"] = details

    def _is_kept(self, doc_id: str) -> bool:
        number = self._ids.get(digest(doc_id))
        return number is not None and number % 2 == 0

    def _repointed(self, splits: dict[str, list[Qrel]]) -> tuple[dict[str, list[Qrel]], int]:
        judged = {qrel.doc_id: self._ids.get(digest(qrel.doc_id)) for qrels in splits.values() for qrel in qrels}
        dropped = {doc_id: number // 2 for doc_id, number in judged.items() if number is not None and number % 2}
        kept_ids = self._writer.doc_ids(dropped.values())
        moved = {doc_id: kept_ids[row] for doc_id, row in dropped.items()}
        done = {split: repointed(qrels, lambda doc_id: moved.get(doc_id, doc_id)) for split, qrels in splits.items()}
        return {split: qrels for split, (qrels, _) in done.items()}, sum(count for _, count in done.values())

    def _unknown(self, queries: list[Query], splits: dict[str, list[Qrel]]) -> dict[str, int]:
        """How many judgements speak of a passage or a query that is not there."""
        query_ids = {query.query_id for query in queries}
        qrels = [qrel for split in splits.values() for qrel in split]
        lost = {
            "passages": [qrel.doc_id for qrel in qrels if not self._is_kept(qrel.doc_id)],
            "queries": [qrel.query_id for qrel in qrels if qrel.query_id not in query_ids],
        }
        for what, ids in lost.items():
            if ids:
                distinct = list(dict.fromkeys(ids))
                logger.warning(
                    "ingest: %d of %d judgements are of unknown %s (%d): %s",
                    len(ids),
                    len(qrels),
                    what,
                    len(distinct),
                    named(distinct),
                )
        return {f"qrels_of_unknown_{what}": len(ids) for what, ids in lost.items()}

    def _write(self, name: str, records: list[Query] | list[Qrel], schema: pa.Schema) -> None:
        columns = [list(column) for column in zip(*records, strict=True)]
        table = pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
        target: Location = self._workspace.location / name
        with target.open_output() as file:
            pq.write_table(table, file)
