"""finetune on real Ray Train workers, and the pairs that it makes."""

import json
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from transformers import AutoModel

from readapt_ray.catalog import models
from readapt_ray.cluster.step_metrics import read_metrics
from readapt_ray.errors import ArtifactMissingError, CorpusError
from readapt_ray.evaluation.runs import write_run
from readapt_ray.records import Qrel, ScoredDoc
from readapt_ray.stages.finetune import FinetuneConfig, finetune
from readapt_ray.storage import Location
from readapt_ray.training import labelled_pairs
from tests import factories

PASSAGES = factories.small_corpus(120)
QUERIES, QRELS = factories.small_queries(PASSAGES, 40)
SEVERAL = [Qrel(qrel.query_id, PASSAGES[number].doc_id, 1) for number, qrel in enumerate(QRELS[:5], 60)]
"""Second answers: one is that of another query, too."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = factories.tiny_decoder(tmp_path_factory.mktemp("finetune") / "base")
    return factories.write_contract(folder, pooling="last", add_bos=True, add_eos=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune-corpus") / "corpus"
    factories.ingest_artifact(folder, PASSAGES, QUERIES, QRELS, split="train")
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune-several") / "corpus"
    factories.ingest_artifact(folder, PASSAGES, QUERIES, [*QRELS, *SEVERAL], split="train")
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(400)
def test_it_learns_and_two_workers_with_cached_gradients_equal_one_with_none(
    base: Path, several: Path, tmp_path: Path
) -> None:
    for count, micro_batch_tokens in ((1, 16384), (2, 100)):
        artifact = finetune(
            FinetuneConfig(
                model=str(base),
                corpus=str(several),
                output=str(tmp_path / f"r{count}"),
                batch_size=10,
                micro_batch_tokens=micro_batch_tokens,
                num_epochs=6,
                learning_rate=5e-3,
                both_directions=True,
                dtype="float32",
                num_workers=count,
                num_cpus_per_worker=1,
            )
        )
        assert artifact.manifest.counts["num_pairs"] == 270
    losses = [row["loss"] for row in read_metrics(artifact.location)]
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.3
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("r1", "r2"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 5e-3
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(tmp_path / "r1"))
    assert peft.get_peft_model_state_dict(model).keys() == one.keys()


def pairs_of(
    source: labelled_pairs.PairSource, base: Path, target: Path, num_negatives: int = 1
) -> list[dict[str, Any]]:
    model = models.open_model(str(base))
    encoding = model.encoding
    labelled_pairs.write_pairs(source, model, encoding, Location(str(target)), num_negatives=num_negatives)
    return list(pq.read_table(target).to_pylist())


def text_of(base: Path, ids: list[int]) -> str:
    return str(models.open_model(str(base)).tokenizer.decode(ids, skip_special_tokens=True))


def test_judged_pairs_take_the_best_passages_of_a_run_that_are_not_right(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    right = {qrel.query_id: qrel.doc_id for qrel in QRELS}
    found = []
    for query in QUERIES[:30]:
        ranked = [right[query.query_id], "d00007", "nowhere", "d00008"]
        found += [ScoredDoc(query.query_id, doc_id, float(-rank)) for rank, doc_id in enumerate(ranked)]
    write_run(str(tmp_path / "hard.trec"), found, tag="t")
    source = labelled_pairs.open_pairs(str(corpus), "train", str(tmp_path / "hard.trec"))
    rows = pairs_of(source, base, tmp_path / "pairs.parquet", num_negatives=3)
    assert [row["doc_id"] for row in rows] == [qrel.doc_id for qrel in QRELS]
    texts = {each.doc_id: each.text for each in PASSAGES}
    assert [len(row["negative_ids"]) for row in rows] == [2] * 30 + [0] * 10, (
        "a doc_id that is not in the corpus is left out"
    )
    for doc_id, ids in zip(("d00007", "d00008"), rows[0]["negative_ids"], strict=True):
        assert texts[doc_id][:40] in text_of(base, ids), "cut at the longest passage of the contract"
    assert QUERIES[0].text in text_of(base, rows[0]["query_ids"])
    numbers = {row["doc_id"]: row["doc_number"] for row in rows}
    assert len(set(numbers.values())) == len(numbers)
    assert not set(rows[0]["negative_numbers"]) & {rows[0]["doc_number"]}


def test_pairs_of_one_query_have_one_number(base: Path, several: Path, tmp_path: Path) -> None:
    rows = pairs_of(labelled_pairs.open_pairs(str(several), "train", None), base, tmp_path / "pairs.parquet")
    texts = {query.query_id: query.text for query in QUERIES}
    by_text: dict[str, set[int]] = {}
    for qrel, row in zip([*QRELS, *SEVERAL], rows, strict=True):
        by_text.setdefault(texts[qrel.query_id], set()).add(row["query_number"])
    assert all(len(numbers) == 1 for numbers in by_text.values())
    assert len({row["query_number"] for row in rows}) == len(by_text)


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def test_a_file_of_pairs_with_negatives(base: Path, tmp_path: Path) -> None:
    shared = "the same answer"
    file = jsonl(
        tmp_path / "pairs.jsonl",
        {"query": "what is an array", "positive": shared, "negatives": ["no answer", "nor this"]},
        "",
        {"query": "and a shape", "positive": shared},
        {"query": "and a dtype", "positive": "another answer", "negatives": [shared]},
    )
    rows = pairs_of(labelled_pairs.open_pairs(file, "train", None), base, tmp_path / "pairs.parquet")
    assert [len(row["negative_ids"]) for row in rows] == [2, 0, 1]
    assert rows[0]["doc_number"] == rows[1]["doc_number"] == rows[2]["negative_numbers"][0] != rows[2]["doc_number"]
    assert [row["doc_id"] for row in rows] == ["line 1", "line 3", "line 4"]
    assert "nor this" in text_of(base, rows[0]["negative_ids"][1])


def test_texts_that_are_one_to_the_model_have_one_number(base: Path, tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "pairs.jsonl",
        {"query": "what is it", "positive": "array", "title": "numpy"},
        {"query": "what is it", "positive": "numpy array"},
        {"query": "and this", "positive": "array", "negatives": ["numpy array"]},
    )
    rows = pairs_of(labelled_pairs.open_pairs(file, "train", None), base, tmp_path / "pairs.parquet")
    assert text_of(base, rows[0]["passage_ids"]) == text_of(base, rows[1]["passage_ids"])
    assert rows[0]["doc_number"] == rows[1]["doc_number"] == rows[2]["negative_numbers"][0] != rows[2]["doc_number"]
    assert rows[0]["query_number"] == rows[1]["query_number"] != rows[2]["query_number"]


def test_lines_end_at_newlines_alone(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    odd = "a\u2028b\x85c\u2029d"
    lines = [json.dumps({"query": odd, "positive": "x"}, ensure_ascii=False), '{"query": "q", "positive": "p"}']
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    rows = pairs_of(labelled_pairs.open_pairs(str(file), "train", None), base, tmp_path / "pairs.parquet")
    assert len(rows) == 2
    assert odd in text_of(base, rows[0]["query_ids"])
    file.write_bytes(b'{"query": "q", "positive": "\xff"}\n')
    with pytest.raises(CorpusError, match=r"pairs\.jsonl:1 is no pair: it is not UTF-8"):
        pairs_of(labelled_pairs.open_pairs(str(file), "train", None), base, tmp_path / "pairs.parquet")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 2 is no pair"),
        ({"query": "only"}, r"line 2 is no pair \(KeyError\('positive'\)\)"),
        ("[1, 2]", "line 2 is no pair"),
        ({"query": "q", "positive": ""}, "line 2: query, positive and negatives must be texts"),
        ({"query": "q", "positive": "p", "negatives": [3]}, "line 2: query, positive and negatives must be texts"),
        ({"query": "q", "positive": "p", "negatives": "one"}, "line 2: negatives must be a list"),
    ],
)
def test_a_line_that_is_no_pair_is_named(base: Path, tmp_path: Path, row: Any, message: str) -> None:
    file = jsonl(tmp_path / "pairs.jsonl", {"query": "q", "positive": "p"}, row)
    with pytest.raises(CorpusError, match=message):
        pairs_of(labelled_pairs.open_pairs(file, "train", None), base, tmp_path / "pairs.parquet")


@pytest.mark.usefixtures("ray_session")
def test_bad_sources_are_refused_before_any_work(base: Path, corpus: Path, tmp_path: Path) -> None:
    def attempt(**options: Any) -> None:
        finetune(
            FinetuneConfig(**{"model": str(base), "corpus": str(corpus), "output": str(tmp_path / "x"), **options})
        )

    with pytest.raises(CorpusError, match=r"no qrels of the split 'dev'; it has \['train'\]"):
        attempt(split="dev")
    with pytest.raises(ArtifactMissingError, match="does not exist"):
        attempt(corpus=str(tmp_path / "absent"))
    with pytest.raises(CorpusError, match="no run"):
        attempt(negatives=str(tmp_path / "absent.trec"))
    one = jsonl(tmp_path / "one.jsonl", {"query": "q", "positive": "p"})
    with pytest.raises(CorpusError, match="put them into its lines"):
        attempt(corpus=one, negatives="some.trec")
    with pytest.raises(CorpusError, match="has 1 pair of query and positive; at least 2"):
        attempt(corpus=one)
