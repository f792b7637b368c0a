"""The ingest stage: read a source into clean passages in Parquet, with its queries and judgements if it has them.

In: the name of a source. Out: `passages/part-00000.parquet` and so on, and perhaps `queries/part-00000.parquet` and
`qrels/<split>.parquet`. Tables of 64 MB or more (16 MB if near duplicates are dropped) are read by Ray tasks
(`cluster/parallel_ingest.py`), one of which holds the queries and judgements. All else is read by one process, at some
30,000 passages of 80 words per second. It holds one part, the queries and judgements, and 32 to 48 bytes per passage
for its id; to drop exact duplicates as much again per passage, to drop near duplicates 4 KB. A killed run reads the
source again and keeps the parts that are written: they are the same. With an earlier corpus, tasks skip pieces of the
source that did not change (`sources/known_pieces.py`).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from readapt_ray.artifacts import Artifact, Workspace, open_artifact, produce
from readapt_ray.cluster import on_worker, parallel_ingest
from readapt_ray.config import OptionError, StageConfig, UsedWith
from readapt_ray.records import Passage
from readapt_ray.retrieval.footers import listed_footers, named_footers, write_table
from readapt_ray.retrieval.vector_files import Footer
from readapt_ray.sources import row_checks
from readapt_ray.sources.bad_rows import NUM_NAMED, BadRows
from readapt_ray.sources.cleaning import num_bytes
from readapt_ray.sources.columns import ColumnChoice, ColumnsOption
from readapt_ray.sources.duplicates import Deduplication, RowTable, digest, duplicate_finder
from readapt_ray.sources.known_pieces import key_of, read_pieces
from readapt_ray.sources.labels import write_labels
from readapt_ray.sources.opening import Format, open_source
from readapt_ray.sources.parts import DIGEST, FIRST_ID, EarlierPart, PartWriter
from readapt_ray.sources.piece_job import PieceJob
from readapt_ray.sources.pieces import plan_pieces
from readapt_ray.sources.read_options import DEFAULT_MAX_PASSAGE_CHARS, DEFAULT_MAX_TEXT_BYTES, ReadOptions
from readapt_ray.sources.row_checks import RowChecks
from readapt_ray.sources.source import BadRow, Source
from readapt_ray.sources.splitting import Splitting, open_splitting, split_part, total
from readapt_ray.sources.table_sources import LabelledTableSource, TableSource
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

MIN_PARALLEL_BYTES = 64 << 20
"""Least size of a source, decompressed, to read it with Ray. One process reads a smaller one before Ray has started."""
MIN_NEAR_BYTES = 16 << 20
"""The same limit if near duplicates are dropped, since a core then handles only some 5,000 passages per second."""
_ROWS_PER_PROGRESS = 500


class IngestConfig(StageConfig):
    """The options of `readapt ingest`."""

    source: str
    """Corpus to read: a path or URI, ir_datasets:NAME, hub:OWNER/NAME, python-docs:PACKAGE,... or a corpus name of
    the catalog."""
    previous: str | None = None
    """Output of `readapt ingest` for an earlier state of the corpus. Files whose passages did not change are shared
    with it instead of written."""
    format: Format = "auto"
    """Format of the source. auto recognises it by the file names; set it when that fails."""
    columns: ColumnsOption = ()
    """Columns that hold doc_id, title and text, if they have other names: doc_id=docid,text=abstract+body joins two.
    Usual names are known: id, docid, pid, content, contents, passage, body, headline and more. query_id, query and
    relevance are fields of the queries and qrels."""
    keep: tuple[str, ...] = ()
    """Other columns to keep, such as url,date. Servers and `ra.Retriever` return them, filters can use them, and
    exports hold them; the TREC run of `readapt search` has only ids. NAME:TYPE sets a type (string, int64, float64,
    bool)."""
    bad_rows: Literal["skip", "fail"] = "skip"
    """What to do with a row that cannot become a passage: skip leaves it out and counts it, fail stops."""
    deduplicate: Literal["auto", "none", "exact", "near"] = "auto"
    """Which duplicates to drop: none, exact (same title and text), or near (also nearly the same). auto is exact,
    but none for a source with judgements, so that scores stay comparable with published ones."""
    near_threshold: float = Field(default=0.8, ge=0.1, le=0.95)
    """Jaccard similarity of three-word sequences above which two passages are near duplicates (estimated with
    MinHash, error about 0.04). Used with deduplicate = near."""
    max_text_bytes: int = Field(default=DEFAULT_MAX_TEXT_BYTES, ge=1, le=1 << 30)
    """Limit of title and text together, in bytes of UTF-8; a row of this size or more is a bad row."""
    max_passage_chars: int = Field(default=DEFAULT_MAX_PASSAGE_CHARS, ge=1)
    """Maximum length of a passage from a text or Markdown file, in characters; longer files are split between
    paragraphs."""
    split_tokens: int | None = Field(default=None, ge=1)
    """Split documents of any format into passages of at most this many tokens, between paragraphs or sentences. Passages
    get the ids doc#1, doc#2 ...; searches return documents, by their best passage. If omitted, rows are not split."""
    overlap: int = Field(default=0, ge=0)
    """Maximum number of tokens of the previous passage's end that a passage repeats. Used with split_tokens."""
    tokenizer: str | None = None
    """Model whose tokenizer counts the tokens of split_tokens: the retriever."""
    rows_per_file: int = Field(default=65_536, ge=1)
    """Passages per Parquet file; with split_tokens, documents per file."""

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
        if self.max_passage_chars != DEFAULT_MAX_PASSAGE_CHARS:
            raise OptionError(
                "{max_passage_chars} does nothing with {split_tokens}, which splits text files, too; leave one out"
            )
        return self

    def read_options(self) -> ReadOptions:
        """Return the options that the readers of sources take: limits of size, and the user's columns.

        With `split_tokens` the readers do not split text files by `max_passage_chars`.
        """
        return ReadOptions(
            max_text_bytes=self.max_text_bytes,
            max_passage_chars=self.max_text_bytes if self.split_tokens else self.max_passage_chars,
            columns=ColumnChoice.parse(self.columns, self.keep),
        )


