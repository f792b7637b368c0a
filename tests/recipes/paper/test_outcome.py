"""What a table says, from runs written by hand."""

import json
from pathlib import Path

import pytest

from readapt_ray.evaluation.runs import write_run
from readapt_ray.recipes.paper.outcome import write_outcome
from readapt_ray.recipes.paper.reproduction import Reproduction
from readapt_ray.records import ScoredDoc
from readapt_ray.sources.judgements import read_qrels
from tests.recipes.paper.test_experiments import config


def _write(reproduction: Reproduction, ranks: dict[tuple[str, int], int]) -> None:
    """Runs in which the answer of every query stands at the rank of (variant, seed)."""
    for own in reproduction.collections.values():
        qrels = read_qrels(f"{reproduction.corpus(own).uri}/qrels/test.parquet")
        for (name, seed), rank in ranks.items():
            variant = next(
                variant for each, variant in reproduction.steps("table1", seed) if each == own and variant.name == name
            )
            write_run(
                reproduction.run_file(own, variant, seed),
                (
                    ScoredDoc(qrel.query_id, qrel.doc_id if place == rank else f"other{place}", -place)
                    for qrel in qrels
                    for place in range(1, 11)
                ),
                tag="t",
            )


def test_a_table_has_means_over_seeds_tests_and_the_published_figures(tiny: Path, tmp_path: Path) -> None:
    reproduction = Reproduction(config(tiny, root=str(tmp_path), measure="MRR@10", seeds=[0, 1]))
    _write(reproduction, {("base", 0): 4, ("readapted", 0): 1, ("readapted", 1): 2})
    text = write_outcome(reproduction, "table1", (0, 1))
    result = json.loads((tmp_path / "table1.json").read_text())
    base, readapted, *_ = result["rows"]
    assert result["measure"] == "RR@10"
    assert base["mean"] == 0.25
    assert base["difference"] is None
    assert readapted["by_seed"] == [1.0, 0.5]
    assert readapted["mean"] == 0.75
    assert readapted["seed_deviation"] == pytest.approx(0.5 / 2**0.5)
    assert readapted["difference"] == 0.5
    assert readapted["p"] == 2 / 2**12 or readapted["p"] == pytest.approx(1 / 2**11, abs=1e-3)
    assert readapted["p_holm"] == pytest.approx(2 * readapted["p"])
    assert result["averages"]["all (2 corpora)"] == {"base": 0.25, "readapted": 0.75}
    assert result["combined"]["readapted"]["difference"] == pytest.approx(0.5)
    assert result["combined"]["readapted"]["p_value"] < readapted["p"]
    assert "readapted over all corpora at once: +50.00" in text
    row = next(line for line in text.splitlines() if line.startswith("| nfcorpus") and "| readapted |" in line)
    assert "| 75.00 | 35.36 | +50.00 |" in row
    assert "paper" not in text.splitlines()[4]


def test_what_was_published_of_a_known_retriever_stands_beside_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reproduction = Reproduction(config(tiny, root=str(tmp_path)))
    monkeypatch.setattr(reproduction, "known_as", "e5-mistral")
    _write(reproduction, {("base", 0): 4, ("readapted", 0): 1})
    text = write_outcome(reproduction, "table1", (0,))
    result = json.loads((tmp_path / "table1.json").read_text())
    assert [row["paper_score"] for row in result["rows"]] == [39.6, 40.8, 71.4, 73.3]
    assert result["rows"][1]["paper_gain"] == 1.2
    assert text.splitlines()[4].endswith("| paper | paper's gain | public score |")
    assert "| 40.8 | +1.2 |" in text


def test_one_query_has_no_test_and_says_nothing_of_it(tiny: Path, tmp_path: Path) -> None:
    reproduction = Reproduction(config(tiny, root=str(tmp_path), corpora=["nfcorpus"]))
    own = reproduction.collections["nfcorpus"]
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl"):
        (tmp_path / "beir" / name).write_bytes((tiny / "data/nfcorpus" / name).read_bytes())
    lines = (tiny / "data/nfcorpus/qrels/test.tsv").read_text().splitlines()[:2]
    (tmp_path / "beir/qrels/test.tsv").write_text("\n".join(lines) + "\n")
    reproduction = Reproduction(config(tiny, root=str(tmp_path), corpora=[f"nfcorpus={tmp_path}/beir"]))
    assert own.name == "nfcorpus"
    _write(reproduction, {("base", 0): 4, ("readapted", 0): 1})
    write_outcome(reproduction, "table1", (0,))
    row = json.loads((tmp_path / "table1.json").read_text())["rows"][1]
    assert (row["num_queries"], row["p"], row["p_holm"], row["interval"]) == (1, None, None, None)
