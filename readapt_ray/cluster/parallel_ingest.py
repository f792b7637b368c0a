"""Ingest a source on the cluster: read pieces of it in Ray tasks, and find duplicates with an exchange of digests.

The rounds of tasks are:

1. One task per piece writes its passages, and 16-byte digests of their ids and contents.
2. One task per partition of the digests finds duplicates. Of passages with the same id or content, the first in the
   order of the source is kept.
3. Near duplicates among the rest are found (`near_rounds.py`).
4. One task writes queries and judgements.
5. Pieces that hold duplicates are written again without them.

The driver holds a few hundred bytes per file and per piece. Ray retries a lost task. A killed run resumes from the
files that are already written.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from readapt_ray import artifact_files
from readapt_ray.artifacts import Workspace, fingerprint
from readapt_ray.cluster import bounded_tasks, connection, on_worker, placement
from readapt_ray.cluster.near_rounds import drop_near
from readapt_ray.cluster.nodes import alive
from readapt_ray.retrieval import footers
from readapt_ray.retrieval.vector_files import Footer
from readapt_ray.sources import piece_files, row_checks
from readapt_ray.sources.bad_rows import NUM_NAMED, BadRows
from readapt_ray.sources.exchange import ROW_BITS
from readapt_ray.sources.kept_passages import KeptPassages
from readapt_ray.sources.known_pieces import key_of, write_pieces
from readapt_ray.sources.labels import WrittenLabels, write_labels
from readapt_ray.sources.piece_job import PieceJob
from readapt_ray.sources.pieces import Piece
from readapt_ray.sources.source import BadRow
from readapt_ray.sources.table_sources import LabelledTableSource, TableSource

logger = logging.getLogger("readapt_ray")

_PARTITION_BYTES = 512 << 20
_NEAR_PARTITION_BYTES = 32 << 20
MAX_CHANGED_BYTES = 512 << 20
"""Limit on the source bytes of changed pieces. Up to it, each task holds their doc_ids and contents, and looks for
duplicates of them in the unchanged pieces."""
_TASKS_PER_CPU = 2
_SUMMARY = "summary.json"
_PLAN = "plan"
_FORMAT = 3
"""Version of the format of the exchange's files. Files with another version are not read."""
_PARTS = "passages/part-#.parquet"


