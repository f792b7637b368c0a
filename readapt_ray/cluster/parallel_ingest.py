"""Ingest on the cluster: read pieces of the source in tasks, and find duplicates by an exchange of digests.

Three rounds of Ray tasks. First each piece writes its passages, and 16-byte digests of ids and contents. Then each partition
of the digests is read by one task, which finds repeats: of passages that share an id or a content the first in
the order of the source stays. Last the pieces that hold repeats are written again without them. The driver holds some
hundred bytes per file and piece. A task that is lost is done again; a run that is killed goes on from the files that are there.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq

from readapt_ray import artifact_files
from readapt_ray.artifacts import Workspace, fingerprint
from readapt_ray.cluster import bounded_tasks, connection, on_worker, placement
from readapt_ray.cluster.nodes import alive
from readapt_ray.errors import CorpusError
from readapt_ray.sources import piece_files, row_checks
from readapt_ray.sources.exchange import ROW_BITS
from readapt_ray.sources.piece_files import NUM_NAMED, PieceJob
from readapt_ray.sources.pieces import Piece
from readapt_ray.sources.source import BadRow, in_words

logger = logging.getLogger("readapt_ray")

_PARTITION_BYTES = 512 << 20
_TASKS_PER_CPU = 2
_PLACE = (1 << ROW_BITS) - 1
_SUMMARY = "summary.json"
_PLAN = "plan"
_PARTS = "passages/part-#.parquet"


def num_partitions(total_bytes: int) -> int:
    """Return into how many partitions digests go: a task sorts those of 512 MB of source."""
    return max(1, -(-total_bytes // _PARTITION_BYTES))


class ParallelIngest:
    """Ingest the pieces of one source."""

    def __init__(
        self, workspace: Workspace, pieces: Sequence[Piece], job: PieceJob, *, fails_on_bad_rows: bool
    ) -> None:
        self._workspace, self._pieces, self._job = workspace, pieces, job
        self._fails = fails_on_bad_rows
        self._exchange = workspace.location / "exchange"
        self._options: dict[str, Any] = {"num_cpus": 1}
        self._num_at_once = 1
        self.split_counts: list[dict[str, int]] = []
        """Counts of the parts, if documents were split."""

    def run(self) -> None:
        """Fill the workspace.

        Raises:
            CorpusError: a file changed or is damaged, no passage is left, or a row is bad and none may be.
        """
        self._place()
        self._remove_other_plan()
        location, summary = self._workspace.location, self._exchange / _SUMMARY
        if not summary.is_file():
            summary.write_text(json.dumps(self._read_and_compare()))
        found = json.loads(summary.read_text())
        self._take_out(found)
        if self._job.splitting:
            names = (file.name for file in (self._job.output / "passages").files(".parquet"))
            self.split_counts = list(self._tasks(piece_files.split_into_passages, ((name,) for name in names)))
        self._workspace.counts |= found["counts"]
        self._workspace.details |= found["details"]
        # First the summary says that no repeat is left; while it is there, a run that goes on needs no other file.
        summary.write_text(json.dumps(found | {"lists": {}}))
        artifact_files.clear(location, [each for each in artifact_files.EXCHANGED if each != f"exchange/{_SUMMARY}"])
        artifact_files.clear(location, (f"exchange/{_SUMMARY}",))
        artifact_files.remove_temporary(location, artifact_files.split_by_owner(location.entries()[0], [_PARTS])[0])

    def _remove_other_plan(self) -> None:
        """Remove what was left by one process, or by a release that cut the source otherwise: its parts have other numbers."""
        ranges = [[(each.label, each.start, each.end) for each in piece.ranges] for piece in self._pieces]
        plan = fingerprint([ranges, self._job.num_partitions])
        kept, summary = self._exchange / _PLAN, self._exchange / _SUMMARY
        if kept.read_text() != plan if kept.is_file() else not summary.is_file():
            summary.delete()
            artifact_files.clear(self._workspace.location, (_PARTS, *artifact_files.EXCHANGED))
            kept.write_text(plan)

    def _place(self) -> None:
        """Let tasks run anywhere; if the source is on this node's disk, only here."""
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

    def _read_and_compare(self) -> dict[str, Any]:
        read: dict[int, dict[str, Any]] = {}
        num_read = 0
        for found in self._tasks(piece_files.read_piece, ((piece,) for piece in self._pieces)):
            read[found["number"]] = found
            num_read += sum(found["parts"].values())
            total = round(num_read * len(self._pieces) / len(read))
            self._workspace.progress(num_read, total, unit="passages")
        pieces = [read[number] for number in range(len(self._pieces))]
        chunks = [piece["num_chunks"] for piece in pieces]
        partitions = range(self._job.num_partitions)
        ids = list(self._tasks(piece_files.repeated_ids, ((number, chunks) for number in partitions)))
        with_lost_ids = sorted(found["partition"] for found in ids if found["count"])
        wanted = partitions if self._job.drops_duplicates else ()
        contents = list(
            self._tasks(piece_files.repeated_contents, ((number, chunks, with_lost_ids) for number in wanted))
        )
        bad_rows = self._bad_rows(pieces, ids)
        lost = [*ids, *contents]
        num_kept = num_read - sum(found["count"] for found in lost)
        if not num_kept:
            raise CorpusError(
                f"no passages are left: every row is bad ({in_words(bad_rows['by_reason'])}); the log names the first of them"
            )
        labels = {"qrels_moved_to_kept_duplicates": 0} if any(found["count"] for found in contents) else {}
        num_bytes = sum(piece["num_bytes"] for piece in pieces) - sum(found["num_bytes"] for found in lost)
        return {
            "counts": {"num_passages": num_kept, "num_bytes": num_bytes},
            "details": {
                **self._counted(pieces),
                "bad_rows": bad_rows,
                "duplicates": self._duplicates(pieces, contents),
                "labels": labels,
            },
            "parts": [piece["parts"] for piece in pieces],
            "lists": {
                "drop-ids": with_lost_ids,
                "drop-contents": sorted(found["partition"] for found in contents if found["count"]),
            },
            "num_changed_ids": sum(piece["num_changed_ids"] for piece in pieces),
        }

    def _counted(self, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Sum up the kinds of passages, and what did not fit into kept columns."""
        kinds = sum((Counter(piece["kinds"]) for piece in pieces), Counter[str]())
        unfit = row_checks.merged((number, piece["unfit"]) for number, piece in enumerate(pieces))
        told = row_checks.told(unfit, self._job.kept, lambda at: self._places(pieces, [at])[0])
        return {"kinds": dict(sorted(kinds.items())), "unfit_values": told}

    def _bad_rows(self, pieces: Sequence[dict[str, Any]], ids: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Sum up the rows that are left out, and name the first in the order of the source."""
        reasons: Counter[str] = Counter()
        first = [(row >> ROW_BITS, line, "duplicate_id", "") for found in ids for row, line in found["first"]]
        for number, piece in enumerate(pieces):
            reasons.update(piece["reasons"])
            first += [(number, line, reason, value) for line, reason, value in piece["first"]]
            first = sorted(first)[:NUM_NAMED]
        num_repeated = sum(found["count"] for found in ids)
        reasons.update({"duplicate_id": num_repeated} if num_repeated else {})
        places = self._places(pieces, [(number, line) for number, line, *_ in first])
        named = [BadRow(place, *why) for place, (_, _, *why) in zip(places, first, strict=True)]
        for row in named:
            if self._fails:
                raise CorpusError(f"bad row at {row.told}; mend it, or leave such rows out with --bad-rows skip")
            logger.warning("ingest: left out %s", row.told)
        return {
            "total": reasons.total(),
            "by_reason": dict(sorted(reasons.items())),
            "first": [row.as_json() for row in named],
        }

    def _places(self, pieces: Sequence[dict[str, Any]], lines: Sequence[tuple[int, int]]) -> list[str]:
        """Return file and line, as one process names them, of ordered pairs of piece and line in the piece."""
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

    def _duplicates(self, pieces: Sequence[dict[str, Any]], contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
        first = sorted(tuple(pair) for found in contents for pair in found["first"])[:NUM_NAMED]
        ids = {row: self._doc_id(row, pieces) for pair in first for row in pair}
        return {
            "dropped": sum(found["count"] for found in contents),
            "first": [{"doc_id": ids[row], "kept": ids[kept]} for row, kept in first],
        }

    def _doc_id(self, row: int, pieces: Sequence[dict[str, Any]]) -> str:
        """Read the id of a row, as long as its part still holds all passages."""
        place = row & _PLACE
        for name, num_rows in pieces[row >> ROW_BITS]["parts"].items():
            if place < num_rows:
                with (self._workspace.location / "passages" / name).open_input() as file:
                    return str(pq.read_table(file, columns=["doc_id"])["doc_id"][place].as_py())
            place -= num_rows
        raise IndexError(row)

    def _take_out(self, found: dict[str, Any]) -> None:
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
