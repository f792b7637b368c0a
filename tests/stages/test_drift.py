"""What is measured without queries, against the vectors and the loss that are read here by other means."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from readapt_ray import cli
from readapt_ray.catalog.models import open_model
from readapt_ray.errors import CorpusError, InputError
from readapt_ray.stages.drift import DriftConfig, drift
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.stages.pack import PackConfig, pack
from readapt_ray.stages.train import TrainConfig, train
from readapt_ray.training.withheld_loss import losses
from tests import factories

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def world(tmp_path_factory, ray_session):
    root = tmp_path_factory.mktemp("drift")
    base = factories.tiny_decoder(root / "base")
    passages = factories.small_corpus(120)
    corpus = factories.ingest_artifact(root / "corpus", passages, num_files=2).uri
    blocks = pack(
        PackConfig(pretrained=str(base), corpus=corpus, output=str(root / "blocks"), block_tokens=64, withhold=6)
    )
    options = {"num_workers": 1, "num_cpus_per_worker": 1, "learning_rate": 5e-3, "dtype": "float32"}
    train(TrainConfig(pretrained=str(base), corpus=blocks.uri, output=str(root / "adapter"), **options))
    for seed, name in enumerate(("before", "after")):
        model = factories.write_contract(factories.tiny_decoder(root / f"{name}-model", headless=True, seed=seed))
        options = {"num_workers": 1, "dtype": "float32", "rows_per_shard": 50}
        embed(EmbedConfig(retriever=str(model), corpus=corpus, output=str(root / name), **options))
    return root, passages, blocks


def _config(root, **options):
    vectors = (str(root / "before"), str(root / "after"))
    return DriftConfig.parse({"adapter": str(root / "adapter"), "vectors": vectors, "dtype": "float32", **options})


def _vectors(root, name):
    table = pq.read_table(root / name / "vectors").sort_by("doc_id")
    return np.array(table["vector"].to_pylist(), np.float32)


@pytest.mark.slow
def test_withheld_passages_are_in_no_block_and_are_measured_before_and_after(world, tmp_path):
    root, passages, blocks = world
    withheld = blocks.manifest.details["withheld"]
    numbers = pq.read_table(root / "blocks/blocks")["passage_numbers"].combine_chunks().flatten().to_pylist()
    assert sorted(numbers + withheld) == list(range(len(passages)))
    assert blocks.manifest.counts["num_withheld_passages"] == len(withheld) == 6
    made = drift(_config(root, output=str(tmp_path / "drift")))
    found = json.loads((tmp_path / "drift/report.json").read_text())
    rows = pq.read_table(root / "corpus/passages").to_pylist()
    texts = [f"{rows[number]['title']} {rows[number]['text']}".strip() for number in withheld]
    import torch

    models = [open_model(str(root / name)) for name in ("base", "adapter")]
    options = {"objective": "causal_lm", "max_tokens": 64, "dtype": torch.float32, "device": torch.device("cpu")}
    before, after = losses(*models, texts, **options).mean(axis=1)
    assert found["loss"]["before"] == pytest.approx(before, rel=1e-4)
    assert found["loss"]["after"] == pytest.approx(after, rel=1e-4)
    assert found["loss"]["low"] < found["loss"]["difference"] < found["loss"]["high"]
    assert found["loss"]["difference"] < 0, "training on passages that are alike lowers the loss of others"

    one, other = _vectors(root, "before"), _vectors(root, "after")
    assert found["vectors"]["num_passages"] == 120
    assert found["vectors"]["mean_cosine"] == pytest.approx(float((one * other).sum(axis=1).mean()), abs=1e-5)

    def best(vectors):
        scores = vectors @ vectors.T
        np.fill_diagonal(scores, -np.inf)
        return np.argsort(-scores, axis=1, kind="stable")[:, :10]

    kept = np.mean([len({*a} & {*b}) / 10 for a, b in zip(best(one).tolist(), best(other).tolist(), strict=True)])
    assert found["vectors"]["neighbours_kept"] == pytest.approx(kept, abs=0.02)
    assert found["truncation"]["num_texts"] == 120
    text = (made.location / "report.md").read_text()
    assert f"{before:.4f} before, {after:.4f} after training" in text
    assert "No passage" not in text
    assert f"{found['vectors']['mean_cosine']:.4f} on average" in (made.location / "report.html").read_text()


def test_a_sample_is_as_large_as_asked_and_always_the_same(world, tmp_path):
    root, _, _ = world
    found = [
        drift(_config(root, output=str(tmp_path / name), num_passages=40)).manifest.details["vectors"] for name in "ab"
    ]
    assert found[0]["num_passages"] == 40
    assert found[0] == found[1]


def test_what_does_not_belong_together_is_refused(world, tmp_path):
    root, _, _ = world
    other = factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(30)).uri
    embed(
        EmbedConfig(retriever=str(root / "before-model"), corpus=other, output=str(tmp_path / "other"), num_workers=1)
    )
    vectors = (str(root / "before"), str(tmp_path / "other"))
    with pytest.raises(CorpusError, match="hold vectors of different corpora; embed one corpus with both models"):
        drift(_config(root, vectors=vectors, output=str(tmp_path / "drift")))
    with pytest.raises(InputError, match=r"vectors = .*; give two, before and after adaptation"):
        _config(root, vectors=("one",), output=str(tmp_path / "drift"))


@pytest.mark.slow
def test_without_withheld_passages_the_report_says_how_to_get_the_loss(world, tmp_path, capsys):
    root, _, _ = world
    blocks = pack(
        PackConfig(
            pretrained=str(root / "base"), corpus=str(root / "corpus"), output=str(tmp_path / "blocks"), block_tokens=64
        )
    )
    options = {"num_workers": 1, "num_cpus_per_worker": 1, "dtype": "float32", "batch_size": 60}
    train(TrainConfig(pretrained=str(root / "base"), corpus=blocks.uri, output=str(tmp_path / "adapter"), **options))
    arguments = ["--adapter", str(tmp_path / "adapter"), "--vectors", f"{root / 'before'},{root / 'after'}"]
    assert cli.main(["drift", *arguments, "--output", str(tmp_path / "drift")]) == 0
    assert (
        "not measured: no passage was withheld from training (`readapt train --withhold 200`)"
        in capsys.readouterr().out
    )
