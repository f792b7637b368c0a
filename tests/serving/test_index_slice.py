import hashlib
from pathlib import Path

import faiss
import numpy as np
import pytest

from readapt_ray.errors import CorruptFileError
from readapt_ray.retrieval.exact import search_exact
from readapt_ray.retrieval.index_files import carry_over, write_shard
from readapt_ray.retrieval.index_kinds import IndexOptions, index_spec
from readapt_ray.retrieval.index_recall import calibrate
from readapt_ray.retrieval.index_shard import DELETED, IndexShard, build_shard
from readapt_ray.retrieval.vector_index import VectorIndex
from readapt_ray.serving import index_slice
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.index_slice import IndexSlice, gives_exact_vectors, is_mapped
from readapt_ray.serving.versions import Ranked, merge_ranked
from readapt_ray.storage import Location

IDS = [
    *(f"news/{number:03d}" for number in range(60)),
    *(f"wiki/{number:03d}" for number in range(50)),
    "wiki\U0010ffffz",
]


@pytest.fixture(scope="module")
def vectors():
    made = np.random.default_rng(3).normal(size=(len(IDS), 8)).astype(np.float32)
    made[5] = made[77]  # a tie
    return made


@pytest.fixture(scope="module")
def sliced(tmp_path_factory, vectors):
    folder = Location(str(tmp_path_factory.mktemp("slice")))
    order = np.random.default_rng(4).permutation(len(IDS))
    records = []
    for number, part in enumerate(np.array_split(order, 3)):
        shard = build_shard("Flat", 8, [([IDS[row] for row in part], vectors[part])])
        records.append(write_shard(folder, f"{number:05d}", shard, encoder="e"))
    return IndexSlice(folder, records)


@pytest.mark.parametrize(
    ("wanted", "keep"),
    [
        (None, lambda _: True),
        (DocFilter(prefix="news/"), lambda doc_id: doc_id.startswith("news/")),
        (DocFilter(prefix="wiki"), lambda doc_id: doc_id.startswith("wiki")),
        (DocFilter(prefix=""), lambda _: True),
        (DocFilter(prefix="none"), lambda _: False),
        (DocFilter(doc_ids=("wiki/007", "news/005", "absent", "zzz")), {"wiki/007", "news/005"}.__contains__),
    ],
)
def test_a_filtered_search_is_exact_among_what_passes(sliced, vectors, wanted, keep):
    queries = vectors[[77, 3]]
    rows = [row for row, doc_id in enumerate(IDS) if keep(doc_id)]
    oracle = search_exact(queries, [([IDS[row] for row in rows], vectors[rows])], 7)
    found = sliced.search(queries, 7, wanted)
    for query in range(2):
        mine, its = found.of_query(query, ""), oracle.of_query(query, "")
        assert [doc.doc_id for doc in mine] == [doc.doc_id for doc in its]
        np.testing.assert_allclose([doc.score for doc in mine], [doc.score for doc in its], rtol=1e-5)


@pytest.mark.parametrize(
    ("doc_ids", "there"),
    [
        (("a",), ["a#1", "a#10", "a#2"]),
        (("a", "b", "absent"), ["a#1", "a#10", "a#2", "b"]),
        (("a#2",), ["a#2"]),
        (("a#1",), ["a#1", "a#1#1"]),
        (("a#", "#", ""), []),
    ],
)
def test_a_document_that_was_split_stands_for_its_passages(tmp_path, vectors, doc_ids, there):
    """A hit has the id of its document, by which the next search can be restricted."""
    folder = Location(str(tmp_path))
    ids = ["b", "a#2", "a#1#1", "ab#1", "a", "a#x", "a#1", "a#10", "a!", "a$"]
    made = build_shard("Flat", 8, [(ids, vectors[: len(ids)])])
    records = [write_shard(folder, "00000", made, encoder="e")]
    for is_split, due in ((True, there), (False, sorted(set(doc_ids) & set(ids)))):
        found = IndexSlice(folder, records, is_split=is_split).search(vectors[:1], 10, DocFilter(doc_ids=doc_ids))
        assert sorted({each.doc_id for each in found.of_query(0, "")} - {"a"}) == sorted(set(due) - {"a"})


def test_a_slice_knows_its_size(sliced):
    assert sliced.num_vectors == len(IDS)


