"""Documents that ingest splits into passages are found, served and measured as documents."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import readapt_ray as ra
from readapt_ray.artifacts import open_artifact
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster.scale_scoring import measure_sample
from readapt_ray.errors import ArtifactConflictError, InputError
from readapt_ray.evaluation.runs import read_run
from readapt_ray.records import Query
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.parents import first_of_each, merged_to_documents
from readapt_ray.retrieval.passage_files import PassageFiles
from readapt_ray.retrieval.passage_store import PassageStore
from readapt_ray.serving.search_modes import search_documents
from readapt_ray.serving.versions import Found, Ranked
from readapt_ray.stages import search as search_stage
from readapt_ray.stages import tune as tune_stage
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.stages.evaluate import EvaluateConfig, evaluate
from readapt_ray.stages.index import IndexConfig, index
from readapt_ray.stages.ingest import IngestConfig, ingest
from readapt_ray.stages.pack import PackConfig, pack
from readapt_ray.stages.search import SearchConfig, search
from readapt_ray.stages.tune import TuneConfig
from readapt_ray.storage import Location
from readapt_ray.training import labelled_pairs
from readapt_ray.training.pairs import PairReader
from tests import factories

SPLIT = {"split_tokens": 24, "overlap": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A BEIR folder of documents of one to nine passages, and a model."""
    folder = tmp_path_factory.mktemp("split")
    factories.write_contract(factories.tiny_decoder(folder / "model", headless=True))
    passages = factories.small_corpus(60)
    documents, at = [], 0
    for number in range(12):
        own = passages[at : at + 1 + number % 9]
        at += len(own)
        documents.append({"_id": f"d{number}", "title": own[0].title, "text": "\n".join(each.text for each in own)})
    documents[3]["_id"] = "d3#7"
    corpus = folder / "corpus.beir"
    (corpus / "qrels").mkdir(parents=True)
    (corpus / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    queries = [{"_id": f"q{number}", "text": passages[number].text[:40].strip()} for number in range(0, 40, 3)]
    (corpus / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    lines = [f"{query['_id']}\td{number % 9}\t1" for number, query in enumerate(queries) if number % 9 != 3]
    (corpus / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]))
    return folder


def ingested(root, name, source="corpus.beir", **options):
    values = {"source": str(root / source), "output": str(root / name), "tokenizer": str(root / "model")}
    return ingest(IngestConfig.parse(values | SPLIT | options))


@pytest.fixture(scope="module")
def made(root, ray_session):
    """The corpus, its vectors and an index of two shards."""
    artifact = ingested(root, "corpus")
    model = str(root / "model")
    embed(EmbedConfig(retriever=model, corpus=artifact.uri, output=str(root / "vectors"), dtype="float32"))
    index(IndexConfig(vectors=str(root / "vectors"), output=str(root / "index"), rows_per_shard=60, bm25=True))
    return root


def rows_of(artifact):
    return pq.read_table(artifact.location.local_path / "passages").to_pylist()


def by_hand(root, queries, top_k):
    """The best documents by the best score of their passages."""
    rows = rows_of(open_artifact(str(root / "corpus"), "ingest"))
    encoder = Encoder.load(open_model(str(root / "model")))
    vectors = encoder.encode([row["text"] for row in rows], "passage", [row["title"] for row in rows])
    scores = encoder.encode(queries, "query") @ vectors.T
    found = []
    for own in scores:
        best = {}
        for score, row in zip(own.tolist(), rows, strict=True):
            best[row["parent_id"]] = max(best.get(row["parent_id"], (-9.0, "")), (score, row["doc_id"]))
        found.append(sorted(((score, doc_id) for doc_id, (score, _) in best.items()), reverse=True)[:top_k])
    return found


def test_what_ingest_writes_of_documents(root):
    artifact = ingested(root, "written")
    counts, rows = artifact.manifest.counts, rows_of(artifact)
    assert (counts["num_documents"], counts["num_passages"]) == (12, len(rows))
    assert len({row["doc_id"] for row in rows}) == len(rows) > 60
    assert {row["parent_id"] for row in rows} == {f"d{number}" for number in range(12) if number != 3} | {"d3#7"}
    assert artifact.manifest.details["split"]["tokens"] == 24
    assert artifact.manifest.details["labels"] == {"qrels_of_unknown_passages": 0, "qrels_of_unknown_queries": 0}
    assert ingested(root, "written").fingerprint == artifact.fingerprint
    with pytest.raises(ArtifactConflictError, match="overlap"):
        ingested(root, "written", overlap=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": None}, "split_tokens needs a tokenizer"),
        ({"overlap": 24}, "overlap = 24 must be less than split_tokens"),
        ({"split_tokens": 0}, "split_tokens"),
    ],
)
def test_options_that_cannot_be_are_refused(root, options, message):
    with pytest.raises(InputError, match=message):
        ingested(root, "none", **options)


