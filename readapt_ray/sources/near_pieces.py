"""Find near duplicates in a parallel ingest, by exchanging MinHashes between its tasks.

In: the passages of all pieces, without repeated ids and contents. Out: per piece, files that say which passages are
dropped and which passage is kept instead of each. The rule is the same as in one process. Passages are taken in the order
of the source. A passage is dropped if an earlier kept passage shares a band of MinHash values with it, and at least
`near_threshold` of all values.

    sketches   with `read_piece`: write each passage's MinHash, and its bands by hash
    buckets    per partition of bands: find passages that share a band, and ask their pieces for the MinHashes
    send       per piece: write the MinHashes that were asked for, of passages that are not dropped yet
    compare    per partition: write the pairs of similar passages
    decide     one task: go through the pieces in order

The last three steps are a round. Of a passage with many similar ones, only the first few pairs are listed. If all of these
are dropped, another round decides; this is rare. A task holds one partition (32 MB of source) or one piece in memory;
`decide` holds one byte per passage.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.records import Passage
from readapt_ray.sources import exchange
from readapt_ray.sources.bad_rows import NUM_NAMED
from readapt_ray.sources.duplicates import NUM_PERMUTATIONS, Sketches, bands
from readapt_ray.sources.piece_job import Lists, PieceJob, dropped_rows, write_moves

_CHUNK_ROWS = 65_536
"""Number of passages whose MinHashes are written to one file of 34 MB."""
_SMALL_BUCKET = 16
"""In buckets of at most this many passages, every pair is compared."""
_MAX_SIMILAR = 8
"""In larger buckets, at most this many earlier similar passages are listed per passage."""
_BLOCK = 256
_PAIRS_AT_ONCE = 1 << 16
_MIXER = np.uint64(0x9E3779B97F4A7C15)

_UNDECIDED, _KEPT, _DROPPED = 0, 1, 2
_BAND = np.dtype([("key", "<u8"), ("row", "<u8")])
_SENT = np.dtype([("row", "<u8"), ("undecided", "<u4"), ("size", "<u4"), ("values", "<u4", NUM_PERMUTATIONS)])
_SIMILAR_PAIR = np.dtype([("row", "<u8"), ("earlier", "<u8"), ("size", "<u4"), ("more", "<u4")])
"""A pair of similar passages. `more` is 1 if `row` may have further similar passages after `earlier` that are not listed."""


class SketchWriter:
    """Writes the MinHashes and bands of the passages of one piece."""

    def __init__(self, job: PieceJob, piece: int) -> None:
        self._job, self._piece, self._num_chunks = job, piece, 0
        self._make, index = Sketches(), bands(job.near_threshold)
        self._num_bands, self._band_values = index.b, index.r
        self._values, self._sizes = array("I"), array("I")

    def add(self, passage: Passage, size_bytes: int) -> None:
        """Add the next passage of the piece. `size_bytes` is the size of title and text. Full files are written."""
        self._values.frombytes(self._make.of(passage).hashvalues.astype("<u4").tobytes())
        self._sizes.append(size_bytes)
        if len(self._sizes) == _CHUNK_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the passages that were added since the last flush."""
        if not self._sizes:
            return
        job = self._job
        records = np.zeros(len(self._sizes), _SENT)
        first = (self._piece << exchange.ROW_BITS) + self._num_chunks * _CHUNK_ROWS
        records["row"] = np.arange(first, first + len(records), dtype=np.uint64)
        records["size"] = np.frombuffer(self._sizes, np.uint32)
        records["values"] = np.frombuffer(self._values, np.uint32).reshape(-1, NUM_PERMUTATIONS)
        found = np.zeros(len(records) * self._num_bands, _BAND)
        found["key"] = self._keys(records["values"]).ravel()
        found["row"] = np.repeat(records["row"], self._num_bands)
        with job.file("sketches", self._piece, self._num_chunks).open_output() as file:
            file.write(records.tobytes())
        to = job.file("bands", self._piece, self._num_chunks)
        exchange.write_partitions(to, found, _partition_of(found["key"], job), job.num_near_partitions)
        self._num_chunks += 1
        self._values, self._sizes = array("I"), array("I")

    def _keys(self, values: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """Return a hash per band: uint64 [N, number of bands]."""
        used = values[:, : self._num_bands * self._band_values].reshape(len(values), self._num_bands, -1)
        keys = np.tile(np.arange(1, self._num_bands + 1, dtype=np.uint64), (len(values), 1))
        for number in range(self._band_values):
            keys = (keys ^ used[:, :, number]) * _MIXER
            keys ^= keys >> np.uint64(29)
        return keys


def near_buckets(partition: int, num_rows: list[int], job: PieceJob) -> None:
    """Write the bands of a partition that several passages share, and the rows whose MinHashes each piece must send.

    Args:
        partition: number of the partition of bands.
        num_rows: number of passages per piece.
        job: settings of the ingest.
    """
    num = job.num_near_partitions
    found = exchange.read_partition(_chunk_files("bands", num_rows, job), partition, num, _BAND)
    found = found[np.lexsort((found["row"], found["key"]))]
    again = np.r_[False, found["key"][1:] == found["key"][:-1]][: len(found)]
    shared = found[again | np.r_[again[1:], False][: len(found)]]
    with job.file("buckets", partition).open_output() as file:
        file.write(shared.tobytes())
    wanted = np.zeros(len(rows := np.unique(shared["row"])), exchange.ROW)
    wanted["row"] = rows
    exchange.write_partitions(job.file("wanted", partition), wanted, exchange.pieces_of(rows), job.num_pieces)


def near_send(piece: int, num_rows: int, lists: Lists, rounds: int, job: PieceJob) -> None:
    """Write the MinHashes of a piece for the partitions that asked for them. Dropped passages are left out.

    Args:
        piece: number of the piece.
        num_rows: number of its passages.
        lists: the files that name passages dropped before the first round. Only round 0 reads them.
        rounds: number of the round, from 0.
        job: settings of the ingest.
    """
    first = np.uint64(piece << exchange.ROW_BITS)
    if rounds == 0:
        state = np.zeros(num_rows, np.uint8)
        state[(dropped_rows(piece, lists, job) - first).astype(np.int64)] = _DROPPED
        _write_state(job, piece, rounds, state)
    state = _read_state(job, piece, rounds)
    asked = job.files("wanted", range(job.num_near_partitions))
    wanted = exchange.read_parts(asked, piece, job.num_pieces, exchange.ROW)
    places = [(each["row"] - first).astype(np.int64) for each in wanted]
    places = [each[state[each] != _DROPPED] for each in places]
    for chunk, start in enumerate(range(0, num_rows, _CHUNK_ROWS)):
        records = np.frombuffer(job.file("sketches", piece, chunk).read_bytes(), _SENT).copy()
        end = start + len(records)
        records["undecided"] = state[start:end] == _UNDECIDED
        inside = [each[(each >= start) & (each < end)] - start for each in places]
        exchange.write_copies(job.file(f"sent-{rounds}", piece, chunk), records, inside)


def near_compare(partition: int, num_rows: list[int], rounds: int, job: PieceJob) -> None:
    """Write the pairs of similar passages in a partition, grouped by the piece of the later passage.

    Args:
        partition: number of the partition of bands.
        num_rows: number of passages per piece.
        rounds: number of the round, from 0.
        job: settings of the ingest.
    """
    files = _chunk_files(f"sent-{rounds}", num_rows, job)
    sent = exchange.read_partition(files, partition, job.num_near_partitions, _SENT)  # in the order of rows
    shared = np.frombuffer(job.file("buckets", partition).read_bytes(), _BAND)
    at = np.searchsorted(sent["row"], shared["row"])
    is_there = at < len(sent)
    is_there[is_there] = sent["row"][at[is_there]] == shared["row"][is_there]
    keys, places = shared["key"][is_there], at[is_there]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.empty(0, np.int64)
    sizes = np.diff(np.r_[starts, len(keys)])
    alike = [*_in_small(sent, places, starts[sizes <= _SMALL_BUCKET], sizes[sizes <= _SMALL_BUCKET], job)]
    for start, size in zip(starts[sizes > _SMALL_BUCKET], sizes[sizes > _SMALL_BUCKET], strict=True):
        alike.append(_in_large(sent, places[start : start + size], job))
    found = np.unique(np.concatenate([np.empty(0, _SIMILAR_PAIR), *alike]))
    to = job.file(f"alike-{rounds}", partition)
    exchange.write_partitions(to, found, exchange.pieces_of(found["row"]), job.num_pieces)


def _in_small(
    sent: NDArray[np.void],
    places: NDArray[np.int64],
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
    job: PieceJob,
) -> Iterator[NDArray[np.void]]:
    """Yield the similar pairs in small buckets, in which all pairs are compared."""
    for distance in range(1, _SMALL_BUCKET):
        firsts, counts = starts[sizes > distance], sizes[sizes > distance] - distance
        ends = np.cumsum(counts)
        earlier = np.arange(counts.sum()) + np.repeat(firsts - (ends - counts), counts)
        pairs = np.unique(np.stack([places[earlier + distance], places[earlier]], axis=1), axis=0)
        pairs = pairs[sent["undecided"][pairs[:, 0]] == 1]
        for begin in range(0, len(pairs), _PAIRS_AT_ONCE):
            later, before = pairs[begin : begin + _PAIRS_AT_ONCE].T
            are = _are_alike(sent["values"][later], sent["values"][before], job)
            yield _records(sent, later[are], before[are])


def _in_large(sent: NDArray[np.void], places: NDArray[np.int64], job: PieceJob) -> NDArray[np.void]:
    """Return, for each passage of a large bucket, the first few earlier passages that are similar to it."""
    values = sent["values"][places]
    later: list[int] = []
    before: list[int] = []
    more: list[int] = []
    for number in np.flatnonzero(sent["undecided"][places]).tolist():
        found: list[int] = []
        for start in range(0, number, _BLOCK):
            block = values[start : min(start + _BLOCK, number)]
            found += (start + np.flatnonzero(_are_alike(values[number], block, job))).tolist()
            if len(found) >= _MAX_SIMILAR:
                break
        found = found[:_MAX_SIMILAR]
        later += [number] * len(found)
        before += found
        more += [0] * len(found)
        if len(found) == _MAX_SIMILAR:
            more[-1] = 1
    records = _records(sent, places[later], places[before])
    records["more"] = more
    return records


def _are_alike(left: NDArray[np.uint32], right: NDArray[np.uint32], job: PieceJob) -> NDArray[np.bool_]:
    shares: NDArray[np.float64] = np.count_nonzero(left == right, axis=-1) / NUM_PERMUTATIONS
    return shares >= job.near_threshold


def _records(sent: NDArray[np.void], later: NDArray[np.int64], before: NDArray[np.int64]) -> NDArray[np.void]:
    records = np.zeros(len(later), _SIMILAR_PAIR)
    records["row"], records["earlier"] = sent["row"][later], sent["row"][before]
    records["size"] = sent["size"][later]
    return records


def near_decide(rounds: int, job: PieceJob) -> dict[str, Any]:
    """Decide in the order of the source: drop each passage that is similar to a kept one, and keep all others.

    A passage is left for the next round if it is similar to such a passage, or if all its listed similar ones are
    dropped and it may have more.

    Args:
        rounds: number of the round, from 0.
        job: settings of the ingest.

    Returns:
        `count` and `num_bytes` of the passages that this round drops; `first`: some of them, each with the kept passage;
        `pieces`: the pieces that have dropped passages; `undecided`: how many passages need another round.
    """
    files = job.files(f"alike-{rounds}", range(job.num_near_partitions))
    states: list[NDArray[np.uint8]] = []
    first: list[tuple[int, int]] = []
    total = {"count": 0, "num_bytes": 0, "undecided": 0}
    pieces = []
    for piece in range(job.num_pieces):
        states.append(_read_state(job, piece, rounds).copy())
        alike = np.unique(exchange.read_partition(files, piece, job.num_pieces, _SIMILAR_PAIR))
        moves, undecided = _decided(alike, states, piece)
        sizes = dict(zip(alike["row"].tolist(), alike["size"].tolist(), strict=True))
        total["count"] += len(moves)
        total["num_bytes"] += sum(sizes[row] for row, _ in moves)
        total["undecided"] += undecided
        first += moves[: NUM_NAMED - len(first)]
        _write_state(job, piece, rounds + 1, states[piece])
        if moves:
            pieces.append(piece)
            rows, kept = np.array(moves, np.uint64).T
            write_moves(job, job.file("drop-near", piece, rounds), rows, kept)
    return {**total, "first": first, "pieces": pieces}


def _decided(
    alike: NDArray[np.void], states: Sequence[NDArray[np.uint8]], piece: int
) -> tuple[list[tuple[int, int]], int]:
    """Decide the passages of a piece after those of earlier pieces. Returns (dropped, kept) pairs and the undecided count."""
    state = states[piece]
    waits = state == _UNDECIDED
    state[waits] = _KEPT
    place_mask = (1 << exchange.ROW_BITS) - 1
    moves: list[tuple[int, int]] = []
    num_undecided = 0
    settled = -1
    for row, earlier, _, more in alike.tolist():
        if row == settled:
            continue
        at = states[earlier >> exchange.ROW_BITS][earlier & place_mask]
        if at == _KEPT:
            moves.append((row, earlier))
            state[row & place_mask], settled = _DROPPED, row
        elif at == _UNDECIDED or more:
            num_undecided += 1
            state[row & place_mask], settled = _UNDECIDED, row
    return moves, num_undecided


def _partition_of(keys: NDArray[np.uint64], job: PieceJob) -> NDArray[np.int64]:
    return ((keys >> np.uint64(32)) % np.uint64(job.num_near_partitions)).astype(np.int64)


def _chunk_files(what: str, num_rows: Sequence[int], job: PieceJob) -> list[Any]:
    """Return the files of all pieces: one per `_CHUNK_ROWS` passages of each piece."""
    return job.chunk_files(what, [-(-rows // _CHUNK_ROWS) for rows in num_rows])


def _write_state(job: PieceJob, piece: int, rounds: int, state: NDArray[np.uint8]) -> None:
    job.file(f"state-{rounds}", piece).write_bytes(state.tobytes())


def _read_state(job: PieceJob, piece: int, rounds: int) -> NDArray[np.uint8]:
    return np.frombuffer(job.file(f"state-{rounds}", piece).read_bytes(), np.uint8)