def test_parts_merge_to_what_one_index_finds(world):
    index = VectorIndex.open(world.version()["index"])
    queries = world.encoder.encode(["array shape", "lock a thread"], "query")
    parts = []
    for record in index.records:
        hits = IndexSlice(index.folder, [record]).search(queries, 9)
        parts.append([[Ranked(doc.doc_id, doc.score) for doc in hits.of_query(query, "")] for query in range(2)])
    whole = index.search(queries, 9)
    for query, ranked in enumerate(merge_ranked(parts, 2, 9)):
        assert [(hit.doc_id, hit.score) for hit in ranked] == [
            (doc.doc_id, doc.score) for doc in whole.of_query(query, "")
        ]


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_slice_on_a_device_finds_what_one_on_a_cpu_finds(tmp_path, monkeypatch, storage, is_deleted):
    """Several shards, filters that leave few, many and all passages, and words; on the device no row is read back."""
    random = np.random.default_rng(6)
    ids = np.array([f"{number:05d}" for number in random.permutation(900)], object)
    vectors = random.normal(size=(900, 16)).astype(np.float32)
    factory = index_spec(IndexOptions(kind="flat", storage=storage), 900, 16).factory
    folder, records = Location(str(tmp_path)), []
    for number, part in enumerate(np.array_split(np.arange(900), 4)):
        shard = build_shard(factory, 16, [(ids[part].tolist(), vectors[part])])
        shard.doc_ids[:: 5 if is_deleted else 1000] = DELETED
        records.append(write_shard(folder, f"{number:05d}", shard, encoder="e"))
    on_cpu, on_device = IndexSlice(folder, records), IndexSlice(folder, records, device="cpu")
    assert on_device.num_vectors == on_cpu.num_vectors < 900
    queries = random.normal(size=(5, 16)).astype(np.float32)
    filters = [
        None,
        DocFilter(prefix=""),
        DocFilter(prefix="007"),
        DocFilter(doc_ids=tuple(ids[::7])),
        DocFilter(prefix="x"),
    ]
    wanted = [on_cpu.search(queries, 9, each) for each in filters]
    monkeypatch.setattr(index_slice, "_vectors", None)
    for each, due in zip(filters, wanted, strict=True):
        found = on_device.search(queries, 9, each)
        assert [[doc.doc_id for doc in found.of_query(q, "")] for q in range(5)] == [
            [doc.doc_id for doc in due.of_query(q, "")] for q in range(5)
        ]
        for query in range(5):
            np.testing.assert_allclose(
                [doc.score for doc in found.of_query(query, "")],
                [doc.score for doc in due.of_query(query, "")],
                rtol=1e-5,
                atol=1e-6,
            )


def test_a_slice_without_vectors_on_a_device_finds_nothing():
    empty = IndexSlice(Location("/nowhere"), [], device="cpu")
    assert empty.num_vectors == 0


def test_ties_between_parts_go_by_doc_id():
    parts = [[[Ranked("b", 1.0), Ranked("d", 0.5)]], [[Ranked("a", 1.0), Ranked("c", 0.5)]]]
    assert merge_ranked(parts, 1, 3) == [[Ranked("a", 1.0), Ranked("b", 1.0), Ranked("c", 0.5)]]


@pytest.mark.parametrize("kind", ["flat", "ivf-flat", "hnsw", "ivf-pq", "rabitq"])
def test_every_kind_is_filtered_and_what_is_deleted_is_not_found(tmp_path, kind):
    ids = [f"{number:05d}" for number in range(1200)]
    vectors = np.random.default_rng(5).normal(size=(len(ids), 16)).astype(np.float32)
    shard = build_shard(index_spec(IndexOptions(kind=kind), len(ids), 16).factory, 16, [(ids, vectors)])
    shard.doc_ids[[3, 700]] = DELETED
    folder = Location(str(tmp_path))
    searchable = IndexSlice(folder, [write_shard(folder, "00000", shard, encoder="e")])
    assert searchable.num_vectors == 1198
    queries = vectors[[3, 700, 9]]
    for wanted, there in (
        (DocFilter(prefix=""), [row for row in range(1200) if row not in (3, 700)]),
        (DocFilter(prefix="007"), list(range(701, 800))),
        (DocFilter(doc_ids=("00003", "00009", "")), [9]),
    ):
        oracle = search_exact(queries, [([ids[row] for row in there], vectors[there])], 5)
        found = searchable.search(queries, 5, wanted)
        for query in range(3):
            mine, its = found.of_query(query, ""), oracle.of_query(query, "")
            assert [doc.doc_id for doc in mine] == [doc.doc_id for doc in its]


