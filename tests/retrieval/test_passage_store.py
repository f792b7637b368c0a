import datetime
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.errors import ArtifactMissingError, CorruptFileError, FingerprintMismatchError
from readapt_ray.records import Passage
from readapt_ray.retrieval.passage_store import PassageStore
from readapt_ray.storage import Location
from tests.factories import ingest_artifact, small_corpus


def test_every_passage_is_found_and_nothing_else(tmp_path):
    passages = [*small_corpus(100), Passage("文書", "標題", "本文"), Passage("", "", "an empty id")]
    ingest_artifact(tmp_path / "corpus", passages, num_files=3)
    store = PassageStore.open(str(tmp_path / "corpus"))
    assert len(store) == 102
    assert store.find([each.doc_id for each in passages]) == {each.doc_id: each for each in passages}
    assert store.find(["d0000", "d000000", "zzz", "D00001"]) == {}
    assert store.find([]) == {}


def test_many_row_groups_and_more_than_are_kept(tmp_path):
    passages = small_corpus(300)
    table = pa.Table.from_pylist([each._asdict() for each in passages])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    store = PassageStore([Location(str(tmp_path / "a.parquet"))])
    for _ in range(2):
        assert list(store.find(each.doc_id for each in passages).values()) == passages


def test_columns_that_were_kept_come_with_the_passages(tmp_path):
    day = datetime.date(2020, 1, 2)
    columns = {"doc_id": ["a", "b"], "title": ["", "t"], "text": ["x", ""], "year": [2020, None], "day": [day, day]}
    pq.write_table(pa.table(columns | {"nested": [{"k": 1}, None]}), tmp_path / "a.parquet")
    store = PassageStore([Location(str(tmp_path / "a.parquet"))])
    assert store.columns == {"year": "int64", "day": "date32[day]"}
    assert store.find(["b", "a"]) == {
        "b": Passage("b", "t", "", {"year": None, "day": day}),
        "a": Passage("a", "", "x", {"year": 2020, "day": day}),
    }


def test_a_corpus_without_passages_and_no_corpus(tmp_path):
    ingest_artifact(tmp_path / "corpus", [])
    assert PassageStore.open(str(tmp_path / "corpus")).find(["d00000"]) == {}
    with pytest.raises(ArtifactMissingError):
        PassageStore.open(str(tmp_path / "none"))


def test_another_corpus_at_the_same_place_is_refused(tmp_path):
    made = ingest_artifact(tmp_path / "corpus", small_corpus(10))
    assert len(PassageStore.open(made.uri, made.fingerprint)) == 10
    shutil.rmtree(tmp_path / "corpus")
    again = ingest_artifact(tmp_path / "corpus", small_corpus(11))
    with pytest.raises(FingerprintMismatchError, match=rf"{again.fingerprint}, and {made.fingerprint} is meant"):
        PassageStore.open(made.uri, made.fingerprint)


def test_no_passage_gets_the_text_of_another_when_its_corpus_is_made_again(tmp_path):
    passages = small_corpus(12)
    ingest_artifact(tmp_path / "corpus", passages[:10])
    store = PassageStore.open(str(tmp_path / "corpus"))
    shutil.rmtree(tmp_path / "corpus")
    # The rows move, the third stays where it was, and there are fewer.
    ingest_artifact(tmp_path / "corpus", [passages[11], passages[0], passages[2], passages[9]])
    assert store.find(each.doc_id for each in passages) == {passages[2].doc_id: passages[2]}


def test_a_file_cut_short_or_without_a_column_is_named(tmp_path):
    whole = tmp_path / "a.parquet"
    pq.write_table(pa.table({"doc_id": ["a"], "title": ["b"], "text": ["c"]}), whole)
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(CorruptFileError, match=r"cut\.parquet is not a whole Parquet file"):
        PassageStore([Location(str(tmp_path / "cut.parquet"))])
    pq.write_table(pa.table({"doc_id": ["a"], "title": ["b"]}), whole)
    with pytest.raises(CorruptFileError, match=r"a\.parquet lacks the columns \['text'\]"):
        PassageStore([Location(str(whole))])
