import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.artifacts import read_manifest
from readapt_ray.errors import ArtifactConflictError, CorpusError, InputError
from readapt_ray.records import PASSAGE_SCHEMA, QREL_SCHEMA, QUERY_SCHEMA
from readapt_ray.sources.judgements import keep_judged, read_qrels, read_queries
from readapt_ray.stages.ingest import IngestConfig, ingest
from tests.data import collection


def _corpus(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _run(source, output, **options):
    return ingest(IngestConfig.parse({"source": str(source), "output": str(output)} | options))


def _passages(output):
    columns = ["doc_id", "title", "text"]
    return [tuple(row.values()) for row in pq.read_table(output / "passages", columns=columns).to_pylist()]


def _digests(output):
    return {
        str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in output.rglob("[!.]*.parquet")
    }


GOOD = [{"_id": "a", "title": "T", "text": "one"}, {"_id": "b", "text": " two \n\n lines "}]


def test_passages_are_cleaned_and_counted(tmp_path):
    artifact = _run(_corpus(tmp_path / "c.jsonl", GOOD), tmp_path / "out")
    assert _passages(tmp_path / "out") == [("a", "T", "one"), ("b", "", "two\nlines")]
    assert pq.read_schema(tmp_path / "out" / "passages" / "part-00000.parquet").equals(PASSAGE_SCHEMA)
    hashes = pq.read_table(tmp_path / "out" / "passages")["content_hash"].to_pylist()
    assert hashes == [hashlib.blake2b(b, digest_size=16).digest() for b in (b"T\0one", b"\0two\nlines")]
    assert artifact.manifest.counts == {"num_passages": 2, "num_bytes": 13}
    assert artifact.manifest.config["format"] == "jsonl"
    assert artifact.manifest.config["deduplicate"] == "exact"
    assert not (tmp_path / "out" / "queries").exists()


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "parquet", "text"])
def test_one_row_of_every_format(tmp_path, kind):
    source = tmp_path / f"c.{kind if kind != 'text' else 'txt'}"
    if kind == "parquet":
        pq.write_table(pa.table({"id": ["a"], "text": ["one"]}), source)
    else:
        source.write_text({"jsonl": '{"id": "a", "text": "one"}', "tsv": "a\tone", "text": "one"}[kind])
    assert _run(source, tmp_path / "out").manifest.counts["num_passages"] == 1


def test_twice_does_nothing_and_another_option_is_refused(tmp_path):
    source = _corpus(tmp_path / "c.jsonl", GOOD)
    first = _run(source, tmp_path / "out")
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    assert _run(source, tmp_path / "out", format="jsonl", deduplicate="exact").fingerprint == first.fingerprint
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == stamps
    with pytest.raises(ArtifactConflictError, match="deduplicate: 'exact' there, 'none' now"):
        _run(source, tmp_path / "out", deduplicate="none")
    _corpus(source, GOOD[:1])
    with pytest.raises(ArtifactConflictError, match="source: its content changed"):
        _run(source, tmp_path / "out")
    assert _run(source, tmp_path / "out", overwrite=True).manifest.counts["num_passages"] == 1


BAD = [
    GOOD[0],
    {"_id": "n", "text": None},
    {"_id": "m"},
    {"_id": "l", "text": ["x"]},
    {"_id": "e", "text": " "},
    {"_id": "a", "text": "again"},
    {"text": "no id"},
    {"_id": "long", "text": "x" * 10_000_000},
    GOOD[1],
]
REASONS = ["null_text", "missing_text", "text_not_string", "empty_text", "duplicate_id", "missing_id", "long_text"]


def test_bad_rows_are_left_out_counted_and_named(tmp_path, caplog):
    source = _corpus(tmp_path / "c.jsonl", BAD)
    with source.open("ab") as file:
        file.write(b'{"_id": "u", "text": "\xff"}\nnonsense\n')
    manifest = _run(source, tmp_path / "out").manifest
    assert [doc_id for doc_id, _, _ in _passages(tmp_path / "out")] == ["a", "b"]
    found = manifest.details["bad_rows"]
    named = [*((f"c.jsonl:{line}", reason) for line, reason in enumerate(REASONS, start=2))]
    named += [("c.jsonl:10", "not_utf8"), ("c.jsonl:11", "not_json")]
    assert [(row["place"], row["reason"]) for row in found["first"]] == named
    assert found["total"] == 9
    assert found["by_reason"] == dict.fromkeys(sorted(reason for _, reason in named), 1)
    assert "ingest: left out c.jsonl:2: its text is null" in caplog.text
    assert read_manifest(str(tmp_path / "out")) == manifest