def ingest(config: IngestConfig) -> Artifact:
    """Read a source into passages, with its queries and judgements if it has them.

    A killed run reads the source again and keeps the files that are written. Does nothing if the output was made from
    the same source with the same options; to find that out, local files are hashed.

    Raises:
        ArtifactMissingError: `previous` is not the output of `readapt ingest`.
        InputError: the source is missing, empty, without text, or of an unknown format; no passage is left; or a row is
            bad and `bad_rows` is "fail".
        ArtifactConflictError: the output holds something else, or a result of other options and `overwrite` is not set.
    """
    options = config.read_options()
    source = open_source(config.source, config.format, options)
    source.check()
    deduplicate = _resolved(config.deduplicate, source)
    resolved = config.model_copy(update={"format": source.format, "deduplicate": deduplicate})
    # Options without effect get their defaults, so that their values do not change the fingerprint.
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
        if not (isinstance(source, TableSource) and _in_parallel(workspace, resolved, source, options, splitting)):
            shared = _Ingestion(workspace, resolved, source, deduplicate).run()
            if splitting:
                files = (workspace.location / "passages").files(".parquet")
                _record_split(workspace, splitting, [split_part(file, splitting) for file in files])
            write_table(workspace.location, "passages", shared)

    inputs = {"source": source.fingerprint()}
    if splitting:
        inputs["tokenizer"] = splitting.tokenizer_fingerprint
    return produce("ingest", resolved, inputs=inputs, work=work)


def _record_split(workspace: Workspace, splitting: Splitting, counts: list[dict[str, int]]) -> None:
    """Put into the manifest how documents were split, and how many documents and passages there are."""
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
    workspace: Workspace, config: IngestConfig, source: TableSource, options: ReadOptions, splitting: Splitting | None
) -> bool:
    """Read a large source of rows on the cluster; return False, with nothing done, if it is small."""
    earlier = read_pieces(on_worker.absolute(Location(config.previous))) if config.previous is not None else None
    pieces, total_bytes = plan_pieces(source, earlier.starts if earlier else frozenset())
    if total_bytes < (MIN_NEAR_BYTES if config.deduplicate == "near" else MIN_PARALLEL_BYTES):
        return False
    footers = _earlier_footers(config)
    job = PieceJob(
        output=on_worker.absolute(workspace.location),
        table_format=source.table_format.name,
        options=options,
        kept=source.kept,
        splitting=splitting,
        rows_per_file=config.rows_per_file,
        deduplicate=_resolved(config.deduplicate, source),
        num_pieces=len(pieces),
        near_threshold=config.near_threshold,
        num_partitions=parallel_ingest.num_partitions(total_bytes),
        num_near_partitions=parallel_ingest.num_near_partitions(total_bytes),
        earlier=_earlier_parts(config, footers),
        known={},
        by_changes=False,
    )
    if earlier is not None and job.is_plain:
        known = earlier.known(job.made_by, (key_of(piece, source.contents) for piece in pieces))
        changed_bytes = total_bytes * (len(pieces) - len(known)) // len(pieces)
        is_small = changed_bytes <= parallel_ingest.MAX_CHANGED_BYTES and not isinstance(source, LabelledTableSource)
        job = replace(job, known=known, by_changes=is_small and earlier.deduplicate == job.deduplicate)
    run = parallel_ingest.ParallelIngest(workspace, source, pieces, job, config.bad_rows)
    run.run(footers)
    if splitting:
        _record_split(workspace, splitting, run.split_counts)
    workspace.details |= {"source": source.description(), "num_pieces": len(pieces)}
    return True


