"""Queries that a language model writes: from an endpoint that misbehaves, and from a model on Ray."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from readapt_ray import cli
from readapt_ray.artifacts import open_artifact
from readapt_ray.cluster.query_writing import PASSAGES_A_PIECE
from readapt_ray.cluster.round_trip import find_passages
from readapt_ray.errors import ArtifactConflictError, CorpusError, FingerprintMismatchError, InputError, WorkerError
from readapt_ray.sources.judgements import read_qrels, read_queries
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.stages.finetune import FinetuneConfig, finetune
from readapt_ray.stages.synthesize import SynthesizeConfig, synthesize
from readapt_ray.synthesis import endpoint
from readapt_ray.training.labelled_pairs import open_pairs
from tests import factories
from tests.chat_endpoint import chat_endpoint

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def server():
    with chat_endpoint() as made:
        yield made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, ray_session):
    return factories.ingest_artifact(
        tmp_path_factory.mktemp("synthesize") / "corpus", factories.small_corpus(150), num_files=2
    )


def config(corpus, server, output, **options):
    given = {"corpus": corpus.uri, "model": "writer", "endpoint": server.url, "output": str(output)}
    return SynthesizeConfig.parse({**given, **options})


def test_queries_and_qrels_come_out_that_finetune_and_tune_read(corpus, server, tmp_path, monkeypatch):
    monkeypatch.setenv(endpoint.KEY_VARIABLE, "secret")
    made = synthesize(config(corpus, server, tmp_path / "queries", num_passages=100))
    queries, qrels = read_queries(made.uri), read_qrels(made.uri)
    assert len(queries) == len({query.text for query in queries}) == len(qrels) == 100
    assert made.manifest.counts == {"num_passages": 100, "num_answers": 100, "num_queries": 100, "num_tokens": 10_000}
    rows = {row["doc_id"]: row for row in pq.read_table(corpus.location.local_path / "passages").to_pylist()}
    assert [qrel.query_id for qrel in qrels] == [f"synthetic:{qrel.doc_id}:1" for qrel in qrels]
    asked = {request["messages"][0]["content"] for request in server.requests}
    assert all(any(rows[qrel.doc_id]["text"] in prompt for prompt in asked) for qrel in qrels)
    assert {request["model"] for request in server.requests} == {"writer"} and set(server.keys) == {"Bearer secret"}
    assert "secret" not in (tmp_path / "queries/manifest.json").read_text()
    source = open_pairs(made.uri, "train", None)
    assert source.corpus.fingerprint == corpus.fingerprint and source.fingerprints == {"corpus": made.fingerprint}


def test_finetune_trains_on_what_was_written(corpus, server, tmp_path):
    made = synthesize(config(corpus, server, tmp_path / "queries", num_passages=16))
    model = factories.write_contract(factories.tiny_encoder(tmp_path / "model", headless=True))
    options = {"num_workers": 1, "num_cpus_per_worker": 1, "dtype": "float32", "batch_size": 8}
    trained = finetune(FinetuneConfig(model=str(model), corpus=made.uri, output=str(tmp_path / "adapter"), **options))
    assert trained.manifest.counts == {"num_pairs": 16, "num_steps": 2}


def test_queries_for_a_corpus_that_is_another_now_are_refused(server, tmp_path):
    first = factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(20))
    made = synthesize(config(first, server, tmp_path / "queries"))
    for file in sorted((tmp_path / "corpus").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(21))
    with pytest.raises(FingerprintMismatchError, match="synthesize them again"):
        open_pairs(made.uri, "train", None)


def test_a_busy_endpoint_is_asked_again_and_each_passage_once(corpus, server, tmp_path):
    refused = set()

    def answer(number, request):
        prompt = request["messages"][0]["content"]
        if prompt not in refused:
            refused.add(prompt)
            return 429, {"error": {"message": "slow down"}}
        return 200, f"what is asked as number {number}"

    server.answer = answer
    made = synthesize(config(corpus, server, tmp_path / "queries", num_passages=10))
    assert made.manifest.counts["num_queries"] == 10 and len(server.requests) == 20


def test_an_endpoint_that_goes_down_loses_nothing(corpus, server, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "_MAX_RETRIES", 1)
    options = {"num_passages": 150, "num_requests": 1}
    server.answer = lambda number, _: (500, {}) if number > PASSAGES_A_PIECE + 5 else (200, f"what is number {number}")
    with pytest.raises(WorkerError, match="run the same command again"):
        synthesize(config(corpus, server, tmp_path / "queries", **options))
    assert len(list((tmp_path / "queries/answers").glob("part-*.parquet"))) == 2
    server.requests.clear()
    server.answer = lambda number, _: (200, f"what is later number {number}")
    made = synthesize(config(corpus, server, tmp_path / "queries", **options))
    assert len(server.requests) == 150 - PASSAGES_A_PIECE - 5 and made.manifest.counts["num_queries"] == 150
    assert not list((tmp_path / "queries/answers").glob("*-partly*"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((401, {"error": {"message": "no such key"}}), "no such key.*READAPT_ENDPOINT_KEY"),
        ((404, {"error": {"message": "no model writer"}}), "no model writer"),
        ((200, {"choices": []}), "gave no chat completion"),
        ((200, {"hello": 1}), "gave no chat completion"),
        ((200, [1]), "gave no chat completion"),
    ],
)
def test_an_endpoint_that_refuses_or_is_none_is_named(corpus, server, tmp_path, given, message):
    server.answer = lambda *_: given
    with pytest.raises(InputError, match=message):
        synthesize(config(corpus, server, tmp_path / "queries", num_passages=3))


def test_a_passage_that_an_endpoint_refuses_to_read_ends_nothing(corpus, server, tmp_path):
    error = {"message": "The prompt was filtered", "code": "content_filter", "status": 400}
    server.answer = lambda number, _: (400, {"error": error}) if number == 2 else (200, f"what is asked as {number}")
    made = synthesize(config(corpus, server, tmp_path / "queries", num_passages=4, num_requests=1))
    assert made.manifest.counts["num_queries"] == 3 and len(server.requests) == 4
    assert made.manifest.details["left_out"] == {"empty": 1}


def test_nonsense_is_counted_by_reason_and_all_nonsense_is_refused(corpus, server, tmp_path):
    said = [
        "",
        "no",
        "I'm sorry, I cannot",
        "what is asked for here",
        "What is asked for here",
        "why is this passage short",
    ]
    server.answer = lambda number, _: (200, said[number - 1])
    options = {"num_passages": 6, "num_requests": 1}
    made = synthesize(config(corpus, server, tmp_path / "queries", **options))
    assert made.manifest.counts["num_queries"] == 1
    assert made.manifest.details["left_out"] == {"empty": 1, "refusal": 1, "short": 1, "of_passage": 1, "repeated": 1}
    server.answer = lambda *_: (200, "no")
    with pytest.raises(CorpusError, match="wrote no query that can be used: 6 under 3 words"):
        synthesize(config(corpus, server, tmp_path / "none", **options))


def test_an_endpoint_that_writes_nothing_of_use_is_not_asked_about_the_whole_corpus(corpus, server, tmp_path):
    server.answer = lambda *_: (200, "")
    with pytest.raises(CorpusError, match=r"256 empty answers; try a larger max_query_tokens"):
        synthesize(config(corpus, server, tmp_path / "queries", queries_per_passage=4))
    assert len(server.requests) == 256


def test_a_budget_that_is_spent_keeps_what_is_there(corpus, server, tmp_path, caplog):
    made = synthesize(config(corpus, server, tmp_path / "queries", num_passages=150, budget_tokens=6_500))
    counts = made.manifest.counts
    assert counts["num_tokens"] == 100 * counts["num_passages"] == 100 * len(server.requests)
    assert PASSAGES_A_PIECE - 5 < counts["num_passages"] <= 65 and counts["num_queries"] == counts["num_passages"]
    assert made.manifest.details["is_budget_spent"]
    assert f"budget of 6,500 tokens was spent after {counts['num_passages']} of 150 passages" in caplog.text
    with pytest.raises(InputError, match="budget_tokens = 50 has no room for a request"):
        synthesize(config(corpus, server, tmp_path / "none", budget_tokens=50))


def test_a_larger_budget_asks_for_the_rest_alone(corpus, server, tmp_path):
    options = config(corpus, server, tmp_path / "queries", num_passages=150, budget_tokens=6_500)
    part, num_asked = synthesize(options), len(server.requests)
    whole = synthesize(options.model_copy(update={"budget_tokens": 1_000_000}))
    assert len(server.requests) == 150 and part.manifest.counts["num_passages"] == num_asked < 70
    assert whole.manifest.counts["num_passages"] == 150
    assert not whole.manifest.details["is_budget_spent"] and whole.fingerprint != part.fingerprint
    fresh = synthesize(options.model_copy(update={"budget_tokens": 1_000_000, "output": str(tmp_path / "fresh")}))
    assert fresh.fingerprint == whole.fingerprint and fresh.manifest.counts == whole.manifest.counts
    with pytest.raises(ArtifactConflictError, match="prompt"):
        synthesize(options.model_copy(update={"prompt": "Ask about this: {passage}"}))


def test_a_budget_buys_queries_for_all_parts_of_the_corpus(tmp_path, server):
    """Passages are asked about in pieces of neighbours; a corpus is often sorted by subject."""
    large = factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(40 * PASSAGES_A_PIECE), num_files=2)
    options = {"num_passages": 40 * PASSAGES_A_PIECE, "budget_tokens": 10 * PASSAGES_A_PIECE * 100}
    made = synthesize(config(large, server, tmp_path / "queries", **options))
    assert 10 * PASSAGES_A_PIECE - 5 < made.manifest.counts["num_passages"] <= 10 * PASSAGES_A_PIECE
    names = sorted(each.name for each in (made.location / "answers").files(".parquet"))
    numbers = [int(each[5:10]) for each in names]
    assert min(numbers) < 10 and max(numbers) >= 30
    again = synthesize(config(large, server, tmp_path / "again", **options))
    assert sorted(each.name for each in (again.location / "answers").files(".parquet")) == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": "http://user:secret@host/v1"}, "READAPT_ENDPOINT_KEY"),
        ({"endpoint": "http://host/v1?api_key=secret"}, "READAPT_ENDPOINT_KEY"),
        ({"endpoint": "http://host/v1?sv=2024&sig=secret"}, "READAPT_ENDPOINT_KEY"),
        ({"endpoint": "localhost:8000"}, "no URL such as"),
        ({"endpoint": "http://host:port/v1"}, "no URL such as"),
        ({"endpoint": "http://[::1/v1"}, "no URL such as"),
        ({"prompt": "Write a query."}, "has no {passage}"),
        ({"endpoint": None, "budget_tokens": 5}, "endpoint"),
        ({"endpoint": None, "num_requests": 5}, "endpoint"),
        ({"round_trip_k": 5}, "vectors"),
        ({"dtype": "float32"}, "dtype is for a model that is loaded here"),
        ({"api_key": "secret"}, "unknown option 'api_key'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(corpus, server, tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        config(corpus, server, tmp_path / "queries", **options)
    assert message in str(caught.value)
    assert "endpoint" not in options or "secret" not in str(caught.value)


def killed_here(*_):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def vectors(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("round-trip")
    model = factories.write_contract(factories.tiny_encoder(folder / "model", headless=True), pooling="mean")
    options = {"num_workers": 1, "dtype": "float32"}
    return embed(EmbedConfig(retriever=str(model), corpus=corpus.uri, output=str(folder / "vectors"), **options))


def test_a_query_is_kept_if_it_finds_its_passage(corpus, vectors, server, tmp_path):
    rows = pq.read_table(corpus.location.local_path / "passages").to_pylist()

    def answer(number, request):
        prompt = request["messages"][0]["content"]
        [own] = [place for place, row in enumerate(rows) if row["text"] in prompt]
        right = rows[own if own % 2 else (own + 75) % 150]  # half of them ask for another passage
        return 200, f"{right['title']} {right['text']} {number}"[:200]

    server.answer = answer
    made = synthesize(config(corpus, server, tmp_path / "queries", vectors=vectors.uri, round_trip_k=5))
    texts = {query.query_id: query.text for query in read_queries(made.uri)}
    qrels = read_qrels(made.uri)
    answers = pq.read_table(tmp_path / "queries/answers").to_pylist()
    tried = [row for row in answers if not row["reason"]]
    found = find_passages([row["query"] for row in tried], [row["doc_id"] for row in tried], vectors, 5)
    kept = [(row["doc_id"], row["query"]) for row, is_found in zip(tried, found, strict=True) if is_found]
    assert [(qrel.doc_id, texts[qrel.query_id]) for qrel in qrels] == kept
    assert 0 < len(kept) < len(tried) and made.manifest.details["left_out"]["not_found"] == len(tried) - len(kept)


def test_what_is_found_is_what_the_products_say(corpus, vectors):
    from readapt_ray.cluster.recall_queries import query_encoder_of
    from readapt_ray.retrieval.encoder import Encoder

    encoder = query_encoder_of(vectors)
    texts = [f"what of {word}" for word in ("river", "engine", "market", "wing")]
    queries = Encoder.load(encoder.model, encoding=encoder.encoding, dtype="float32").encode(texts, "query")
    table = pq.read_table(vectors.location.local_path / "vectors")
    doc_ids, matrix = table["doc_id"].to_pylist(), np.array(table["vector"].to_pylist(), np.float32)
    order = np.argsort(-(queries @ matrix.T), axis=1)
    third = [doc_ids[row[2]] for row in order]
    assert find_passages(texts, third, vectors, 3).tolist() == [True] * 4
    assert find_passages(texts, third, vectors, 2).tolist() == [False] * 4
    assert find_passages([], [], vectors, 3).tolist() == []


def test_vectors_of_another_corpus_are_refused(vectors, server, tmp_path):
    other = factories.ingest_artifact(tmp_path / "other", factories.small_corpus(9))
    with pytest.raises(FingerprintMismatchError, match="not vectors of the corpus"):
        synthesize(config(other, server, tmp_path / "queries", vectors=vectors.uri))


@pytest.mark.slow
def test_a_model_on_ray_writes_the_same_queries_again_and_goes_on(corpus, tmp_path):
    model = factories.tiny_decoder(tmp_path / "model")
    arguments = [
        "synthesize",
        "--corpus",
        corpus.uri,
        "--model",
        str(model),
        "--num-passages",
        "100",
        "--dtype",
        "float32",
    ]
    arguments += ["--max-passage-chars", "100", "--max-query-tokens", "12", "--temperature", "1.0"]
    assert cli.main([*arguments, "--output", str(tmp_path / "one")]) == 0
    answers = pq.read_table(tmp_path / "one/answers")
    assert answers.num_rows == 100 and len(set(answers["answer"].to_pylist())) > 50
    killed = tmp_path / "two"
    with pytest.MonkeyPatch.context() as patch:  # a kill behind the first answers
        patch.setattr("readapt_ray.stages.synthesize._write", killed_here)
        assert cli.main([*arguments, "--output", str(killed)]) != 0
    (killed / "answers/part-00001.parquet").unlink()
    before = (killed / "answers/part-00000.parquet").stat().st_mtime_ns
    assert cli.main([*arguments, "--output", str(killed)]) == 0
    assert pq.read_table(killed / "answers").equals(answers)
    assert (killed / "answers/part-00000.parquet").stat().st_mtime_ns == before
    made = open_artifact(str(tmp_path / "two"), "synthesize")
    assert made.manifest.counts["num_queries"] == len(read_queries(made.uri)) > 0


def test_a_model_that_cannot_write_is_refused_before_ray_starts(corpus, tmp_path):
    options = {"corpus": corpus.uri, "output": str(tmp_path / "queries"), "num_passages": 3}
    encoder = factories.tiny_encoder(tmp_path / "encoder")
    with pytest.raises(InputError, match="is a masked language model; give a causal language model"):
        synthesize(SynthesizeConfig.parse({**options, "model": str(encoder)}))
    headless = factories.tiny_decoder(tmp_path / "decoder", headless=True, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"lacks the weights .*lm_head.*give a causal language model"):
        synthesize(SynthesizeConfig.parse({**options, "model": str(headless)}))
