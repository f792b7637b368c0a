import gzip
from unittest.mock import Mock

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from readapt_ray.errors import CorpusError, InputError, ReadaptError
from readapt_ray.records import Qrel, Query
from readapt_ray.sources.opening import open_source
from readapt_ray.sources.read_options import ReadOptions

PASSAGES = '{"_id": "a", "title": "t", "text": "x"}\n{"_id": "b", "text": "y"}\n'
QUERIES = '{"_id": "q", "text": "ask"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq\ta\t1\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose data sets are folders here; what it gives lies as in its cache, as links to blobs."""
    served = tmp_path / "hub"

    def snapshot_download(repo_id, *, repo_type, allow_patterns):
        assert repo_type == "dataset"
        if not (served / repo_id).is_dir():
            raise RepositoryNotFoundError(f"404 for {repo_id}\nmore", response=Mock(headers={}))
        snapshot = tmp_path / "cache" / repo_id
        for file in (path for path in (served / repo_id).rglob("*") if path.is_file()):
            if any(file.match(pattern) for pattern in allow_patterns):
                link = snapshot / file.relative_to(served / repo_id)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(file)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    def put(name, content):
        (served / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            pq.write_table(pa.table(content), served / name)
        else:
            (served / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return put


def read(name):
    source = open_source(name, "auto", ReadOptions())
    source.check()
    passages = [(row.doc_id, row.title or "", row.text) for row in source.rows()]
    return passages, list(source.queries()), {split: list(qrels) for split, qrels in source.qrels().items()}


def put_beir(hub):
    hub("BeIR/scifact/corpus.jsonl.gz", gzip.compress(PASSAGES.encode(), mtime=0))
    hub("BeIR/scifact/queries.jsonl.gz", gzip.compress(QUERIES.encode(), mtime=0))
    hub("BeIR/scifact-qrels/test.tsv", QRELS)
    hub("BeIR/scifact-qrels/validation.tsv", QRELS.replace("\ta\t", "\tb\t"))


def put_mteb(hub):
    hub("mteb/scifact/corpus.jsonl", PASSAGES)
    hub("mteb/scifact/queries.jsonl", QUERIES)
    hub("mteb/scifact/qrels/test.jsonl", '{"query-id": "q", "corpus-id": "a", "score": 1}\n')
    hub("mteb/scifact/qrels/dev.jsonl", '{"query-id": "q", "corpus-id": "b", "score": 1}\n')


def put_parquet(hub):
    rows = {"_id": ["a", "b"], "title": ["t", ""], "text": ["x", "y"]}
    for part in range(2):
        name = f"corpus-0000{part}-of-00002.parquet"
        hub(f"own/scifact/corpus/{name}", {key: values[part : part + 1] for key, values in rows.items()})
    hub("own/scifact/queries/queries-00000-of-00001.parquet", {"_id": ["q"], "text": ["ask"]})
    hub("own/scifact/data/test-00000-of-00001.parquet", {"query-id": ["q"], "corpus-id": ["a"], "score": [1]})
    hub("own/scifact/data/dev-00000-of-00001.parquet", {"query-id": ["q"], "corpus-id": ["b"], "score": [1]})


@pytest.mark.parametrize(
    ("put", "name"),
    [
        (put_beir, "hub:BeIR/scifact"),
        (put_beir, "beir/SciFact"),
        (put_mteb, "hub:mteb/scifact"),
        (put_parquet, "hub:own/scifact"),
    ],
)
def test_every_layout_gives_the_same(hub, put, name):
    put(hub)
    assert read(name) == (
        [("a", "t", "x"), ("b", "", "y")],
        [Query("q", "ask")],
        {"test": [Qrel("q", "a", 1)], "dev": [Qrel("q", "b", 1)]},
    )
    assert open_source(name, "auto", ReadOptions()).has_qrels


def test_judgements_of_a_split_in_several_files(hub):
    hub("some/scifact/corpus.jsonl", PASSAGES)
    hub("some/scifact-qrels/train-00000-of-00002.jsonl", '{"query-id": "q", "corpus-id": "a", "score": 1}\n')
    hub("some/scifact-qrels/train-00001-of-00002.jsonl", '{"query-id": "q", "corpus-id": "b", "score": 2}\n')
    assert read("hub:some/scifact")[2] == {"train": [Qrel("q", "a", 1), Qrel("q", "b", 2)]}


def test_passages_alone_and_rows_of_any_data_set(hub):
    hub("my/notes/corpus.jsonl", PASSAGES)
    assert read("hub:my/notes") == ([("a", "t", "x"), ("b", "", "y")], [], {})
    hub("my/rows/data/train-00000-of-00001.parquet", {"id": ["1"], "text": ["z"]})
    assert read("hub:my/rows") == ([("1", "", "z")], [], {})


def test_other_judgements_are_another_source(hub):
    put_beir(hub)
    before = open_source("hub:BeIR/scifact", "auto", ReadOptions()).fingerprint()
    assert open_source("hub:BeIR/scifact", "hub", ReadOptions()).fingerprint() == before
    hub("BeIR/scifact-qrels/test.tsv", QRELS.replace("\ta\t", "\tb\t"))
    assert open_source("hub:BeIR/scifact", "auto", ReadOptions()).fingerprint() != before


def test_what_cannot_be_fetched_is_named(hub, monkeypatch):
    with pytest.raises(CorpusError, match=r"cannot fetch the data set 'no/such' from the hub: 404 for no/such; check"):
        open_source("hub:no/such", "auto", ReadOptions())
    with pytest.raises(CorpusError, match=r"hub:scifact is not a hub id; write hub:OWNER/NAME"):
        open_source("hub:scifact", "auto", ReadOptions())
    with pytest.raises(InputError, match="is of the format 'hub', not 'tsv'"):
        open_source("hub:my/notes", "tsv", ReadOptions())
    hub("my/odd/a.tsv", "a\tx\n")
    hub("my/odd/b.jsonl", PASSAGES)
    with pytest.raises(CorpusError, match=r"hub:my/odd has no corpus.jsonl.*several formats \(jsonl, tsv\)"):
        open_source("hub:my/odd", "auto", ReadOptions())

    def no_network(*args, **kwargs):
        raise LocalEntryNotFoundError("no network, and not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(CorpusError, match="no network, and not in the cache"):
        open_source("BeIR/scifact", "auto", ReadOptions())


def test_a_hub_that_fails_for_the_judgements_is_not_one_without_them(hub, monkeypatch):
    put_beir(hub)
    whole = huggingface_hub.snapshot_download

    def half(repo_id, **options):
        if repo_id.endswith("-qrels"):
            raise LocalEntryNotFoundError("no network")
        return whole(repo_id, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", half)
    with pytest.raises(CorpusError, match="cannot fetch the data set 'BeIR/scifact-qrels'"):
        open_source("hub:BeIR/scifact", "auto", ReadOptions())


CARD = """---
configs:
- config_name: de
  data_files:
  - split: train
    path: data/de/*.parquet
- config_name: en
  data_files: english.jsonl
---
# A data set
"""


def put_configs(hub):
    hub("own/langs/README.md", CARD)
    hub("own/langs/data/de/a.parquet", {"id": ["1"], "text": ["eins"]})
    hub("own/langs/english.jsonl", '{"id": "1", "text": "one"}')


def put_folders(hub):
    hub("own/langs/de/a.parquet", {"id": ["1"], "text": ["eins"]})
    hub("own/langs/en/a.parquet", {"id": ["1"], "text": ["one"]})


@pytest.mark.parametrize("put", [put_configs, put_folders])
def test_configurations_are_refused_with_their_list_and_taken_by_name(hub, put):
    put(hub)
    with pytest.raises(CorpusError, match="hub:own/langs has 2 configurations: de, en; choose one: hub:own/langs:de"):
        open_source("hub:own/langs", "auto", ReadOptions())
    assert read("hub:own/langs:de")[0] == [("1", "", "eins")]
    assert read("hub:own/langs:en")[0] == [("1", "", "one")]


def test_a_configuration_that_is_not_there_is_named(hub):
    put_configs(hub)
    with pytest.raises(CorpusError, match="has no configuration 'fr'; it has de, en: hub:own/langs:de"):
        open_source("hub:own/langs:fr", "auto", ReadOptions())


def test_a_configuration_of_parts_has_its_queries_and_judgements(hub):
    for language in ("as", "bn"):
        hub(f"own/many/{language}-corpus/test.parquet", {"_id": [f"{language}1"], "text": ["x"]})
        hub(f"own/many/{language}-queries/test.parquet", {"_id": ["q"], "text": ["ask"]})
        hub(f"own/many/{language}-qrels/test.parquet", {"query-id": ["q"], "corpus-id": [f"{language}1"], "score": [1]})
    with pytest.raises(CorpusError, match="has 2 configurations: as, bn; choose one: hub:own/many:as"):
        open_source("hub:own/many", "auto", ReadOptions())
    assert read("hub:own/many:bn") == ([("bn1", "", "x")], [Query("q", "ask")], {"test": [Qrel("q", "bn1", 1)]})


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again_and_then_fails(hub, monkeypatch, status, caplog):
    put_beir(hub)
    waits, asked = [], []
    whole = huggingface_hub.snapshot_download

    def busy(repo_id, **options):
        asked.append(repo_id)
        if len(asked) <= num_busy:
            raise HfHubHTTPError(f"{status} busy", response=Mock(headers={}, status_code=status))
        return whole(repo_id, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", busy)
    monkeypatch.setattr("readapt_ray.catalog.fetching.time.sleep", waits.append)
    num_busy = 3
    assert len(read("hub:BeIR/scifact")[0]) == 2
    assert waits == [2.0, 4.0, 8.0]
    assert "cannot fetch the data set 'BeIR/scifact' from the hub" in caplog.text
    num_busy = 1000
    with pytest.raises(ReadaptError, match=f"{status} busy; tried 5 times: run again later") as raised:
        open_source("hub:BeIR/scifact", "auto", ReadOptions())
    assert not isinstance(raised.value, InputError)