def test_ids_with_white_space_meet_and_fit_into_trec_files(tmp_path, caplog):
    caplog.set_level("INFO", "readapt_ray")
    folder = tmp_path / "c"
    _corpus(folder / "corpus.jsonl", [{"_id": "doc 12 ", "text": "one"}, {"_id": 7, "text": "two"}])
    _corpus(folder / "queries.jsonl", [{"_id": "q 1", "text": "ask"}])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq 1\tdoc 12\t1\n")
    manifest = _run(folder, tmp_path / "out").manifest
    assert [doc_id for doc_id, _, _ in _passages(tmp_path / "out")] == ["doc%2012", "7"]
    assert manifest.details["labels"] == {"qrels_of_unknown_passages": 0, "qrels_of_unknown_queries": 0}
    assert [query.query_id for query in read_queries(str(tmp_path / "out"))] == ["q%201"]
    assert caplog.text.count("ingest: 1 doc_ids had white space") == 1


def test_options_that_change_nothing_make_no_other_artifact(tmp_path):
    source = _corpus(tmp_path / "c.jsonl", GOOD)
    first = _run(source, tmp_path / "out")
    assert _run(source, tmp_path / "out", near_threshold=0.5, max_passage_chars=10).fingerprint == first.fingerprint
    near = _run(source, tmp_path / "near", deduplicate="near")
    with pytest.raises(ArtifactConflictError, match="near_threshold"):
        _run(source, tmp_path / "near", deduplicate="near", near_threshold=0.5)
    assert near.fingerprint != first.fingerprint
    (tmp_path / "a.md").write_text("text")
    _run(tmp_path / "a.md", tmp_path / "text")
    with pytest.raises(ArtifactConflictError, match="max_passage_chars"):
        _run(tmp_path / "a.md", tmp_path / "text", max_passage_chars=10)


def test_only_the_first_bad_rows_are_named(tmp_path):
    rows = [*GOOD, *({"_id": f"n{number}", "text": None} for number in range(50))]
    found = _run(_corpus(tmp_path / "c.jsonl", rows), tmp_path / "out").manifest.details["bad_rows"]
    assert (found["total"], found["by_reason"], len(found["first"])) == (50, {"null_text": 50}, 20)


@pytest.mark.parametrize("number", range(1, 8))
def test_policy_fail_stops_at_the_row(tmp_path, number):
    source = _corpus(tmp_path / "c.jsonl", [GOOD[0], BAD[number]])
    with pytest.raises(CorpusError, match=r"bad row at c.jsonl:2: .*--bad-rows skip"):
        _run(source, tmp_path / "out", bad_rows="fail")
    assert read_manifest(str(tmp_path / "out")) is None


def test_no_passage_left_is_an_error(tmp_path):
    source = _corpus(tmp_path / "c.jsonl", [{"_id": "a", "text": " "}, {"_id": "b", "text": None}])
    with pytest.raises(
        CorpusError,
        match=r"no passages are left .*: every row is bad \(its text is empty: 1; its text is null: 1\).*--columns",
    ):
        _run(source, tmp_path / "out")
    (tmp_path / "names.csv").write_text("id,text\n")
    with pytest.raises(CorpusError, match=r"names.csv' holds no rows"):
        _run(tmp_path / "names.csv", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no corpus at"), ("", "holds no rows"), ('{"_id": "a", "abstract": "x"}', "no text column")],
)
def test_bad_input_is_found_before_anything_is_written(tmp_path, content, message):
    if content is not None:
        (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        _run(tmp_path / "c.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("near_threshold", 1.0), ("rows_per_file", 0), ("format", "xml"), ("bad_rows", "x")]
)
def test_an_option_out_of_bounds_is_named(tmp_path, option, value):
    with pytest.raises(InputError, match=option):
        _run(tmp_path, tmp_path / "out", **{option: value})


def _labelled(folder):
    texts = {"a": "same text", "b": "same  text", "c": "another text", "d": "same text"}
    _corpus(folder / "corpus.jsonl", [{"_id": doc_id, "title": "", "text": text} for doc_id, text in texts.items()])
    _corpus(folder / "queries.jsonl", [{"_id": "q", "text": "ask"}, {"_id": "p", "text": None}])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq\tb\t2\nq\ta\t1\nq\tc\t1\nq\tgone\t1\nx\td\t1\n"
    )
    return folder