def test_any_format_is_split_and_tasks_give_what_one_process_gives(root, ray_session, monkeypatch):
    table = pa.Table.from_pylist([json.loads(line) for line in (root / "corpus.beir/corpus.jsonl").open()])
    pq.write_table(table, root / "c.parquet", row_group_size=2)
    (root / "notes").mkdir()
    for row in table.to_pylist():
        (root / "notes" / f"{row['_id'].replace('#', '-')}.md").write_text(f"# {row['title']}\n\n{row['text']}")
    one = ingested(root, "one", "c.parquet", rows_per_file=5)
    notes = ingested(root, "of-notes", "notes")
    assert [row["text"] for row in rows_of(one)] == [row["text"] for row in rows_of(ingested(root, "x"))]
    assert {row["parent_id"] for row in rows_of(notes)} > {"d1.md", "d3-7.md"}
    monkeypatch.setattr("readapt_ray.stages.ingest.MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr("readapt_ray.sources.pieces.MIN_PIECE_BYTES", 500)
    many = ingested(root, "many", "c.parquet", rows_per_file=5)
    assert rows_of(many) == rows_of(one)
    assert many.manifest.counts == one.manifest.counts
    assert many.manifest.details["split"] == one.manifest.details["split"]


@pytest.mark.parametrize("source", ["index", "vectors"])
@pytest.mark.parametrize("top_k", [3, 100])
def test_search_merges_to_documents_by_their_best_passage(made, source, top_k):
    config = {"retriever": str(made / "model"), source: str(made / source), "queries": str(made / "corpus/queries")}
    output = made / f"{source}-{top_k}.trec"
    search(SearchConfig.parse(config | {"output": str(output), "top_k": top_k}))
    run = read_run(str(output))
    queries = [json.loads(line) for line in (made / "corpus.beir/queries.jsonl").open()]
    for query, due in zip(queries, by_hand(made, [each["text"] for each in queries], top_k), strict=True):
        found = [(each.score, each.doc_id) for each in run[query["_id"]]]
        assert [doc_id for _, doc_id in found] == [doc_id for _, doc_id in due]
        np.testing.assert_allclose([score for score, _ in found], [score for score, _ in due], atol=1e-4)


@pytest.mark.parametrize("mode", ["bm25", "hybrid"])
def test_words_are_merged_too(made, mode):
    config = {"retriever": str(made / "model"), "index": str(made / "index"), "queries": str(made / "corpus/queries")}
    search(SearchConfig.parse(config | {"output": str(made / f"{mode}.trec"), "top_k": 5, "mode": mode}))
    for ranked in read_run(str(made / f"{mode}.trec")).values():
        ids = [each.doc_id for each in ranked]
        assert len(set(ids)) == len(ids) == 5
        assert set(ids) <= {f"d{number}" for number in range(12)} | {"d3#7"}


def test_the_python_retriever_gives_documents_with_their_best_passage(made):
    retriever = ra.Retriever(retriever=made / "model", index=made / "index", corpus=made / "corpus")
    (due,) = by_hand(made, ["array of shapes"], 4)
    hits = retriever.search("array of shapes", top_k=4)
    assert [hit.doc_id for hit in hits] == [doc_id for _, doc_id in due]
    texts = {row["doc_id"]: row["text"] for row in rows_of(open_artifact(str(made / "corpus"), "ingest"))}
    assert all(hit.passage_id.startswith(hit.doc_id) and texts[hit.passage_id] == hit.text for hit in hits)


def test_a_store_knows_documents_and_passages(made):
    store = PassageStore.open(str(made / "corpus"))
    assert PassageFiles.open(str(made / "corpus")).missing(["d1", "d1#1", "d3#7", "d0", "no", "d1#99"]) == [
        "no",
        "d1#99",
    ]
    found = store.find(["d1", "d1#2", "d3#7"])
    assert [found[each].doc_id for each in ("d1", "d1#2", "d3#7")] == ["d1", "d1#2", "d3#7"]
    assert found["d1"].text == store.find(["d1#1"])["d1#1"].text


def test_lists_of_documents_name_all_their_passages(made):
    listed = made / "exclude.txt"
    listed.write_text("d0\nd5\nd7#2\nd3#7\n")
    rows = rows_of(open_artifact(str(made / "corpus"), "ingest"))
    due = {row["doc_id"] for row in rows if row["parent_id"] in ("d0", "d5", "d3#7")} | {"d7#2"}
    assert PassageFiles.open(str(made / "corpus")).passage_ids(["d0", "d5", "d7#2", "d3#7"]) == due
    values = {"pretrained": str(made / "model"), "corpus": str(made / "corpus"), "output": str(made / "blocks")}
    packed = pack(PackConfig.parse(values | {"exclude": str(listed)}))
    assert packed.manifest.counts["num_withheld_passages"] == len(due)


def test_a_server_searches_until_there_are_enough_documents():
    passages = [f"a#{number}" for number in range(1, 50)] + ["b", "c#1", "c#2", "d"]
    depths = []

    async def found(vectors, top_k, wanted):
        depths.append(top_k)
        return Found([[Ranked(doc_id, 1.0 / rank) for rank, doc_id in enumerate(passages[:top_k], 1)]], [])

    info = SimpleNamespace(is_split=True, num_vectors=len(passages), has_words=False)
    backend = SimpleNamespace(info=info, search=found)
    answer = asyncio.run(search_documents("dense", backend, np.zeros((1, 2)), ["q"], top_k=3, wanted=None))
    assert [hit.doc_id for hit in answer.ranked[0]] == ["a#1", "b", "c#1"]
    assert depths == [9, 27, 53]


def test_merging_keeps_the_best_passage_of_each_document():
    table = pa.table(
        {"query_id": list("qqqqp"), "doc_id": ["a#2", "a#1", "b", "c#9", "a#1"], "score": [5.0, 4, 3, 2, 1]}
    )
    merged = merged_to_documents(table, 2).to_pylist()
    assert [tuple(row.values()) for row in merged] == [("q", "a", 5.0), ("q", "b", 3.0), ("p", "a", 1.0)]
    assert merged_to_documents(table.slice(0, 0), 2).num_rows == 0
    assert first_of_each(["a#2", "a#1", "b", "a#3", "c"], 2) == [0, 2]


def test_search_goes_deeper_until_there_are_enough_documents(caplog):
    names = [f"a#{number}" for number in range(1, 60)] + ["b", "q#1", "q#2", "d"]
    depths = []

    def search(depth):
        depths.append(depth)
        rows = np.arange(min(depth, len(names)))[None]
        yield (100.0 - rows).astype(np.float32), rows

    searched = SimpleNamespace(names=lambda rows: pa.array([names[row] for row in rows]))
    source = SimpleNamespace(num_vectors=len(names))
    queries = [Query("q", "text")]
    config = SearchConfig(retriever="m", index="i", queries="q", output="x.trec", top_k=3)
    table = search_stage._find_documents(config, source, searched, search, queries)
    assert table.to_pylist() == [
        {"query_id": "q", "doc_id": doc_id, "score": score}
        for doc_id, score in (("a", 100.0), ("b", 41.0), ("q", 40.0))
    ]
    assert depths == [9, 27, 63]
    config = config.model_copy(update={"drop_self_hits": True})
    table = search_stage._find_documents(config, source, searched, search, queries)
    assert table["doc_id"].to_pylist() == ["a", "b", "d"]


def test_evaluate_merges_passages_that_others_ranked(root):
    corpus = ingested(root, "of-others")
    rows = rows_of(corpus)
    firsts = {row["parent_id"]: row["doc_id"] for row in reversed(rows)}
    for name, ids in (("documents", firsts), ("passages", firsts.values())):
        lines = [f"q{query} Q0 {each} {rank} {9.0 - rank} x" for query in (0, 3, 6) for rank, each in enumerate(ids)]
        (root / f"other-{name}.trec").write_text("\n".join(lines))
    found = []
    for name in ("documents", "passages"):
        for with_corpus in ("", corpus.uri):
            values = {"runs": [str(root / f"other-{name}.trec")], "qrels": corpus.uri, "corpus": with_corpus}
            output = root / f"of-others-{name}-{bool(with_corpus)}"
            evaluate(EvaluateConfig.parse(values | {"output": str(output)}))
            (run,) = json.loads((output / "report.json").read_text())["runs"]
            found.append((run["means"], run["num_results"]))
    assert found == [found[0]] * 4
    assert found[0][0]["nDCG@10"]["mean"] > 0


def judged_corpus(root, name):
    """A split corpus whose queries are of single passages, judged by document; and each query's passage."""
    corpus = ingested(root, name)
    rows = [row for row in rows_of(corpus) if row["parent_id"] in ("d3#7", "d5", "d7")]
    asked = {f"s{number}": row for number, row in enumerate(rows)}
    queries = [{"query_id": key, "text": row["text"]} for key, row in asked.items()]
    qrels = [{"query_id": key, "doc_id": row["parent_id"], "relevance": 1} for key, row in asked.items()]
    pq.write_table(pa.Table.from_pylist(queries), corpus.location.local_path / "queries/part-00000.parquet")
    pq.write_table(pa.Table.from_pylist(qrels), corpus.location.local_path / "qrels/train.parquet")
    return corpus, asked


def test_a_judged_document_is_trained_on_by_the_passage_that_answers_best(root):
    corpus, asked = judged_corpus(root, "to-train")
    others = {"d3#7": "d5", "d5": "d7", "d7": "d3#7"}
    lines = []
    for key, row in asked.items():
        ranked = (f"{row['parent_id']}#1", row["parent_id"], others[row["parent_id"]])
        lines += [f"{key} Q0 {doc_id} {rank} {9 - rank} x" for rank, doc_id in enumerate(ranked, 1)]
    (root / "hard.trec").write_text("\n".join(lines))
    source = labelled_pairs.open_pairs(corpus.uri, "train", str(root / "hard.trec"))
    model = open_model(str(root / "model"))
    labelled_pairs.write_pairs(source, model, model.encoding, Location(str(root / "pairs/p.parquet")), num_negatives=2)
    rows = pq.read_table(root / "pairs/p.parquet").to_pylist()
    texts = {row["doc_id"]: row["text"] for row in rows_of(corpus)}
    assert [texts[row["doc_id"]] for row in rows] == [row["text"] for row in asked.values()]
    assert [len(row["negative_ids"]) for row in rows] == [1] * len(rows), "no passage of a right document is a negative"
    read = PairReader(Location(str(root / "pairs")), batch_size=4, num_epochs=1, seed=0).read(np.arange(len(rows)))
    numbers = {document: set() for document in others}
    for row, own in zip(rows, asked.values(), strict=True):
        numbers[own["parent_id"]].add(row["doc_number"])
        numbers[others[own["parent_id"]]].update(row["negative_numbers"])
    for own, right in zip(asked.values(), read.relevant, strict=True):
        assert set(right.tolist()) == numbers[own["parent_id"]], (
            "passages of its document are no negatives in the batch"
        )


@pytest.mark.parametrize("by", ["parent_id", "doc_id"])
def test_tune_and_evaluate_take_judgements_of_documents_and_of_passages(root, by):
    corpus, asked = judged_corpus(root, f"to-measure-{by}")
    qrels = [{"query_id": key, "doc_id": row[by], "relevance": 1} for key, row in asked.items()]
    folder = corpus.location.local_path
    pq.write_table(pa.Table.from_pylist(qrels), folder / "qrels/train.parquet")
    labels = {"queries": str(folder / "queries"), "qrels": str(folder / "qrels/train.parquet")}
    wired = dict.fromkeys(("pretrained", "retriever", "adapter"), "x")
    config = TuneConfig.parse(wired | labels | {"corpus": corpus.uri, "output": str(root / "o"), "max_passages": 1})
    sample = tune_stage._judged_sample(config, corpus)
    assert sample.judgements == {key: {row["parent_id"]: 1} for key, row in asked.items()}
    assert len(sample.passages) == len(asked), "all passages of the judged documents"
    texts = [each.text.replace("\n", " ") for each in sample.passages]
    scores = np.array([[float(text == query.text) for text in texts] for query in sample.queries])
    found = measure_sample(sample, scores, "RR@1")
    assert found.values["RR@1"].tolist() == [1.0] * len(asked), "a document has the score of its best passage"
    lines = [f"{key} Q0 {row['parent_id']} 1 1 x" for key, row in asked.items()]
    (root / "right.trec").write_text("\n".join(lines))
    values = {"runs": [str(root / "right.trec")], "qrels": labels["qrels"], "corpus": corpus.uri}
    evaluate(EvaluateConfig.parse(values | {"output": str(root / f"measured-{by}")}))
    (run,) = json.loads((root / f"measured-{by}/report.json").read_text())["runs"]
    assert run["means"]["nDCG@10"]["mean"] == 1.0