def _earlier_footers(config: IngestConfig) -> dict[str, Footer]:
    """Return the footers of the earlier corpus's files that may be shared; none if documents are split, since splitting
    writes all files again.
    """
    if config.previous is None or config.split_tokens is not None:
        return {}
    artifact = open_artifact(config.previous, "ingest").location
    found = listed_footers(artifact, "passages")
    if any(DIGEST in each.metadata and FIRST_ID not in each.metadata for each in found.values()):
        found = named_footers(artifact / "passages")  # the list of an older release lacks some fields
    return {name: each for name, each in found.items() if DIGEST in each.metadata}


def _earlier_parts(config: IngestConfig, footers: Mapping[str, Footer]) -> dict[str, EarlierPart]:
    """Return the files of the earlier corpus that may be shared, by their first doc_id."""
    if config.previous is None:
        return {}
    folder = on_worker.absolute(Location(config.previous) / "passages")
    said = {name: footer.metadata for name, footer in footers.items()}
    return {each[FIRST_ID]: EarlierPart(folder / name, each[DIGEST]) for name, each in said.items()}


class _Ingestion:
    """One pass of one process over a source.

    `_ids` maps the digest of each doc_id to 2 * row if the passage was kept, or 2 * row + 1 if it was dropped as a
    duplicate of that row.
    """

    def __init__(self, workspace: Workspace, config: IngestConfig, source: Source, deduplicate: Deduplication) -> None:
        self._workspace, self._config, self._source = workspace, config, source
        self._deduplicate = deduplicate
        self._earlier = _earlier_footers(config)
        self._bad_rows = BadRows(config.bad_rows)
        self._writer = PartWriter(
            workspace.location / "passages",
            rows_per_file=config.rows_per_file,
            kept=source.kept,
            earlier=_earlier_parts(config, self._earlier),
        )
        self._ids = RowTable()
        self._first_dropped: list[tuple[str, int]] = []
        self._num_dropped = 0
        self._checks: RowChecks[str] = RowChecks(source.kept, max_text_bytes=config.max_text_bytes)

    def run(self) -> dict[str, Footer]:
        """Write the passages, then queries and judgements; return the footers of shared files by their new names."""
        self._write_passages()
        self._write_labels()
        self._workspace.details |= {
            "source": self._source.description(),
            "kinds": dict(sorted(self._checks.kinds.items())),
            "unfit_values": row_checks.log_unfit(self._checks.unfit, self._source.kept, str),
            "bad_rows": self._bad_rows.summary(),
            "duplicates": self._duplicates(),
        }
        return {name: self._earlier[before] for name, before in self._writer.shared.items()}

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
            raise self._bad_rows.none_left(self._config.source)
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
        if len(self._first_dropped) < NUM_NAMED:
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
        written = write_labels(
            self._source, self._workspace.location, self._bad_rows, self._kept_ids, any_dropped=self._num_dropped > 0
        )
        self._workspace.counts |= written.counts
        self._workspace.details["labels"] = written.details
        for each in written.warnings:
            logger.warning("ingest: %s", each)

    def _kept_ids(self, doc_ids: Sequence[str]) -> dict[str, str]:
        numbers = {doc_id: self._ids.get(digest(doc_id)) for doc_id in doc_ids}
        known = {doc_id: number for doc_id, number in numbers.items() if number is not None}
        moved = self._writer.doc_ids(number // 2 for number in known.values() if number % 2)
        return {doc_id: moved[number // 2] if number % 2 else doc_id for doc_id, number in known.items()}