def test_with_judgements_duplicates_stay(tmp_path, caplog):
    manifest = _run(_labelled(tmp_path / "c"), tmp_path / "out").manifest
    assert manifest.config["deduplicate"] == "none"
    assert manifest.counts == {"num_passages": 4, "num_bytes": 39, "num_queries": 1, "num_qrels": 5}
    assert manifest.details["labels"] == {"qrels_of_unknown_passages": 1, "qrels_of_unknown_queries": 1}
    assert "ingest: 1 of 5 judgements are of unknown passages (1): gone" in caplog.messages
    assert "ingest: 1 of 5 judgements are of unknown queries (1): x" in caplog.messages
    assert manifest.details["bad_rows"]["first"] == [{"place": "queries.jsonl:2", "reason": "null_text"}]
    assert pq.read_schema(tmp_path / "out" / "queries" / "part-00000.parquet").equals(QUERY_SCHEMA)
    assert pq.read_schema(tmp_path / "out" / "qrels" / "test.parquet").equals(QREL_SCHEMA)


def test_dropped_duplicates_leave_their_judgements_to_the_kept_one(tmp_path):
    manifest = _run(_labelled(tmp_path / "c"), tmp_path / "out", deduplicate="exact").manifest
    assert [doc_id for doc_id, _, _ in _passages(tmp_path / "out")] == ["a", "c"]
    assert manifest.details["duplicates"] == {
        "dropped": 2,
        "first": [{"doc_id": "b", "kept": "a"}, {"doc_id": "d", "kept": "a"}],
    }
    assert manifest.details["labels"]["qrels_moved_to_kept_duplicates"] == 2
    qrels = {(each.query_id, each.doc_id): each.relevance for each in read_qrels(str(tmp_path / "out" / "qrels"))}
    assert qrels == {("q", "a"): 2, ("q", "c"): 1, ("q", "gone"): 1, ("x", "a"): 1}


def test_near_duplicates_are_an_option(tmp_path):
    text = " ".join(f"w{number}" for number in range(100))
    rows = [{"_id": "a", "text": text}, {"_id": "b", "text": f"{text} more"}, {"_id": "c", "text": "other"}]
    source = _corpus(tmp_path / "c.jsonl", rows)
    assert len(_passages(_run(source, tmp_path / "exact").location.local_path)) == 3
    near = _run(source, tmp_path / "near", deduplicate="near").manifest
    assert near.details["duplicates"] == {"dropped": 1, "first": [{"doc_id": "b", "kept": "a"}]}


def test_what_ingest_wrote_is_a_source_too(tmp_path):
    _run(_labelled(tmp_path / "c"), tmp_path / "one")
    again = _run(tmp_path / "one", tmp_path / "two")
    assert again.manifest.counts == {"num_passages": 4, "num_bytes": 39, "num_queries": 1, "num_qrels": 5}
    assert _passages(tmp_path / "one") == _passages(tmp_path / "two")


@pytest.mark.parametrize(("name", "num_passages", "num_judged"), [("nfcorpus", 3633, 323), ("scifact", 5183, 300)])
def test_counts_of_real_collections(tmp_path, name, num_passages, num_judged):
    artifact = _run(collection(name), tmp_path / "out")
    assert artifact.manifest.counts["num_passages"] == num_passages == len(set(_passages(tmp_path / "out")))
    assert artifact.manifest.details["bad_rows"]["total"] == 0
    assert artifact.manifest.details["labels"] == {"qrels_of_unknown_passages": 0, "qrels_of_unknown_queries": 0}
    qrels = read_qrels(str(tmp_path / "out" / "qrels" / "test.parquet"))
    assert len(keep_judged(read_queries(str(tmp_path / "out" / "queries")), qrels)) == num_judged


