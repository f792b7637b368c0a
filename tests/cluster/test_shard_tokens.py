import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import connection, shard_runner
from readapt_ray.cluster.embed_job import cell
from readapt_ray.cluster.shard_encoder import ShardEncoder
from readapt_ray.cluster.shard_source import ShardSource
from readapt_ray.retrieval.shard_ledger import read_figures
from readapt_ray.retrieval.shard_plan import plan_shards
from readapt_ray.retrieval.tokenization import TextTokenizer

FILES = ("part-00000.parquet", "part-00001.parquet")


def _rows(job, *, tokenizes):
    """The first 20 and the last 20 passages, as the read tasks yield them."""
    source = ShardSource(plan_shards([("part-00000.parquet", 40)], 20), job, tokenizes=tokenizes)
    return [row for task in source.get_read_tasks() for row in task()]


def test_an_encoder_that_tokenises_writes_what_it_writes_of_tokens(job, tmp_path):
    encoder, tables = ShardEncoder(job), []
    for tokenizes in (False, True):
        told = [encoder(row).to_pylist()[0] for row in _rows(job, tokenizes=tokenizes)]
        assert [(each["number"], each["error"], each["num_encoded"]) for each in told] == [(0, "", 19), (1, "", 20)]
        tables.append(pq.read_table(tmp_path / "out/vectors"))
        shutil.rmtree(tmp_path / "out/vectors")
    assert tables[0]["doc_id"].to_pylist() == tables[1]["doc_id"].to_pylist()
    vectors = [np.array(table["vector"].to_pylist()) for table in tables]
    np.testing.assert_array_equal(*vectors)


def test_what_truncation_takes_is_counted_wherever_a_shard_is_tokenised(job, tmp_path):
    whole = TextTokenizer(
        open_model(job.model_name).tokenizer, job.encoding.model_copy(update={"max_passage_tokens": 512})
    )
    lost, most = [], job.encoding.max_passage_tokens
    for row in _rows(job, tokenizes=False):
        passages = set(zip(cell(row, "title").to_pylist(), cell(row, "text").to_pylist(), strict=True))
        lengths = [len(whole.ids([text], "passage", [title])[0]) for title, text in passages]
        lost.append([length - most for length in lengths if length > most])
    assert all(lost) and len(lost[0]) < 19
    for tokenizes in (False, True):
        told = [ShardEncoder(job)(row).to_pylist()[0] for row in _rows(job, tokenizes=tokenizes)]
        assert [(each["num_truncated"], each["num_lost"]) for each in told] == [(len(each), sum(each)) for each in lost]
        footers = [read_figures(job.vectors / name, num_rows=20, made_by=job.encoder["fingerprint"]) for name in FILES]
        assert [each["num_lost"] for each in footers] == [each["num_lost"] for each in told]
        shutil.rmtree(tmp_path / "out/vectors")


def test_a_file_that_a_lost_actor_wrote_and_did_not_tell_of_stays(job, tmp_path):
    first = ShardEncoder(job)(_rows(job, tokenizes=False)[0])
    path = tmp_path / "out/vectors/part-00000.parquet"
    before = path.stat().st_mtime_ns
    told = ShardEncoder(job)(_rows(job, tokenizes=False)[0])
    assert told.to_pylist() == first.to_pylist() and path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:-50])
    assert ShardEncoder(job)(_rows(job, tokenizes=False)[0])["error"].to_pylist() == [""]
    assert pq.read_table(path).num_rows == 20


def test_an_error_goes_through_both_ways_as_a_row(job):
    (job.passages / "part-00000.parquet").delete()
    for tokenizes in (False, True):
        told = ShardEncoder(job)(_rows(job, tokenizes=tokenizes)[0]).to_pylist()[0]
        assert told["error"] == "CorruptFileError" and "part-00000.parquet is gone" in told["message"]


@pytest.mark.parametrize(
    ("num_cpus", "num_encoders", "num_gpus", "in_tasks"), [(2, 2, 0, False), (2, 1, 0, True), (2, 2, 1, True)]
)
def test_tasks_tokenise_where_they_take_no_core_from_an_encoder(
    num_cpus, num_encoders, num_gpus, in_tasks, monkeypatch
):
    monkeypatch.setattr(connection, "connect", lambda: SimpleNamespace(num_cpus=num_cpus))
    assert shard_runner.tasks_tokenize(num_encoders, {"CPU": 1, "GPU": num_gpus}) is in_tasks