def test_a_scan_pauses_between_its_blocks_and_finds_the_same(sliced, vectors, monkeypatch):
    wanted = DocFilter(prefix="")
    whole = sliced.search(vectors[:4], 9, wanted)
    monkeypatch.setattr(index_slice, "_BLOCK_ROWS", 10)
    *pauses, found = sliced.scan(vectors[:4], 9, wanted)
    assert pauses == [None] * (3 * 4 - 1)  # three shards of 37 vectors
    assert found.doc_ids.tolist() == whole.doc_ids.tolist()
    assert len(list(sliced.scan(vectors[:4], 9, DocFilter(prefix="none")))) == 1


@pytest.mark.parametrize(
    ("factory", "is_whole"),
    [
        ("Flat", True),
        ("IVF8,Flat", True),
        ("IVF8_HNSW8,Flat", True),
        ("HNSW8,Flat", True),
        ("HNSW8", True),
        ("IVF8,PQ4x4,Refine(Flat)", True),
        ("PCA8,IVF8,RaBitQ,RFlat", True),
        ("SQ8", False),
        ("HNSW8,SQfp16", False),
        ("HNSW8_SQ8", False),
        ("IVF8,PQ4x4", False),
        ("IVF8,RaBitQ", False),
        ("IVF8,PQ4x4,Refine(SQ8)", False),
        ("PCA8,Flat", False),
    ],
)
def test_which_index_gives_its_vectors_back_as_they_were(factory, is_whole):
    vectors = np.random.default_rng(6).normal(size=(500, 16)).astype(np.float32)
    shard = build_shard(factory, 16, [([str(row) for row in range(500)], vectors)])
    given_back = index_slice._vectors(index_slice.SearchableShard(shard).shard.index, np.arange(500))
    assert np.array_equal(given_back, vectors) == is_whole
    assert gives_exact_vectors(factory) == is_whole


@pytest.fixture(scope="module")
def clusters():
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(200, 32))
    made = centres[rng.integers(0, 200, 20_000)] + 0.7 * rng.normal(size=(20_000, 32))
    queries = centres[:50] + 0.7 * rng.normal(size=(50, 32))
    return [(each / np.linalg.norm(each, axis=1, keepdims=True)).astype(np.float32) for each in (made, queries)]


@pytest.mark.parametrize("kind", ["flat", "ivf-flat", "hnsw", "rabitq"])
def test_a_filter_costs_an_approximate_index_no_recall(tmp_path, monkeypatch, clusters, kind):
    """Whatever it leaves of the passages: of few of them all are compared."""
    monkeypatch.setattr(index_slice, "_SCANNED_ROWS", 500)
    vectors, queries = clusters
    ids = [f"{number % 1000:03d}/{number}" for number in range(len(vectors))]
    options = IndexOptions(kind=kind)
    spec = index_spec(options, len(ids), 32)
    shard = build_shard(spec.factory, 32, [(ids, vectors)])
    calibrate(shard.index, vectors, spec, options)
    folder = Location(str(tmp_path))
    searchable = IndexSlice(folder, [write_shard(folder, "00000", shard, encoder="e")])
    for prefix, share in (("", 1), ("0", 0.1), ("00", 0.01)):
        passing = np.array([each.startswith(prefix) for each in ids])
        assert passing.mean() == share
        scores = np.where(passing, queries @ vectors.T, -np.inf)
        exact = np.argsort(-scores, axis=1)[:, :10]
        hits = searchable.search(queries, 10, DocFilter(prefix=prefix))
        found = [set(row) for row in hits.doc_ids.tolist()]
        assert all(len(each) == 10 and all(doc_id.startswith(prefix) for doc_id in each) for each in found)
        due = [{ids[row] for row in rows} for rows in exact]
        recall = np.mean([len(mine & its) / 10 for mine, its in zip(found, due, strict=True)])
        assert recall >= (1.0 if kind == "flat" or share == 0.01 else 0.93), (prefix, recall)


def test_what_faiss_misses_among_the_passages_that_pass_is_searched_exactly(tmp_path, monkeypatch, clusters):
    monkeypatch.setattr(index_slice, "_SCANNED_ROWS", 0)
    vectors, queries = clusters
    ids = [str(number) for number in range(2000)]
    shard = build_shard("IVF50,Flat", 32, [(ids, vectors[:2000])])
    folder = Location(str(tmp_path))
    searchable = IndexSlice(folder, [write_shard(folder, "00000", shard, encoder="e")])
    wanted = DocFilter(doc_ids=tuple(ids[:1500]))
    exact = np.argsort(-(queries @ vectors[:1500].T), axis=1)[:, :1000]
    found = searchable.search(queries, 1000, wanted)
    assert found.doc_ids.tolist() == [[ids[row] for row in rows] for rows in exact]