def test_docstrings_of_the_standard_library(tmp_path):
    manifest = _run("python-docs:stdlib", tmp_path / "out").manifest
    passages = _passages(tmp_path / "out")
    by_id = {doc_id: text for doc_id, _, text in passages}
    assert manifest.counts["num_passages"] == len(by_id) > 5000
    assert len(set(by_id.values())) == len(passages)
    queries = read_queries(str(tmp_path / "out"))
    qrels = read_qrels(str(tmp_path / "out" / "qrels" / "test.parquet"))
    assert manifest.counts["num_queries"] == len(queries) == len(qrels) > 1000
    assert len({query.text for query in queries}) == len(queries)
    assert all(qrel.query_id == f"q:{qrel.doc_id}" and qrel.doc_id in by_id for qrel in qrels)
    assert not {query.query_id for query in queries} & by_id.keys()
    asked = {query.query_id: query.text for query in queries}
    assert not any(by_id[qrel.doc_id].startswith(asked[qrel.query_id]) for qrel in qrels)


_SCRIPT = """
import resource, sys
from readapt_ray.stages.ingest import IngestConfig, ingest
ingest(IngestConfig(source=sys.argv[1], output=sys.argv[2], rows_per_file=int(sys.argv[3])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def _made(path, num_rows):
    with path.open("w") as file:
        for number in range(num_rows):
            file.write(
                f'{{"_id": "d{number}", "text": "passage number {number} of a made corpus, {number * 7919 % 1009}"}}\n'
            )
    return path


def _command(source, output, rows_per_file):
    return [sys.executable, "-c", _SCRIPT, str(source), str(output), str(rows_per_file)]


_WITHOUT_AN_END = """
import time
from readapt_ray.sources.parts import PartWriter
write, written = PartWriter._write, []
def until_the_middle(*given):
    written.append(given)
    if len(written) > 60: time.sleep(3600)
    write(*given)
