"""A slice whose passages move from old vectors behind a bridge to new ones; without Ray."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.errors import InputError
from readapt_ray.retrieval.bm25 import WordCounts, WordIndex, words
from readapt_ray.retrieval.calibration import Calibration
from readapt_ray.retrieval.exact import search_exact
from readapt_ray.retrieval.index_files import write_shard
from readapt_ray.retrieval.index_kinds import IndexOptions, index_spec
from readapt_ray.retrieval.index_shard import DELETED, IndexShard, build_shard
from readapt_ray.retrieval.kept_columns import Condition
from readapt_ray.retrieval.query_maps import QueryMap
from readapt_ray.serving import index_slice, moving_slice
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.index_slice import IndexSlice
from readapt_ray.serving.moving_slice import MovingSlice
from readapt_ray.storage import Location

OLD_SIZE, NEW_SIZE = 16, 12
KINDS = ["flat", "ivf-flat", "hnsw", "ivf-pq", "rabitq"]


def _unit(made):
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


class World:
    """Vectors of both models: the new ones are a noisy map of the old ones, and lie around a few centres."""

    def __init__(self, size, *, num_deleted=0, seed=0):
        random = np.random.default_rng(seed)
        centres = random.normal(size=(20, OLD_SIZE))
        self.ids = np.array(
            [f"{name}/{row:05d}" for row, name in enumerate(random.choice(["news", "wiki"], size))], object
        )
        self.old = _unit(centres[random.integers(0, 20, size)] + 0.7 * random.normal(size=(size, OLD_SIZE)))
        across = random.normal(size=(OLD_SIZE, NEW_SIZE)) / 4
        self.new = _unit(self.old @ across + 0.1 * random.normal(size=(size, NEW_SIZE)))
        self.queries = _unit(random.normal(size=(6, NEW_SIZE)))
        sample = random.permutation(size)[:200]
        self.bridge = SimpleNamespace(
            query_map=QueryMap("affine", np.ascontiguousarray(across.T, np.float32)),
            calibration=Calibration(self.old[sample], self.new[sample]),
            new_encoder={"dimension": NEW_SIZE},
        )
        self.deleted = np.sort(random.permutation(size)[:num_deleted])
        self.order = random.permutation(size)

    def shards(self, factory="Flat", num_shards=2, *, with_words=False, hashes=b""):
        for rows in np.array_split(self.order, num_shards):
            shard = build_shard(factory, OLD_SIZE, [(self.ids[rows].tolist(), self.old[rows])])
            shard.doc_ids[np.isin(rows, self.deleted)] = DELETED
            texts = [words(self.text(row)) for row in rows]
            counts = WordCounts()
            counts.add(words(self.text(row)) for row in range(len(self.ids)))
            kept = (WordIndex.build(texts, counts),) if with_words else ()
            yield IndexShard(shard.index, shard.doc_ids, hashes, shard.trained, kept)

    def text(self, row):
        return f"word{row % 7} only{row}"

    def slice(self, *given, **options):
        return MovingSlice(IndexSlice.of(list(self.shards(*given, **options))), self.bridge)

    def take(self, moving, rows, hashes=b""):
        """Move passages as a file with them would."""
        rows = np.asarray(rows)
        located, num_changed = moving.locate(pa.array(self.ids[rows], pa.string()), hashes)
        moving.move(moving.prepare(located, self.new[rows]))
        return num_changed

    def expected(self, moved, top_k, keep=lambda _: True):
        """The k best by scores that numpy computes: real ones of what has moved, and scaled bridged ones of the rest."""
        queries, mapped = self.queries, self.queries @ self.bridge.query_map.matrix
        mapped /= np.linalg.norm(mapped, axis=1, keepdims=True)
        real, bridged = (
            asked @ there.T
            for asked, there in ((queries, self.bridge.calibration.new), (mapped, self.bridge.calibration.old))
        )
        scores = (mapped @ self.old.T - bridged.mean(1, keepdims=True)) * (real.std(1) / bridged.std(1))[:, None]
        scores += real.mean(1, keepdims=True)
        scores[:, moved] = queries @ self.new[moved].T
        there = [row for row in range(len(self.ids)) if row not in set(self.deleted.tolist()) and keep(self.ids[row])]
        best = [sorted(there, key=lambda row: (-each[row], self.ids[row]))[:top_k] for each in scores]
        return self.ids[best].tolist(), np.take_along_axis(scores, np.array(best), axis=1)


def _check(found, expected, atol=1e-4):
    assert found.doc_ids.tolist() == expected[0]
    np.testing.assert_allclose(found.scores, expected[1], atol=atol)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16"])
def test_every_state_answers_by_the_mixed_scores(factory, monkeypatch):
    monkeypatch.setattr(moving_slice, "_BLOCK_BYTES", 4 * NEW_SIZE * 100)  # several blocks
    world = World(900, num_deleted=40)
    moving = world.slice(factory)
    moved = np.zeros(0, np.int64)
    for part in np.array_split(np.random.default_rng(1).permutation(900), 9):
        if factory == "Flat" or len(moved) > 450:  # a scan; above, what FAISS finds is not exact
            _check(moving.search(world.queries, 7), world.expected(moved, 7))
        exact = moving.search(world.queries, 7, DocFilter(is_exact=True))
        _check(exact, world.expected(moved, 7))
        assert (moving.num_vectors, moving.num_reembedded) == (860, len(np.setdiff1d(moved, world.deleted)))
        world.take(moving, part)
        moved = np.append(moved, part)
    _check(moving.search(world.queries, 7), world.expected(moved, 7))
    there = np.setdiff1d(np.arange(900), world.deleted)
    oracle = search_exact(world.queries, [(world.ids[there].tolist(), world.new[there])], 7)
    assert moving.search(world.queries, 7).doc_ids.tolist() == oracle.doc_ids.tolist()
    assert moving.num_reembedded == moving.num_vectors == 860


def test_a_shard_whose_passages_have_all_moved_is_let_go():
    world = World(300)
    moving = world.slice(with_words=True)
    first, second = np.array_split(world.order, 2)
    world.take(moving, first)
    base = moving._base
    assert [each.shard.index is None for each in base.shards] == [True, False]
    assert [each.old.shard.index is None for each in moving._shards] == [True, False]
    world.take(moving, second[:-1])
    _check(moving.search(world.queries, 5), world.expected(np.append(first, second[:-1]), 5))
    world.take(moving, second)
    assert all(each.shard.index is None for each in base.shards)
    *_, found = moving.search_words([f"only{first[0]} only{second[0]}"], 5)
    assert set(found.doc_ids[0, :2].tolist()) == {world.ids[first[0]], world.ids[second[0]]}


@pytest.mark.parametrize(
    ("wanted", "keep"),
    [
        (DocFilter(prefix="news/"), lambda doc_id: doc_id.startswith("news/")),
        (DocFilter(prefix="none"), lambda _: False),
        (
            DocFilter(doc_ids=("news/00001", "wiki/00002", "wiki/00001", "news/00002")),
            lambda doc_id: doc_id[5:] in ("00001", "00002"),
        ),
        (DocFilter(prefix="", within=DocFilter(prefix="wiki")), lambda doc_id: doc_id.startswith("wiki")),
        (DocFilter(is_exact=True), lambda _: True),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_filters_hold_among_old_and_new_vectors(wanted, keep, kind):
    world = World(1200, num_deleted=30)
    factory = index_spec(IndexOptions(kind=kind), 1200, OLD_SIZE).factory
    moving = MovingSlice(IndexSlice.of(list(world.shards(factory, 1))), world.bridge)
    moved = np.random.default_rng(2).permutation(1200)[:600]
    world.take(moving, moved)
    num_due = min(4, sum(keep(each) for row, each in enumerate(world.ids) if row not in world.deleted))
    found = moving.search(world.queries, 4, wanted)
    if num_due:
        _check(found, world.expected(moved, num_due, keep))
    else:
        assert found.scores.shape[1] == 0 or (found.scores == -np.inf).all()
    *pauses, scanned = moving.scan(world.queries, 4, wanted)
    assert scanned.doc_ids.tolist() == found.doc_ids.tolist() and set(pauses) <= {None}


def test_columns_are_filtered_by_whichever_vectors_their_passages_have(tmp_path):
    world = World(100)
    years = pa.array([2000 + row % 3 for row in range(100)])
    columns = {"doc_id": pa.array(world.ids, pa.string()), "title": pa.nulls(100, pa.string()), "year": years}
    pq.write_table(pa.table(columns | {"text": pa.nulls(100, pa.string())}), tmp_path / "a.parquet")
    base = IndexSlice.of(list(world.shards()), [Location(str(tmp_path / "a.parquet"))])
    moving = MovingSlice(base, world.bridge)
    moved = world.order[:60]
    world.take(moving, moved)
    found = moving.search(world.queries, 8, DocFilter(conditions=(Condition("year", one_of=(2001,)),)))
    _check(found, world.expected(moved, 8, lambda doc_id: int(doc_id[5:]) % 3 == 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_shard_that_has_lost_passages_finds_as_many_of_the_best(kind, share, monkeypatch, tmp_path):
    """Among 4,000 vectors: FAISS searches those that are left, and few are compared one by one."""
    monkeypatch.setattr(moving_slice, "_FEW_ROWS", 100)
    world = World(4000)
    spec = index_spec(IndexOptions(kind=kind), 4000, OLD_SIZE)
    folder = Location(str(tmp_path))
    (shard,) = world.shards(spec.factory, 1)
    record = write_shard(folder, "00000", shard, encoder="e")
    moving = MovingSlice(IndexSlice(folder, [record]), world.bridge)

    def recall(moved):
        found = moving.search(world.queries, 10).doc_ids.tolist()
        due = world.expected(moved, 10)[0]
        return np.mean([len({*mine} & {*its}) / 10 for mine, its in zip(found, due, strict=True)])

    before = recall([])
    moved = np.random.default_rng(3).permutation(4000)[: int(share * 4000)]
    world.take(moving, moved)
    assert recall(moved) >= before - 0.05


def test_a_search_under_way_goes_on_with_what_there_was(monkeypatch):
    """Passages that move between two of its steps are found once."""
    monkeypatch.setattr(index_slice, "_BLOCK_ROWS", 50)
    world = World(400)
    moving = world.slice()
    moved = world.order[::2]
    world.take(moving, moved)
    expected = world.expected(moved, 400)
    steps = moving.scan(world.queries, 400, DocFilter(prefix=""))
    found = [next(steps), next(steps)]
    world.take(moving, np.arange(400))
    *_, hits = [*found, *steps]
    _check(hits, expected)
    _check(moving.search(world.queries, 400), world.expected(np.arange(400), 400))


def test_words_and_hybrid_ranks_are_those_of_the_old_index():
    world = World(200)
    before, moving = IndexSlice.of(list(world.shards(with_words=True))), world.slice(with_words=True)
    for rows in (world.order[:77], world.order):
        world.take(moving, rows)
        for wanted in (None, DocFilter(prefix="news/")):
            *_, mine = moving.search_words(["word3", "only17"], 9, wanted)
            *_, its = before.search_words(["word3", "only17"], 9, wanted)
            assert mine.doc_ids.tolist() == its.doc_ids.tolist()


def test_what_is_not_in_the_slice_or_twice_in_a_file_or_has_moved_is_left_out():
    world = World(100)
    moving = world.slice()
    located, _ = moving.locate(pa.array(["a", None, "zzz"], pa.string()), b"")
    assert located == []
    assert moving.locate(pa.array([], pa.string()), b"") == ([], 0)
    world.take(moving, [5, 9, 5, 7])
    assert moving.num_reembedded == 3
    world.take(moving, [9, 8])
    assert moving.num_reembedded == 4
    _check(moving.search(world.queries, 6), world.expected(np.array([5, 7, 8, 9]), 6))


def test_a_passage_whose_content_changed_keeps_its_old_vector():
    world = World(4)
    rows = world.order
    mine = b"".join(bytes([row + 1]) * 16 for row in rows)
    (shard,) = world.shards("Flat", 1, hashes=mine)
    moving = MovingSlice(IndexSlice.of([shard]), world.bridge)
    file = bytes([1]) * 16 + bytes([99]) * 16 + bytes(16) + bytes([4]) * 16  # 1 has changed, 2 is not known
    assert world.take(moving, [0, 1, 2, 3], file) == 1
    assert moving.num_reembedded == 3
    _check(moving.search(world.queries, 4), world.expected(np.array([0, 2, 3]), 4))


def test_bad_queries_are_refused():
    world = World(100)
    moving = world.slice()
    with pytest.raises(InputError, match="cannot be searched among vectors of 12 numbers"):
        moving.search(np.ones((1, OLD_SIZE), np.float32), 3)
    with pytest.raises(InputError, match="no corpus beside the index"):
        moving.search(world.queries, 3, DocFilter(conditions=(Condition("lang", one_of=("en",)),)))


def test_an_empty_slice_finds_nothing():
    world = World(10)
    moving = MovingSlice(IndexSlice.of([]), world.bridge)
    assert moving.search(world.queries, 3).doc_ids.shape == (6, 0)
    assert (moving.num_vectors, moving.num_reembedded) == (0, 0)


def test_vectors_in_16_bits_rank_as_numpy_ranks_them_rounded():
    world = World(300)
    moving = MovingSlice(IndexSlice.of(list(world.shards("SQfp16"))), world.bridge, "SQfp16")
    world.take(moving, np.arange(300))
    rounded = world.new.astype(np.float16).astype(np.float32)
    oracle = search_exact(world.queries, [(world.ids.tolist(), rounded)], 5)
    assert moving.search(world.queries, 5).doc_ids.tolist() == oracle.doc_ids.tolist()
