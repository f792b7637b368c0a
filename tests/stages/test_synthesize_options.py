"""The options of synthesize reach the endpoint that it asks."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from readapt_ray.artifacts import Artifact
from readapt_ray.errors import WorkerError
from readapt_ray.sources.judgements import read_queries
from readapt_ray.stages.synthesize import SynthesizeConfig, synthesize
from readapt_ray.synthesis import endpoint
from tests import factories
from tests.chat_endpoint import Endpoint, chat_endpoint

NUM_PASSAGES = 100


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with chat_endpoint() as made:
        yield made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("options") / "corpus"
    return factories.ingest_artifact(folder, factories.small_corpus(NUM_PASSAGES))


def written(corpus: Artifact, server: Endpoint, output: Path, **options: Any) -> Artifact:
    given = {"corpus": corpus.uri, "model": "writer", "endpoint": server.url, "output": str(output)}
    return synthesize(SynthesizeConfig(**given, **options))


def test_each_option_of_the_writing_reaches_the_endpoint(corpus: Artifact, server: Endpoint, tmp_path: Path) -> None:
    options = {"num_passages": 3, "queries_per_passage": 2, "max_query_tokens": 17, "temperature": 0.25}
    options |= {"prompt": "Ask: {passage}", "max_passage_chars": 80}

    def asked(seed: int) -> list[tuple[str, int]]:
        server.requests.clear()
        made = written(corpus, server, tmp_path / f"seed-{seed}", seed=seed, **options)
        assert made.manifest.counts["num_answers"] == made.manifest.counts["num_queries"] == 6
        ids = [query.query_id for query in read_queries(made.uri)]
        assert [each.rpartition(":")[2] for each in ids] == ["1", "2"] * 3
        assert len(set(ids)) == 6
        assert {(each["max_tokens"], each["temperature"]) for each in server.requests} == {(17, 0.25)}
        return [(each["messages"][0]["content"], each["seed"]) for each in server.requests]

    first, other = asked(5), asked(6)
    prompts = Counter(prompt for prompt, _ in first)
    assert set(prompts.values()) == {2}
    assert all(prompt.startswith("Ask: ") and 60 < len(prompt) <= 85 for prompt in prompts)
    assert len({seed for _, seed in first}) == 6
    assert {seed for _, seed in first}.isdisjoint(seed for _, seed in other)
    assert {prompt for prompt, _ in other} != prompts.keys()


def test_an_endpoint_that_answers_too_late_is_given_up(
    corpus: Artifact, server: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_MAX_RETRIES", 0)
    is_over = threading.Event()

    def late(number: int, _: dict[str, Any]) -> tuple[int, str]:
        is_over.wait(10)
        return 200, f"what is asked as number {number}"

    server.answer = late
    with pytest.raises(WorkerError, match="timed out"):
        written(corpus, server, tmp_path / "queries", num_passages=1, timeout_s=0.2)
    is_over.set()