PartWriter._write = until_the_middle
"""


def test_killed_and_run_again_gives_what_an_undisturbed_run_gives(tmp_path):
    source = _made(tmp_path / "c.jsonl", 60_000)
    _run(source, tmp_path / "whole", rows_per_file=500)
    python, option, script, *arguments = _command(source, tmp_path / "out", 500)
    command = [python, option, _WITHOUT_AN_END + script, *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        waited_for = tmp_path / "out" / "passages" / "part-00003.parquet"
        while not waited_for.exists():
            assert process.poll() is None
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert read_manifest(str(tmp_path / "out")) is None
    left = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "passages").glob("part-*")}
    assert 4 <= len(left) < 120
    manifest = _run(source, tmp_path / "out", rows_per_file=500).manifest
    assert manifest.counts["num_passages"] == 60_000
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in left.items())
    assert _digests(tmp_path / "out") == _digests(tmp_path / "whole")


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    peaks_mib = []
    for num_rows in (20_000, 200_000):
        source = _made(tmp_path / f"{num_rows}.jsonl", num_rows)
        command = _command(source, tmp_path / f"out-{num_rows}", 8192)
        peaks_mib.append(int(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    bookkeeping_mib = 200_000 * 2 * 80 / 2**20
    assert peaks_mib[1] - peaks_mib[0] < bookkeeping_mib + 20, peaks_mib


def test_a_uri_of_a_filesystem_is_a_source_and_an_output(tmp_path):
    _corpus(tmp_path / "c.jsonl", GOOD)
    artifact = _run(f"file://{tmp_path}/c.jsonl", f"file://{tmp_path}/out")
    assert artifact.manifest.counts["num_passages"] == 2
    assert len(_passages(tmp_path / "out")) == 2


NAN = float("nan")


FROM_PANDAS = [
    (
        [
            {"_id": "a", "title": "Tides", "text": ""},
            {"_id": "b", "title": "Salt"},
            {"_id": "c", "title": "W", "text": NAN},
        ],
        [("a", "Tides", ""), ("b", "Salt", ""), ("c", "W", "")],
        {"title_only": 3},
    ),
    (
        [
            {"id": 1, "title": NAN, "text": "x"},
            {"id": 2, "title": None, "text": "y"},
            {"id": 3, "title": "t", "text": "z"},
        ],
        [("1", "", "x"), ("2", "", "y"), ("3", "t", "z")],
        {"text_only": 2, "title_and_text": 1},
    ),
    (
        [{"id": 7.0, "title": 1984, "text": "x"}, {"id": 1e15, "title": 1.5, "text": "y"}, {"id": 8.0, "text": "z"}],
        [("7", "1984", "x"), ("1000000000000000", "1.5", "y"), ("8", "", "z")],
        {"float_as_id": 3, "number_as_title": 2, "text_only": 1, "title_and_text": 2},
    ),
]


@pytest.mark.parametrize(("rows", "passages", "kinds"), FROM_PANDAS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_pandas_and_beir_write_is_kept(tmp_path, rows, passages, kinds, kind):
    source = tmp_path / f"c.{kind}"
    if kind == "jsonl":
        _corpus(source, rows)
    else:
        pd.DataFrame(rows).to_parquet(source)
    manifest = _run(source, tmp_path / "out").manifest
    assert _passages(tmp_path / "out") == passages
    assert manifest.details["kinds"] == kinds
    assert manifest.details["bad_rows"]["total"] == 0


@pytest.mark.parametrize("value", [1.5, True, ["a"], {"a": 1}])
def test_what_is_no_id_is_refused_by_name(tmp_path, value, caplog):
    source = _corpus(tmp_path / "c.jsonl", [*GOOD, {"_id": value, "text": "x"}])
    manifest = _run(source, tmp_path / "out").manifest
    told = {"place": "c.jsonl:3", "reason": "id_not_string", "value": repr(value)}
    assert manifest.details["bad_rows"]["first"] == [told]
    assert f"left out c.jsonl:3: its id is neither a string nor a whole number: {value!r}" in caplog.text


def test_kept_columns_stand_in_the_passages_with_their_types(tmp_path, caplog):
    rows = [
        {
            "id": "a",
            "text": "x",
            "url": "u",
            "year": 2020,
            "tags": ["p", "q"],
            "meta": {"k": 1},
            "score": 0.5,
            "ok": True,
        },
        {"id": "b", "text": "y", "url": None, "year": NAN, "tags": [], "meta": None, "score": 2, "ok": None},
        *({"id": str(number), "text": f"t{number}", "year": 2000 + number} for number in range(100)),
        {"id": "late", "text": "z", "year": "unknown", "url": 7},
    ]
    source = _corpus(tmp_path / "c.jsonl", rows)
    names = ("url", "year", "tags", "meta", "score", "ok")
    manifest = _run(source, tmp_path / "out", keep=list(names)).manifest
    table = pq.read_table(tmp_path / "out" / "passages")
    assert table.schema.names == [*PASSAGE_SCHEMA.names, *names]
    kinds = (pa.string(), pa.int64(), pa.list_(pa.string()), pa.string(), pa.float64(), pa.bool_())
    assert [table.schema.field(name).type for name in names] == list(kinds)
    first, second, *_, last = table.select(names).to_pylist()
    assert list(first.values()) == ["u", 2020, ["p", "q"], '{"k": 1}', 0.5, True]
    assert list(second.values()) == [None, None, [], None, 2.0, None]
    assert (last["url"], last["year"]) == ("7", None)
    assert manifest.details["unfit_values"] == {"year": {"count": 1, "first": "c.jsonl:103: 'unknown'"}}
    assert "1 values of the kept column 'year' are null, because they are not of type int64" in caplog.text
    again = _run(tmp_path / "out", tmp_path / "again", keep=list(names))
    assert pq.read_table(again.location.local_path / "passages") == table


def test_other_columns_are_another_artifact(tmp_path):
    source = _corpus(tmp_path / "c.jsonl", [{"id": "a", "text": "x", "body": "y", "url": "u"}])
    _run(source, tmp_path / "out")
    with pytest.raises(ArtifactConflictError, match="columns"):
        _run(source, tmp_path / "out", columns={"text": "body"})
    with pytest.raises(ArtifactConflictError, match="keep"):
        _run(source, tmp_path / "out", keep=["url"])


def test_columns_are_a_list_or_a_section() -> None:
    options = {"source": "a", "output": "b"}
    section = {"doc_id": "docid", "text": ["abstract", "body"]}
    assert IngestConfig(**options, columns=section).columns == ("doc_id=docid", "text=abstract+body")
    assert IngestConfig(**options, columns="doc_id=docid").columns == ("doc_id=docid",)
    with pytest.raises(InputError, match=r"columns = 'txt=x': .*did you mean 'text'"):
        IngestConfig(**options, columns={"txt": "x"}).read_options()