@pytest.fixture
def checked(monkeypatch, tmp_path):
    """The bytes of index files whose checksum was computed, on a node whose cache is empty."""
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    seen = []

    def digest(stream, name):
        seen.append(len(stream.read()))
        stream.seek(0)
        return compute(stream, name)

    compute = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", digest)
    return seen


def test_of_the_next_version_only_the_shard_that_is_new_is_read(tmp_path, checked):
    """Ten shards, of which nine are carried over: files stay where they are, and only the new one is summed."""
    first, second = Location(str(tmp_path / "first")), Location(str(tmp_path / "second"))
    made = np.random.default_rng(8).normal(size=(11, 50, 16)).astype(np.float32)

    def write(folder, number):
        ids = [f"{number}-{row}" for row in range(50)]
        return write_shard(folder, f"{number:05d}", build_shard("Flat", 16, [(ids, made[number])]), encoder="e")

    records = [write(first, number) for number in range(10)]
    assert IndexSlice(first, records).num_vectors == 500
    kept = np.ones(50, bool)
    kept[3] = False
    carried = [carry_over(first, record, kept, second, encoder="e") for record in records[1:]]
    before = len(checked)
    searchable = IndexSlice(second, [*carried, write(second, 10)])
    size = (tmp_path / "second/00010.faiss").stat().st_size
    assert checked[before:] == [size] and sum(checked) == 11 * size
    assert searchable.num_vectors == 9 * 49 + 50
    assert str(tmp_path / "second/00010.faiss") in Path("/proc/self/maps").read_text()
    rows = made[1:].reshape(-1, 16)
    ids = [f"{number}-{row}" for number in range(1, 11) for row in range(50)]
    alive = [place for place, each in enumerate(ids) if not each.endswith("-3") or each == "10-3"]
    oracle = search_exact(made[10, :3], [([ids[place] for place in alive], rows[alive])], 7)
    assert searchable.search(made[10, :3], 7).doc_ids.tolist() == oracle.doc_ids.tolist()


@pytest.mark.parametrize("damage", ["altered", "cut short", "gone"])
def test_a_damaged_shard_is_refused_also_after_it_was_whole(tmp_path, checked, damage):
    folder = Location(str(tmp_path / "shards"))
    vectors = np.random.default_rng(9).normal(size=(50, 16)).astype(np.float32)
    record = write_shard(
        folder, "00000", build_shard("Flat", 16, [([str(row) for row in range(50)], vectors)]), encoder="e"
    )
    IndexSlice(folder, [record])
    file = tmp_path / "shards/00000.faiss"
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(bytes([*content[:-1], content[-1] ^ 1]) if damage == "altered" else content[:-100])
    with pytest.raises(CorruptFileError, match="is gone" if damage == "gone" else "was cut short or altered"):
        IndexSlice(folder, [record])


def test_without_a_cache_that_can_be_written_the_checksum_is_computed_each_time(tmp_path, checked, monkeypatch, caplog):
    folder = Location(str(tmp_path / "shards"))
    vectors = np.ones((5, 16), np.float32)
    record = write_shard(folder, "00000", build_shard("Flat", 16, [(list("abcde"), vectors)]), encoder="e")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/whole-files").write_text("no folder")
    for number in (1, 2):
        assert IndexSlice(folder, [record]).num_vectors == 5
        assert len(checked) == number
    assert "is computed again by each process" in caplog.text


def test_shards_that_were_trained_together_are_merged_in_memory(tmp_path):
    folder = Location(str(tmp_path))
    vectors = np.random.default_rng(10).normal(size=(600, 16)).astype(np.float32)
    whole = build_shard("IVF4,Flat", 16, [([str(row) for row in range(600)], vectors)])
    records = []
    for number in range(2):
        part = faiss.clone_index(whole.index)
        part.reset()
        rows = range(300 * number, 300 * (number + 1))
        part.add(vectors[rows])
        shard = IndexShard(part, np.array([str(row) for row in rows], object), trained="t")
        records.append(write_shard(folder, f"{number:05d}", shard, encoder="e"))
    assert not any(is_mapped(each, records) for each in records)
    assert is_mapped(records[0], records[:1])
    found = IndexSlice(folder, records).search(vectors[:5], 3, DocFilter(prefix=""))
    assert (
        found.doc_ids.tolist()
        == search_exact(vectors[:5], [([str(row) for row in range(600)], vectors)], 3).doc_ids.tolist()
    )
