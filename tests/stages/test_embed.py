import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import readapt_ray as ra
from readapt_ray import dead_rows
from readapt_ray.artifacts import read_lease, read_manifest
from readapt_ray.catalog.models import open_model
from readapt_ray.catalog.shapes import model_shape
from readapt_ray.cluster import on_worker, shard_runner
from readapt_ray.cluster.placement import Placement
from readapt_ray.errors import (
    ArtifactConflictError,
    ArtifactMissingError,
    CorpusError,
    CorruptFileError,
    FingerprintMismatchError,
    InputError,
    ModelError,
    PlacementError,
    WorkerError,
)
from readapt_ray.records import Passage, vector_schema
from readapt_ray.retrieval import shard_ledger
from readapt_ray.retrieval.encoder import Encoder, suitable_dtype
from readapt_ray.retrieval.encoder_fingerprint import encoder_fingerprint
from readapt_ray.retrieval.encoder_sizes import TextSize, shard_rows
from readapt_ray.retrieval.shard_ledger import COUNTS, SECONDS
from readapt_ray.retrieval.shard_plan import plan_shards
from readapt_ray.retrieval.vector_files import RowRange, iterate_vectors, read_footer
from readapt_ray.stages import embed as stage
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.storage import Location
from tests import factories

NUM_PASSAGES = 200
ROWS_PER_SHARD = 30


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A corpus in three files, two models, and the vectors of the first."""
    root = tmp_path_factory.mktemp("embed")
    passages = factories.small_corpus(NUM_PASSAGES)
    passages[6] = passages[3]._replace(doc_id="d00006")  # next to each other in the first file
    factories.ingest_artifact(root / "corpus", passages, num_files=3)
    for name, seed in (("model", 0), ("other", 1)):
        factories.write_contract(factories.tiny_decoder(root / name, headless=True, seed=seed))
    return root, passages


@pytest.fixture(scope="module")
def vectors(world, ray_session):
    root, _ = world
    return embed(_config(root, "vectors"))


def _config(root, output, **options):
    values = {"retriever": str(root / "model"), "corpus": str(root / "corpus"), "output": str(root / output)}
    values |= {"rows_per_shard": ROWS_PER_SHARD, "num_workers": 1, "dtype": "float32"}
    return EmbedConfig.parse(values | options)


def _files(root, output):
    return {path.name: path.stat().st_mtime_ns for path in sorted((root / output / "vectors").glob("part-*.parquet"))}


def _read(root, output):
    files = Location(str(root / output / "vectors")).files(".parquet")
    table = pa.concat_tables(map(dead_rows.read_table, files))
    return dict(zip(table["doc_id"].to_pylist(), np.array(table["vector"].to_pylist(), np.float32), strict=True)), table


def test_every_passage_stands_once_with_its_vector(world, vectors):
    root, passages = world
    found, table = _read(root, "vectors")
    assert table.num_rows == len(found) == NUM_PASSAGES
    assert table.schema.remove_metadata() == vector_schema(32, "float32")
    encoder = Encoder.load(open_model(str(root / "model")))
    texts, titles = [each.text for each in passages], [each.title for each in passages]
    expected = encoder.encode(texts, "passage", titles)
    np.testing.assert_allclose([found[each.doc_id] for each in passages], expected, atol=1e-5)
    manifest = vectors.manifest
    assert manifest.counts["num_vectors"] == NUM_PASSAGES
    lengths = list(map(len, encoder.tokenize(texts, "passage", titles)))
    assert manifest.counts["num_tokens"] == sum(lengths) - lengths[6]
    work = manifest.details["work"]
    assert (work["num_encoded"], work["num_copied"]) == (NUM_PASSAGES - 1, 0)
    assert 0 <= work["waiting_share"] < 1 and 0 <= work["padding_share"] < 0.2 and work["encoder_seconds"] > 0
    files = sorted((root / "vectors/vectors").iterdir())
    assert manifest.counts["num_bytes"] == sum(path.stat().st_size for path in files)
    assert [path.name for path in files] == [f"part-{number:05d}.parquet" for number in range(7)]
    described = {"model": str(root / "model"), "dimension": 32, "dtype": "float32"}
    described |= {"fingerprint": encoder.fingerprint, "encoding": encoder.encoding.model_dump(mode="json")}
    assert manifest.details["encoder"] == described
    for path in files:
        assert json.loads(pq.read_schema(path).metadata[b"readapt"])["encoder"] == described


@pytest.mark.gpu
@pytest.mark.usefixtures("ray_session")
def test_an_actor_on_a_gpu_makes_the_cpus_vectors_in_bfloat16(world):
    root, passages = world
    made = embed(_config(root, "on-gpu", dtype="auto", num_workers=None))
    assert made.manifest.details["encoder"]["dtype"] == "bfloat16"
    assert made.manifest.details["work"]["padding_share"] == 0
    encoder = Encoder.load(open_model(str(root / "model")), device="cpu")
    expected = encoder.encode([each.text for each in passages], "passage", [each.title for each in passages])
    found, _ = _read(root, "on-gpu")
    ours = np.stack([found[each.doc_id] for each in passages])
    assert (ours * expected).sum(axis=1).min() > 0.999


def test_embedding_again_does_nothing_and_another_model_is_refused(world, vectors):
    root, _ = world
    before = _files(root, "vectors")
    assert embed(_config(root, "vectors", batch_tokens=77, num_workers=2)).fingerprint == vectors.fingerprint
    spelled_out = open_model(str(root / "model")).encoding.model_dump()
    assert embed(_config(root, "vectors", encoding=spelled_out)).fingerprint == vectors.fingerprint
    for options in ({"retriever": str(root / "other")}, {"encoding": spelled_out | {"pooling": "mean"}}):
        with pytest.raises(ArtifactConflictError, match=next(iter(options))):
            embed(_config(root, "vectors", **options))
    with pytest.raises(ArtifactConflictError, match="vector_dtype: 'float32' there, 'float16' now"):
        embed(_config(root, "vectors", vector_dtype="float16"))
    assert _files(root, "vectors") == before


def test_only_missing_and_damaged_shards_are_computed_again(world, vectors):
    root, _ = world
    shutil.copytree(root / "vectors", root / "resumed")
    manifest = json.loads((root / "resumed/manifest.json").read_text())
    (root / "resumed/manifest.json").unlink()
    _leave_unfinished(root / "resumed", manifest)
    (root / "resumed/shards.parquet").unlink()
    folder = root / "resumed/vectors"
    (folder / "part-00001.parquet").unlink()
    (folder / "part-00004.parquet").write_bytes((folder / "part-00004.parquet").read_bytes()[:-50])
    wrong = pq.read_table(folder / "part-00005.parquet").replace_schema_metadata({b"readapt": b"{}"})
    pq.write_table(wrong, folder / "part-00005.parquet")
    before = _files(root, "resumed")
    again = embed(_config(root, "resumed"))
    after = _files(root, "resumed")
    assert {name for name in after if after[name] != before.get(name)} == {f"part-{n:05d}.parquet" for n in (1, 4, 5)}
    assert again.manifest.counts == vectors.manifest.counts
    one, other = _read(root, "vectors")[0], _read(root, "resumed")[0]
    assert one.keys() == other.keys()
    np.testing.assert_array_equal([one[key] for key in one], [other[key] for key in one])


def _leave_unfinished(folder, manifest):
    """What a process that was killed leaves: its building.json."""
    state = {name: manifest[name] for name in ("stage", "fingerprint", "config", "inputs", "seconds")}
    state |= {
        "host": "",
        "boot": "",
        "pid": 0,
        "process_started": 0,
        "started": 0,
        "heartbeat": 0,
        "owner": "",
        "is_over": True,
    }
    (folder / "building.json").write_text(json.dumps(state | {"seconds_before": 0}))


_DRIVER = """
import sys
from readapt_ray.stages.embed import EmbedConfig, embed
embed(EmbedConfig(
    retriever=sys.argv[1], corpus=sys.argv[2], output=sys.argv[3], dtype="float32", rows_per_shard=2, num_workers=1
))
"""


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_killed_driver_is_gone_on_from(world, ray_session):
    import ray

    root, passages = world
    config = _config(root, "killed", rows_per_shard=2)
    environment = {name: value for name, value in os.environ.items() if name != "READAPT_NUM_CPUS"}
    environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, config.retriever, config.corpus, config.output],
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    try:
        deadline = time.monotonic() + 300
        while len(_files(root, "killed")) < 10:
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        driver.kill()
        driver.wait()
    before = _files(root, "killed")
    assert 10 <= len(before) < 100, "the driver was to be killed halfway"
    assert read_manifest(config.output) is None and read_lease(config.output) is not None
    artifact = embed(config)
    after = _files(root, "killed")
    assert len(after) == 100 and {name: after[name] for name in before} == before
    found, table = _read(root, "killed")
    assert table.num_rows == NUM_PASSAGES and found.keys() == {each.doc_id for each in passages}
    assert artifact.manifest.counts["num_vectors"] == NUM_PASSAGES


def test_a_killed_actor_is_started_again(world, ray_session, caplog, monkeypatch):
    """With relative names too, which mean something else in the folder that the workers run in."""
    root, passages = world
    monkeypatch.chdir(root)
    killed = []

    def kill() -> None:
        while len(_files(root, "actor")) < 5:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            if process.name().startswith("ray::MapWorker"):
                process.kill()
                killed.append(process.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    artifact = embed(_config(Path(), "actor", rows_per_shard=2))
    thread.join()
    assert killed and "the actors are started again for what is left" in caplog.text
    found, table = _read(root, "actor")
    assert table.num_rows == NUM_PASSAGES and found.keys() == {each.doc_id for each in passages}
    assert artifact.manifest.counts["num_vectors"] == NUM_PASSAGES


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_node_costs_nothing_but_time(world, tmp_path):
    """A Ray cluster of its own in another process, since this one has its session."""
    root, passages = world
    config = _config(root, tmp_path / "node", rows_per_shard=1)
    values = {"config": config.model_dump(mode="json") | {"num_workers": 2}, "done": 20}
    environment = {name: value for name, value in os.environ.items() if name not in ("READAPT_NUM_CPUS", "RAY_ADDRESS")}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.stages.node_killer", json.dumps(values)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    told = json.loads(finished.stdout.splitlines()[-1])
    after = _files(tmp_path, "node")
    assert 20 <= len(told["before"]) < len(after)
    assert {name: after[name] for name in told["before"]} == told["before"]
    found, table = _read(tmp_path, "node")
    assert table.num_rows == NUM_PASSAGES and found.keys() == {each.doc_id for each in passages}


def test_only_new_and_changed_passages_are_encoded(world, vectors, tmp_path, caplog):
    """One file of the corpus has no digests, as those of older releases."""
    root, passages = world
    caplog.set_level("INFO", "readapt_ray")
    now = [each for each in passages if each.doc_id not in ("d00001", "d00002")]
    now[10] = now[10]._replace(text="a thread waits for the lock")
    now[20] = now[20]._replace(doc_id="renamed")
    now += [factories.small_corpus(3, seed=9)[number]._replace(doc_id=f"new{number}") for number in range(3)]
    factories.ingest_artifact(tmp_path / "corpus", now[::-1], num_files=2)
    older = tmp_path / "corpus/passages/part-00001.parquet"
    pq.write_table(pq.read_table(older).drop_columns(["content_hash"]), older)
    options = {"corpus": str(tmp_path / "corpus"), "rows_per_shard": 50}
    made = embed(_config(root, tmp_path / "incremental", previous=str(root / "vectors"), **options))
    assert made.manifest.details["changes"] == {
        "num_unchanged": 196,
        "num_changed": 1,
        "num_new": 4,
        "num_deleted": 3,
    }
    assert "196 unchanged, 1 changed, 4 new, 3 deleted" in caplog.text
    assert made.manifest.details["work"]["num_encoded"] == 4
    assert made.manifest.details["work"]["num_copied"] == 197
    plain = pq.read_table(tmp_path / "incremental/vectors")
    assert plain.num_rows == 201 + made.manifest.details["num_dead"], "plain pyarrow sees dead rows, too"
    found, table = _read(tmp_path, "incremental")
    again = ra.open_artifact(made.uri)
    assert again.to_arrow().num_rows == again.to_ray().count() == 201
    earlier, _ = _read(root, "vectors")
    assert table.num_rows == len(found) == 201 and found.keys() == {each.doc_id for each in now}
    copied = [each.doc_id for each in now if each.doc_id in earlier and each.doc_id != now[10].doc_id]
    np.testing.assert_array_equal([found[each] for each in copied], [earlier[each] for each in copied])
    encoder = Encoder.load(open_model(str(root / "model")))
    expected = encoder.encode([each.text for each in now], "passage", [each.title for each in now])
    np.testing.assert_allclose([found[each.doc_id] for each in now], expected, atol=1e-5)


def test_vectors_of_another_encoder_are_not_copied_from(world, vectors, tmp_path):
    root, _ = world
    previous = str(root / "vectors")
    for options, named in (
        ({"retriever": str(root / "other")}, "was made by another encoder"),
        ({"dtype": "bfloat16"}, "in float32, .* in bfloat16"),
        ({"dimensions": 8}, "was made by another encoder"),
        ({"vector_dtype": "int8"}, "stores its vectors in float32"),
    ):
        with pytest.raises(FingerprintMismatchError, match=named):
            embed(_config(root, tmp_path / "out", previous=previous, **options))
    assert not (tmp_path / "out").exists()


def test_a_sample_says_what_a_full_run_takes_and_changes(world, vectors, tmp_path, caplog):
    caplog.set_level("INFO", "readapt_ray")
    root, passages = world
    shutil.copytree(root / "vectors", tmp_path / "earlier")
    options = {"sample": "100%"}
    made = embed(_config(root, tmp_path / "out", **options))
    assert made.uri == f"{tmp_path}/out-sample" and not (tmp_path / "out").exists()
    details = made.manifest.details
    assert (details["num_passages"], details["num_to_encode"]) == (NUM_PASSAGES, NUM_PASSAGES)
    assert details["tokens"]["estimate"] == pytest.approx(vectors.manifest.counts["num_tokens"])
    assert 0 < details["tokens"]["plus_minus"] < details["tokens"]["estimate"]
    encoder_s = details["hours"]["estimate"] * 3600
    found = [json.loads(pq.read_schema(path).metadata[b"readapt"]) for path in Path(made.uri).glob("vectors/*")]
    assert encoder_s == pytest.approx(sum(float(each["encode_s"]) for each in found))
    written = sum(path.stat().st_size for path in Path(made.uri).glob("vectors/*"))
    assert details["bytes"] == pytest.approx(written, abs=1)
    assert "a full run would encode 200 of 200 passages" in caplog.text
    same = embed(_config(root, tmp_path / "same", previous=str(tmp_path / "earlier"), **options))
    assert same.manifest.details["num_to_encode"] == 0 and "every passage has its vector already" in caplog.text
    other = _config(root, tmp_path / "x", retriever=str(root / "other"), previous=str(tmp_path / "earlier"), **options)
    neighbours = embed(other).manifest.details["neighbours"]
    assert neighbours["num_compared"] == 200
    assert neighbours["overlap_at_10"] == pytest.approx(_overlap_by_hand(root, passages), abs=0.01)
    assert f"{100 * neighbours['overlap_at_10']:.1f}% (+- " in caplog.text
    for spec in ("0%", "101%", "-3", "1.5", "some"):
        with pytest.raises(InputError, match="give a share such as 1%"):
            embed(_config(root, tmp_path / "bad", sample=spec))


def _overlap_by_hand(root, passages):
    """Of the ten nearest of each passage, the mean share that both models agree on."""
    nearest = []
    for name in ("model", "other"):
        encoder = Encoder.load(open_model(str(root / name)))
        vectors = encoder.encode([each.text for each in passages], "passage", [each.title for each in passages])
        scores = vectors @ vectors.T
        np.fill_diagonal(scores, -np.inf)
        nearest.append([set(row[:10]) for row in np.argsort(-scores, axis=1)])
    return np.mean([len(one & other) / 10 for one, other in zip(*nearest, strict=True)])


def test_a_text_is_encoded_once_in_a_shard(world, ray_session, tmp_path):
    root, _ = world
    passages = factories.small_corpus(90)
    for place in (10, 11, 20, 89):
        passages[place] = passages[3]._replace(doc_id=f"twin{place}")
    factories.ingest_artifact(tmp_path / "corpus", passages, num_files=1)
    made = embed(_config(root, tmp_path / "out", corpus=str(tmp_path / "corpus"), vector_dtype="int8", dimensions=8))
    assert made.manifest.details["work"]["num_encoded"] == 87  # the copy in the last shard is encoded again
    assert made.manifest.details["encoder"]["dimension"] == 8
    parts = [pq.read_table(path) for path in sorted((tmp_path / "out/vectors").iterdir())]
    assert [part.num_rows for part in parts] == [30, 30, 30]
    assert all(part["doc_id"].to_pylist() == sorted(part["doc_id"].to_pylist()) for part in parts)
    folder = Location(str(tmp_path / "out/vectors"))
    read = [each for path in sorted((tmp_path / "out/vectors").iterdir()) for each in _pairs(folder, path)]
    found = dict(read)
    assert len(read) == len(found) == 90
    whole = Encoder.load(open_model(str(root / "model"))).encode(
        [each.text for each in passages], "passage", [each.title for each in passages]
    )
    cut = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    stored = np.stack([found[each.doc_id] for each in passages])
    assert np.abs(stored - cut).max() <= np.abs(cut).max() / 254 + 1e-6
    np.testing.assert_array_equal(found["twin20"], found[passages[3].doc_id])


def _pairs(folder, path):
    rows = RowRange(path.name, 0, read_footer(folder / path.name).num_rows)
    return [pair for doc_ids, part in iterate_vectors(folder, [rows]) for pair in zip(doc_ids, part, strict=True)]


def test_auto_is_what_suits_the_device_and_what_the_output_was_begun_with(world, vectors, tmp_path, monkeypatch):
    root, _ = world
    assert embed(_config(root, "vectors", dtype="auto")).fingerprint == vectors.fingerprint
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True})
    assert suitable_dtype("cpu") == "bfloat16"
    shutil.copytree(root / "vectors", tmp_path / "begun")
    state = json.loads((tmp_path / "begun/manifest.json").read_text())
    assert state["config"]["dtype"] == "float32"
    (tmp_path / "begun/manifest.json").unlink()
    _leave_unfinished(tmp_path / "begun", state)
    made = embed(_config(root, tmp_path / "begun", dtype="auto"))
    assert made.fingerprint == vectors.fingerprint
    assert made.manifest.details["encoder"]["dtype"] == "float32"
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    assert suitable_dtype("cpu") == "float32"


def test_a_corpus_that_changes_meanwhile_is_found_out(world, ray_session, tmp_path, monkeypatch):
    """Its files are replaced after the plan, by ones of as many rows; they have no digests, as those of older releases."""
    root, _ = world
    factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(40))
    plan = stage.plan_shards

    def replace_then_plan(counts, rows_per_shard):
        path = tmp_path / "corpus/passages/part-00000.parquet"
        table = pq.read_table(path)
        texts = [f"{text} again" if place == 33 else text for place, text in enumerate(table["text"].to_pylist())]
        pq.write_table(table.set_column(2, "text", [texts]).drop_columns(["content_hash"]), path)
        return plan(counts, rows_per_shard)

    monkeypatch.setattr(stage, "plan_shards", replace_then_plan)
    with pytest.raises(CorpusError, match="was replaced while it was embedded"):
        embed(_config(root, tmp_path / "out", corpus=str(tmp_path / "corpus")))
    assert read_manifest(str(tmp_path / "out")) is None


def test_a_text_that_is_not_the_one_ingested_is_found_by_its_digest(world, ray_session, tmp_path):
    root, _ = world
    factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(40))
    path = tmp_path / "corpus/passages/part-00000.parquet"
    table = pq.read_table(path)
    texts = [f"{text} again" if place == 33 else text for place, text in enumerate(table["text"].to_pylist())]
    pq.write_table(table.set_column(2, "text", [texts]), path)
    config = _config(root, tmp_path / "out", corpus=str(tmp_path / "corpus"))
    with pytest.raises(CorpusError, match="passage 'd00033' was altered after it was ingested"):
        embed(config)


def test_errors_of_actors_come_out_as_our_own(world, ray_session, tmp_path):
    root, _ = world
    broken = tmp_path / "broken"
    shutil.copytree(root / "model", broken)
    tensors = factories.read_tensors(broken)
    tensors["norm.weight"][:] = float("nan")
    factories.write_tensors(broken, tensors)
    config = _config(root, tmp_path / "out", retriever=str(broken), max_left_out=3)
    with pytest.raises(CorpusError, match=r"the vector of 'd\d+' holds NaN") as caught:
        embed(config)
    assert caught.value.exit_code == 2 and "Traceback" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.parquet"))


@pytest.mark.slow
def test_passages_without_a_vector_are_left_out_counted_and_named(ray_session, tmp_path, caplog):
    """The last shard has two passages, and no vector is left of it."""
    caplog.set_level("WARNING", "readapt_ray")
    passages = [*factories.small_corpus(30), Passage("bad", "", "the file ÿ"), Passage("worse", "", "ÿ the path")]
    factories.ingest_artifact(tmp_path / "corpus", passages)
    model = factories.write_contract(factories.tiny_decoder(tmp_path / "model", headless=True))
    tensors = factories.read_tensors(model)
    tensors["embed_tokens.weight"][factories.decoder_tokenizer()("ÿ")["input_ids"][-1]] = float("nan")
    factories.write_tensors(model, tensors)
    values = {"retriever": str(model), "corpus": str(tmp_path / "corpus"), "output": str(tmp_path / "out")}
    config = EmbedConfig.parse(values | {"rows_per_shard": 10})
    with pytest.raises(CorpusError, match="2 of 2 passages are like it, and max_left_out = 1"):
        embed(config.model_copy(update={"max_left_out": 1}))
    made = embed(config)
    assert made.manifest.counts["num_vectors"] == 30
    assert sorted(made.manifest.details["left_out"]) == ["bad", "worse"]
    assert "left out, since their vectors are NaN" in caplog.text and "'bad', 'worse'" in caplog.text
    doc_ids = pq.read_table(tmp_path / "out/vectors")["doc_id"].to_pylist()
    assert sorted(doc_ids) == [each.doc_id for each in passages[:30]]
    _left_out_again(config, made, tmp_path)
    sample = embed(config.model_copy(update={"sample": "100%"}))
    assert sample.manifest.counts["num_vectors"] == 30 and sample.manifest.details["tokens"]["estimate"] > 0


def _left_out_again(config, made, tmp_path):
    """Resume from the ledger and from the footers: nothing is computed again, and the manifest says the same."""
    before = _files(tmp_path, "out")
    for forgotten in ((), ("shards.parquet",)):
        _leave_unfinished(tmp_path / "out", json.loads((tmp_path / "out/manifest.json").read_text()))
        for name in ("manifest.json", *forgotten):
            (tmp_path / "out" / name).unlink()
        again = embed(config).manifest
        assert again.counts == made.manifest.counts and again.details == made.manifest.details
        assert _files(tmp_path, "out") == before


@pytest.fixture
def no_ray(monkeypatch):
    from readapt_ray.cluster import connection

    monkeypatch.setattr(connection, "connect", lambda: pytest.fail("Ray was started"))


def _damaged(root, folder, change):
    """A copy of the corpus artifact whose first passages file was changed."""
    shutil.copytree(root / "corpus", folder)
    change(folder / "passages/part-00000.parquet")
    return {"corpus": str(folder)}


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _without_title(path):
    pq.write_table(pq.read_table(path).drop_columns(["title"]), path)


def _twice(path):
    shutil.copy(path, path.with_name("part-00001.parquet"))


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda root, new: {"corpus": str(new)}, ArtifactMissingError, "does not exist"),
        (lambda root, new: {"corpus": str(root / "model")}, ArtifactMissingError, "readapt ingest"),
        (lambda root, new: {"retriever": str(root / "corpus")}, ModelError, "is not a model"),
        (lambda root, new: {"retriever": "nothing-like-this"}, ModelError, "no model 'nothing-like-this'"),
        (lambda root, new: {"encoding": str(new)}, InputError, "no file"),
        (lambda root, new: _damaged(root, new, _cut), CorruptFileError, "part-00000.parquet was cut short"),
        (lambda root, new: _damaged(root, new, _without_title), CorpusError, r"lacks the columns \['title'\]"),
        (
            lambda root, new: _damaged(root, new, _twice),
            CorpusError,
            r"part-00001.parquet is a copy of part-00000.parquet, so its doc_ids occur twice",
        ),
        (
            lambda root, new: _damaged(root, new, lambda path: path.unlink()),
            CorruptFileError,
            "passages holds 133 passages, and its manifest says 200; copy the folder again and whole",
        ),
        (
            lambda root, new: {"corpus": factories.ingest_artifact(new, []).uri},
            CorpusError,
            "has no passages",
        ),
    ],
)
@pytest.mark.usefixtures("no_ray")
def test_bad_input_is_found_before_any_worker_starts(world, tmp_path, make, error, named):
    root, _ = world
    with pytest.raises(error, match=named):
        embed(_config(root, tmp_path / "out", **make(root, tmp_path / "new")))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "readapt.json").unlink(), "no pooling or prompt settings"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: factories.write_contract(folder, max_passage_tokens=2), "max_passage_tokens = 2"),
    ],
)
@pytest.mark.usefixtures("no_ray")
def test_a_model_that_cannot_encode_is_found_before_any_worker_starts(world, tmp_path, change, named):
    root, _ = world
    shutil.copytree(root / "model", tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(InputError, match=named):
        embed(_config(root, tmp_path / "out", retriever=str(tmp_path / "model")))
    assert not (tmp_path / "out").exists()


def test_more_than_the_cluster_has_is_refused(world, ray_session, tmp_path):
    root, _ = world
    for options, asked in (
        ({"num_workers": 50}, "50 actors of 1 CPU each cannot be placed: there is room for 2"),
        ({"num_workers": 2, "num_cpus_per_worker": 2}, "2 actors of 2 CPU each cannot be placed: there is room for 1"),
    ):
        with pytest.raises(PlacementError, match=f"{asked} on 1 node with 2 CPU; lower num_workers"):
            embed(_config(root, tmp_path / "out", **options))


def test_a_shard_is_some_45_seconds_of_a_devices_work_and_fits_its_memory():
    """E5-Mistral by hand: 14.2 GFLOP per token, 80 tokens, 450 TFLOP/s: 45 s are 17,800 passages."""
    shape = model_shape("e5-mistral")
    text = TextSize(80, 320)
    large = 10**9
    assert shard_rows(large, text, shape, 1024, on_gpus=True) == pytest.approx(17_800, rel=0.03)
    assert shard_rows(large, text, shape, 4096, on_gpus=True) == (256 << 20) / (4 * 4096)
    assert shard_rows(large, TextSize(80, 100_000), shape, 1024, on_gpus=True) == (256 << 20) // 100_000
    assert shard_rows(large, text, shape, 1024, on_gpus=False) == 256
    assert shard_rows(32_000, text, shape, 1024, on_gpus=True) == 1000
    assert shard_rows(10, text, shape, 1024, on_gpus=True) == 256
    assert shard_rows(large, TextSize(4, 40), replace(shape, num_layers=1), 16, on_gpus=True) == 1 << 18


def test_an_output_keeps_the_size_of_shards_that_it_was_begun_with(world, ray_session, tmp_path, monkeypatch):
    root, _ = world
    config = _config(root, tmp_path / "out", rows_per_shard=None)
    made = embed(config)
    monkeypatch.setattr(stage, "shard_rows", lambda *_, **__: 1000)  # as on other devices
    assert embed(config).fingerprint == made.fingerprint
    (tmp_path / "out/shards.parquet").unlink()  # as an earlier version left it
    assert embed(config).fingerprint == made.fingerprint


def _figures(number=0):
    return {**dict.fromkeys((*COUNTS, *SECONDS), 0), "number": number, "num_rows": 1, "num_bytes": 7}


def _encoded_by_a_stub(tmp_path, monkeypatch, num_shards):
    """Run the shards with a stub in place of Ray; the names of the footers that were read, in their order."""
    job = SimpleNamespace(
        output=Location(str(tmp_path)), rows_per_shard=1, earlier=None, plan="", encoder={"fingerprint": "ours"}
    )
    read = []

    def read_footer(file):
        read.append(file.name)
        metadata = {"encoder": {"fingerprint": "ours"}}
        return SimpleNamespace(num_rows=1, num_bytes=7, dimension=2, metadata=metadata, left_out=[], num_dead=0)

    def results(pending, job, placement):
        for shard in pending:
            (job.output / "vectors" / shard.name).write_text("vectors")
            yield _figures(shard.number)

    monkeypatch.setattr(shard_ledger, "read_footer", read_footer)
    monkeypatch.setattr(shard_runner, "_results", results)
    shards = plan_shards([("a", num_shards)], 1)
    ledger = shard_runner.encode_shards(shards, job, Placement(1, 1), lambda done, total: None)
    assert ledger.num_vectors == num_shards and not ledger.pending
    return read


def test_resuming_reads_no_footer_that_the_ledger_repeats(tmp_path, monkeypatch):
    listings = []
    listing = Location.listing
    monkeypatch.setattr(Location, "listing", lambda *a, **o: listings.append(a) or listing(*a, **o))
    assert not _encoded_by_a_stub(tmp_path, monkeypatch, 50)  # all are new
    assert not _encoded_by_a_stub(tmp_path, monkeypatch, 60)  # ten are new
    listings.clear()
    assert not _encoded_by_a_stub(tmp_path, monkeypatch, 60)
    assert len(listings) == 1
    (tmp_path / "vectors/part-00003.parquet").write_text("another size")
    (tmp_path / "vectors/part-00004.parquet").unlink()
    assert _encoded_by_a_stub(tmp_path, monkeypatch, 60) == ["part-00003.parquet"]
    (tmp_path / "shards.parquet").write_text("damaged")
    assert len(_encoded_by_a_stub(tmp_path, monkeypatch, 60)) == 60


def test_a_file_that_is_removed_while_others_are_written_is_missed(tmp_path, monkeypatch):
    _encoded_by_a_stub(tmp_path, monkeypatch, 3)
    listing = Location.listing
    calls = iter(range(10))

    def later_without_the_first(folder, suffix="", **options):
        return listing(folder, suffix, **options)[1 if next(calls) >= 1 else 0 :]

    monkeypatch.setattr(Location, "listing", later_without_the_first)
    with pytest.raises(CorruptFileError, match=r"1 files were written .* part-00000\.parquet first"):
        _encoded_by_a_stub(tmp_path, monkeypatch, 4)


def test_a_cluster_that_shrinks_under_a_run_is_a_failure_and_not_bad_input(tmp_path, monkeypatch):
    shards = plan_shards([("a", 1)], 1)
    starts = iter([WorkerError("an actor died"), PlacementError("4 actors cannot be placed")])

    def results(*_):
        raise next(starts)
        yield

    job = SimpleNamespace(
        output=Location(str(tmp_path)), rows_per_shard=1, earlier=None, plan="", encoder={"fingerprint": "ours"}
    )
    monkeypatch.setattr(shard_runner, "_results", results)
    encode = functools.partial(shard_runner.encode_shards, shards, job, Placement(4, 1), lambda done, total: None)
    with pytest.raises(WorkerError, match="nodes were lost, and what is written stays: 4 actors cannot be placed"):
        encode()
    starts = iter([PlacementError("4 actors cannot be placed")])
    with pytest.raises(PlacementError):
        encode()


def test_another_node_must_have_the_models_own_weights(world, ray_session):
    root, _ = world
    model = open_model(str(root / "model"))
    encoding = model.encoding
    due = encoder_fingerprint(model, encoding, "float32")
    load = functools.partial(
        on_worker.load_encoder, encoding=encoding, dtype="float32", expected=due, num_threads=1, batch_tokens=None
    )
    assert load(str(root / "model"), driver_node="another").fingerprint == due
    with pytest.raises(FingerprintMismatchError, match=r"other' has other weights on node .* put the same files"):
        load(str(root / "other"), driver_node="another")
    load(str(root / "other"), driver_node=on_worker.this_node())  # where the driver looked itself


def test_the_manifest_knows_the_fingerprint_that_the_encoder_has(world, vectors):
    root, _ = world
    model = open_model(str(root / "model"))
    assert vectors.manifest.details["encoder"]["fingerprint"] == encoder_fingerprint(model, model.encoding, "float32")
    assert vectors.manifest.details["encoder"]["fingerprint"] != encoder_fingerprint(
        open_model(str(root / "other")), model.encoding, "float32"
    )