def num_partitions(total_bytes: int) -> int:
    """Return the number of partitions for digests, at least 1: one per 512 MiB of source, which one task sorts."""
    return max(1, -(-total_bytes // _PARTITION_BYTES))


def num_near_partitions(total_bytes: int) -> int:
    """Return the number of partitions for bands of MinHashes, at least 1: one per 32 MiB, which one task compares."""
    return max(1, -(-total_bytes // _NEAR_PARTITION_BYTES))


class ParallelIngest:
    """An ingest of one source, whose pieces are read by Ray tasks.

    Args:
        workspace: receives the output, the progress, and counts and details for the manifest.
        source: the source.
        pieces: all parts of the source that tasks read, in order.
        job: options and folders that all tasks share.
        bad_rows: whether bad rows are left out and counted, or end the ingest.
    """

    def __init__(
        self,
        workspace: Workspace,
        source: TableSource,
        pieces: Sequence[Piece],
        job: PieceJob,
        bad_rows: Literal["skip", "fail"],
    ) -> None:
        self._workspace, self._source, self._pieces, self._job = workspace, source, pieces, job
        self._bad_rows = BadRows(bad_rows)
        self._exchange = workspace.location / "exchange"
        self._options: dict[str, Any] = {"num_cpus": 1}
        self._num_at_once = 1
        self.split_counts: list[dict[str, int]] = []
        """Counts of documents and passages of each part; empty if documents are not split."""

    def run(self, earlier: Mapping[str, Footer]) -> None:
        """Write all passages, queries and judgements into the workspace, with counts and details for the manifest.

        It resumes from files of a killed run that cut the source in the same way, and removes others. Afterwards
        `split_counts` is set and the files of the exchange are gone.

        Args:
            earlier: known footers of the files of the earlier corpus, by name; empty if there is no earlier corpus.

        Raises:
            CorpusError: a file changed or is damaged, no passage is left, or a row is bad and `bad_rows` is "fail".
        """
        self._place()
        self._remove_other_plan()
        location, summary = self._workspace.location, self._exchange / _SUMMARY
        if not summary.is_file():
            summary.write_text(json.dumps(self._read_and_compare()))
        found = json.loads(summary.read_text())
        self._drop_duplicates(found)
        if self._job.splitting:
            names = (file.name for file in (self._job.output / "passages").files(".parquet"))
            self.split_counts = list(self._tasks(piece_files.split_into_passages, ((name,) for name in names)))
        said = footers.write_table(self._job.output, "passages", self._shared(found, earlier))
        if self._job.is_plain:
            pairs = zip(self._pieces, found["pieces"], strict=True)
            pieces = ((piece, key_of(piece, self._source.contents), record) for piece, record in pairs)
            metadata = {name: each.metadata for name, each in said.items()}
            write_pieces(location, self._job.made_by, self._job.deduplicate, pieces, metadata)
        self._workspace.counts |= found["counts"]
        self._workspace.details |= found["details"]
        # First note in the summary that no duplicate is left: a resumed run that finds it needs no other file.
        summary.write_text(json.dumps(found | {"lists": {}}))
        artifact_files.clear(location, [each for each in artifact_files.EXCHANGED if each != f"exchange/{_SUMMARY}"])
        artifact_files.clear(location, (f"exchange/{_SUMMARY}",))

    def _shared(self, found: Mapping[str, Any], earlier: Mapping[str, Footer]) -> dict[str, Footer]:
        """Return the known footers of the files of unchanged pieces, by their names in this corpus."""
        if any(found["lists"].values()):
            return {}  # some files were written again without duplicates
        names = [
            pair
            for number, each in self._job.known.items()
            for pair in zip(found["pieces"][number]["parts"], each.record["parts"], strict=True)
        ]
        return {name: earlier[before] for name, before in names if before in earlier}

    def _remove_other_plan(self) -> None:
        """Remove the files of an earlier start that cut the source differently: their parts have other numbers."""
        ranges = [[(each.label, each.start, each.end) for each in piece.ranges] for piece in self._pieces]
        known = sorted(self._job.known) if self._job.by_changes else []
        plan = fingerprint([_FORMAT, ranges, self._job.num_partitions, self._job.num_near_partitions, known])
        kept, summary = self._exchange / _PLAN, self._exchange / _SUMMARY
        if kept.read_text() != plan if kept.is_file() else not summary.is_file():
            summary.delete()
            artifact_files.clear(self._workspace.location, (_PARTS, *artifact_files.EXCHANGED))
            kept.write_text(plan)

    def _place(self) -> None:
        """Let tasks run on any node; if the source is on this node's disk, only on this node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        resources = connection.connect()
        placement.check_placement(1, {"CPU": 1}, who="tasks")
        self._num_at_once = _TASKS_PER_CPU * max(resources.num_cpus, 1)
        connection.check_seen_by_all(self._job.output / "passages")
        if self._pieces[0].ranges[0].file.is_local and len(alive()) > 1:
            here = NodeAffinitySchedulingStrategy(on_worker.this_node(), soft=False)
            self._options = {"num_cpus": 0, "scheduling_strategy": here}
            self._num_at_once = max(1, resources.num_cpus // resources.num_nodes)

    def _tasks(self, function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        import ray

        remote = ray.remote(**self._options)(function)
        job = ray.put(self._job)
        return bounded_tasks.run_bounded(
            lambda item: remote.remote(item[0], *item[1:], job=job), items, self._num_at_once
        )

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """Read the pieces; return what each holds, and the number of all passages."""
        read: dict[int, dict[str, Any]] = {}
        num_read = 0
        for found in self._tasks(piece_files.read_piece, ((piece,) for piece in self._pieces)):
            read[found["number"]] = found
            num_read += sum(found["parts"].values())
            total = round(num_read * len(self._pieces) / len(read))
            self._workspace.progress(num_read, total, unit="passages")
        return [read[number] for number in range(len(self._pieces))], num_read

    def _find_repeats_in_known(self, pieces: list[dict[str, Any]]) -> set[int]:
        """Write digests of passages in known pieces that repeat a changed one; return the pieces with damaged files."""
        changed = [
            name for number, each in enumerate(pieces) if number not in self._job.known for name in each["parts"]
        ]
        known = sorted(self._job.known)
        size = -(-len(known) // self._num_at_once)
        batches = ((known[start : start + size], changed) for start in range(0, len(known), size or 1))
        found = {
            number: num for each in self._tasks(piece_files.repeats_in_known, batches) for number, num in each.items()
        }
        for number, num_chunks in found.items():
            pieces[number]["num_chunks"] = num_chunks or 0
        return {number for number, num_chunks in found.items() if num_chunks is None}

    def _read_and_compare(self) -> dict[str, Any]:
        pieces, num_read = self._read()
        while self._job.by_changes and (damaged := self._find_repeats_in_known(pieces)):
            known = {number: each for number, each in self._job.known.items() if number not in damaged}
            self._job = replace(self._job, known=known, earlier={})
            for number in damaged:
                self._job.file("piece", number).delete()
            pieces, num_read = self._read()
        chunks = [piece["num_chunks"] for piece in pieces]
        partitions = range(self._job.num_partitions)
        ids = list(self._tasks(piece_files.repeated_ids, ((number, chunks) for number in partitions)))
        with_lost_ids = sorted(found["partition"] for found in ids if found["count"])
        wanted = partitions if self._job.deduplicate != "none" else ()
        contents = list(
            self._tasks(piece_files.repeated_contents, ((number, chunks, with_lost_ids) for number in wanted))
        )
        lists = {
            "drop-ids": [(number, 0) for number in with_lost_ids],
            "drop-contents": sorted((found["partition"], 0) for found in contents if found["count"]),
            "drop-near": [],
        }
        if self._job.deduplicate == "near":
            num_rows = [sum(piece["parts"].values()) for piece in pieces]
            near = drop_near(self._tasks, self._job, num_rows, lists)
            lists["drop-near"] = near["files"]
            contents.append(near)
        self._add_bad_rows(pieces, ids)
        return self._summarize(pieces, contents, lists, lost=[*ids, *contents], num_read=num_read)

    def _summarize(
        self,
        pieces: Sequence[dict[str, Any]],
        contents: Sequence[dict[str, Any]],
        lists: dict[str, Any],
        *,
        lost: Sequence[dict[str, Any]],
        num_read: int,
    ) -> dict[str, Any]:
        """Return counts and details for the manifest, and which passages are dropped from which part.

        Args:
            pieces: what each piece holds.
            contents: duplicates by content that each partition found, and near duplicates.
            lists: the numbers of the files that list passages to drop, by kind.
            lost: all duplicates, by id and by content, of each partition.
            num_read: number of passages of all pieces.
        """
        num_kept = num_read - sum(found["count"] for found in lost)
        if not num_kept:
            raise self._bad_rows.none_left(self._source.name)
        chunks = [piece["num_chunks"] for piece in pieces]
        kept = KeptPassages(self._job, [piece["parts"] for piece in pieces], chunks, lists)
        duplicates = self._duplicates(kept, contents)
        num_bytes = sum(piece["num_bytes"] for piece in pieces) - sum(found["num_bytes"] for found in lost)
        counts, labels = self._labels(kept, any_dropped=duplicates["dropped"] > 0)
        return {
            "counts": {"num_passages": num_kept, "num_bytes": num_bytes} | counts,
            "details": {
                **self._count_kinds(pieces),
                "bad_rows": self._bad_rows.summary(),
                "duplicates": duplicates,
                "labels": labels,
            },
            "parts": kept.parts,
            "lists": lists,
            "pieces": pieces,
            "num_changed_ids": sum(piece["num_changed_ids"] for piece in pieces),
        }

    def _count_kinds(self, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Sum up the kinds of passages, and the values that did not fit into kept columns."""
        kinds = sum((Counter(piece["kinds"]) for piece in pieces), Counter[str]())
        unfit = row_checks.merged((number, piece["unfit"]) for number, piece in enumerate(pieces))
        unfit_values = row_checks.log_unfit(unfit, self._job.kept, lambda at: self._places(pieces, [at])[0])
        return {"kinds": dict(sorted(kinds.items())), "unfit_values": unfit_values}

    def _add_bad_rows(self, pieces: Sequence[dict[str, Any]], ids: Sequence[dict[str, Any]]) -> None:
        """Count the rows that are left out, and name the first ones in the order of the source."""
        reasons: Counter[str] = Counter()
        first = [(row >> ROW_BITS, line, "duplicate_id", "") for found in ids for row, line in found["first"]]
        for number, piece in enumerate(pieces):
            reasons.update(piece["reasons"])
            first += [(number, line, reason, value) for line, reason, value in piece["first"]]
            first = sorted(first)[:NUM_NAMED]
        num_repeated = sum(found["count"] for found in ids)
        reasons.update({"duplicate_id": num_repeated} if num_repeated else {})
        places = self._places(pieces, [(number, line) for number, line, *_ in first])
        self._bad_rows.add_counted(
            reasons, (BadRow(place, *why) for place, (_, _, *why) in zip(places, first, strict=True))
        )

    def _labels(self, kept: KeptPassages, *, any_dropped: bool) -> tuple[dict[str, int], dict[str, int]]:
        """Write queries and judgements in one task; return counts and details of the manifest."""
        if not isinstance(self._source, LabelledTableSource):
            return {}, {"qrels_moved_to_kept_duplicates": 0} if any_dropped else {}
        ((written, reasons, first),) = self._tasks(_write_labels, [(self._source, kept, any_dropped)])
        self._bad_rows.add_counted(reasons, first)
        for each in written.warnings:
            logger.warning("ingest: %s", each)
        return written.counts, written.details

    def _places(self, pieces: Sequence[dict[str, Any]], lines: Sequence[tuple[int, int]]) -> list[str]:
        """Return "file:line" for each ordered pair (piece, line in the piece), as an ingest in one process names it."""
        found: list[str] = []
        label, in_file = "", 0
        for number, piece in enumerate(self._pieces):
            in_piece = 0
            for each, num_lines in zip(piece.ranges, pieces[number]["num_lines"], strict=True):
                in_file = in_file if each.label == label else 0
                label = each.label
                while len(found) < len(lines) and lines[len(found)] <= (number, in_piece + num_lines):
                    found.append(f"{label}:{in_file + lines[len(found)][1] - in_piece}")
                in_piece += num_lines
                in_file += num_lines
        return found

    def _duplicates(self, kept: KeptPassages, contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
        first = sorted(tuple(pair) for found in contents for pair in found["first"])[:NUM_NAMED]
        moved = kept.kept_rows((stays for _, stays in first), ("drop-near",))
        first = [(row, moved.get(stays, stays)) for row, stays in first]
        ids = kept.doc_ids(row for pair in first for row in pair)
        return {
            "dropped": sum(found["count"] for found in contents),
            "first": [{"doc_id": ids[row], "kept": ids[stays]} for row, stays in first],
        }

    def _drop_duplicates(self, found: dict[str, Any]) -> None:
        """Write pieces that hold duplicates again without them; log how many doc_ids were changed."""
        if found["num_changed_ids"]:
            logger.info(
                "ingest: %d doc_ids had white space, which TREC files cannot hold: it is cut off at the ends and encoded "
                "inside, a space as %%20",
                found["num_changed_ids"],
            )
        if any(found["lists"].values()):
            items = ((number, parts, found["lists"]) for number, parts in enumerate(found["parts"]))
            for _ in self._tasks(piece_files.take_out_repeats, items):
                pass


def _write_labels(
    source: LabelledTableSource, kept: KeptPassages, any_dropped: bool, job: PieceJob
) -> tuple[WrittenLabels, dict[str, int], list[BadRow]]:
    """Write the queries and judgements; also return how many rows are left out, by reason, and the first of them."""
    bad_rows = BadRows("gather")
    written = write_labels(source, job.output, bad_rows, kept.kept_ids, any_dropped=any_dropped)
    return written, dict(bad_rows.reasons), bad_rows.first
