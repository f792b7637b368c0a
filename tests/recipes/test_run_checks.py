"""What is wrong with a run is said at once, before the first stage."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from readapt_ray import hardware
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import placement
from readapt_ray.cluster.connection import Resources
from readapt_ray.errors import (
    ArtifactConflictError,
    InputError,
    ModelError,
    PlacementError,
    ReadaptError,
    StorageError,
    WeightMismatchError,
)
from readapt_ray.recipes import chain, memory_checks, room_checks, run_checks, run_file
from readapt_ray.recipes.problems import Problems
from readapt_ray.training import memory
from tests import factories, object_store
from tests.recipes.desk import ALL, LENGTHS, Desk, check, written


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_written(
    desk: Desk, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "retriever": str(models / "silent"),
        "train": {"block_tokens": 100_000, "only": "absent.txt"},
        "queries": "absent.jsonl",
    }
    assert desk.run(**wrong) == 2
    said = capsys.readouterr().err
    assert "4 things are wrong, and nothing was started:" in said
    for each in (
        "--encoding FILE.json or `encoding: FILE.json` at the top of its file serves all stages",
        "block_tokens = 100000 is more than the",
        "section 'train': only = 'absent.txt' is not there",
        "queries = 'absent.jsonl' is not there",
    ):
        assert each in said
    assert not desk.root.exists()
    options = {"train": {"lora_rnak": 1}, "embed": {"dtpye": "float32"}, "merge": {"knowledge_scale": [0.5, 0.1]}}
    assert desk.run("--from", "mreg", **options, pretrained="quickstart-pretraind") == 2
    said = capsys.readouterr().err
    assert "5 things are wrong" in said
    assert "did you mean 'quickstart-pretrained'" in said
    assert "--from 'mreg' is no stage of the run" in said
    assert "the run trains one adapter; give one number" in said
    assert "'lora_rnak'; did you mean 'lora_rank'" in said
    assert "'dtpye'; did you mean 'dtype'" in said


def test_one_message_lists_a_fault_of_every_kind(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(memory, "free_bytes", lambda *_: 900_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    (desk.root / "index" / "adapted").mkdir(parents=True)
    (desk.root / "index" / "adapted" / "mine.txt").write_text("mine")
    wrong = {
        "sorce": "x",
        "encoding": "absent.json",
        "source": "absent.jsonl",
        "train": {"block_tokens": 100_000},
        "evaluate": {"measures": ["Foo@3"]},
        "embed": {"dtpye": "float32"},
        "qrels": "absent.tsv",
    }
    assert desk.run("--set", "lora_rank", **wrong) == 2
    said = capsys.readouterr().err
    assert "10 things are wrong, and nothing was started:" in said, said
    for each in (
        "--set 'lora_rank' is not NAME=VALUE",
        "unknown option 'sorce'; did you mean 'source'",
        "encoding = \"absent.json\": no file 'absent.json'",
        "unknown option 'dtpye'; did you mean 'dtype'",
        "unknown measure 'Foo@3'",
        "no corpus at 'absent.jsonl'",
        "block_tokens = 100000 is more than the",
        "mine.txt that no stage of readapt made",
        "qrels = 'absent.tsv' is not there",
        "the run writes the adapted model",
        "a worker would need about",
    ):
        assert each in said, (each, said)
    assert desk.made == []
    assert sorted(path.name for path in desk.root.rglob("*") if path.is_file()) == ["mine.txt"]


def test_an_option_that_is_not_known_makes_nothing_stale(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.run(encoding={"pooling": "mean", "add_bos": True, "add_eos": True, **LENGTHS}) == 0
    capsys.readouterr()
    assert desk.run(encoding="absent.json") == 2
    said = capsys.readouterr().err
    assert "no file 'absent.json'" in said
    assert "Stale" not in said
    assert "things are wrong" not in said


@pytest.mark.parametrize(
    ("source", "ingest", "said"),
    [
        ("absent", {}, "no corpus at 'absent': there is no such file or folder"),
        ("empty.jsonl", {}, "holds no rows"),
        ("picture.png", {}, "the format of '.*png' cannot be told"),
        ("rows.csv", {}, "rows.csv has no text column .* its columns are nr, abstract"),
        ("rows.csv", {"columns": "text=abstract,doc_id=nr,title=zz"}, "'zz'"),
        ("rows.csv", {"columns": "text=abstract,doc_id=nr", "format": "jsonl"}, "rows.csv is not JSON Lines"),
        ("ir_datasets:beir/nosuchset", {}, "ir_datasets has no collection 'beir/nosuchset'"),
        ("hub:not-an-id", {}, "is not a hub id"),
        ("python-docs:nosuchpackage", {}, "nosuchpackage"),
    ],
)
def test_the_source_is_looked_at_first(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, source: str, ingest: dict[str, str], said: str
) -> None:
    monkeypatch.chdir(desk.file.parent)
    Path("empty.jsonl").write_text("")
    Path("picture.png").write_bytes(b"\x89PNG")
    Path("rows.csv").write_text("nr,abstract\n1,A passage.\n")
    with pytest.raises(InputError, match=said):
        check(desk, source=source, ingest=ingest)
    assert not desk.root.exists()


@pytest.mark.parametrize("source", ["nfcorpus", "hub:BeIR/nfcorpus", "BeIR/nfcorpus", "ir_datasets:beir/nfcorpus/test"])
def test_a_corpus_that_would_be_fetched_is_known_by_its_name_alone(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    def connected(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", connected)
    check(desk, source=source)


def test_a_finished_run_needs_neither_its_source_nor_the_cores_that_it_had(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.run() == 0
    Path(desk.values["source"]).unlink()
    assert desk.run("--set", "embed.num_workers=5000", "--set", "train.trackers=wandb") == 0
    assert desk.made == []
    capsys.readouterr()
    assert desk.run("--set", "ingest.keep=url", "--overwrite") == 2
    assert "no corpus at" in capsys.readouterr().err
    assert desk.made == []


def test_two_models_that_do_not_belong_together_are_refused_first(desk: Desk, models: Path, tmp_path: Path) -> None:
    other = factories.tiny_decoder(tmp_path / "other", hidden_size=64)
    foreign = factories.write_contract(factories.full_retriever(tmp_path / "foreign", other))
    with pytest.raises(
        InputError, match=r"was not made from .*embed_tokens.weight: \[384, 32\] before, \[384, 64\] after"
    ):
        check(desk, retriever=str(foreign))
    moved = shutil.copytree(models / "retriever", tmp_path / "moved")
    file = moved / "tokenizer.json"
    values = json.loads(file.read_text())
    words = values["model"]["vocab"]
    one, two = list(words)[-2:]
    words[one], words[two] = words[two], words[one]
    file.write_text(json.dumps(values))
    with pytest.raises(WeightMismatchError, match=r"the tokenizer of .* differs from the one of"):
        check(desk, retriever=str(moved))
    check(desk, retriever=str(moved), merge={"accept": "tokenizer"})
    adapter = factories.write_contract(factories.lora_adapter(tmp_path / "adapter", models / "base"))
    check(desk, retriever=str(adapter))
    (adapter / "manifest.json").write_text(json.dumps(_manifest(pretrained="0" * 32)))
    with pytest.raises(WeightMismatchError, match=r"was trained on .* with the fingerprint 0000"):
        check(desk, retriever=str(adapter))
    assert not desk.root.exists()


def _manifest(**inputs: str) -> dict[str, Any]:
    values = {"config": {}, "inputs": inputs, "counts": {}, "details": {}, "versions": {}, "files": []}
    return {"stage": "train", "fingerprint": "1", "seconds": 1.0, "created": "", **values}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"embed": {"dimensions": 9999}}, r"section 'embed': dimensions = 9999, but vectors of .* have 32 numbers"),
        (
            {"search": {"mode": "hybrid"}},
            "section 'search': mode = 'hybrid' searches words, and section 'index' has no bm25",
        ),
        (
            {"index": {"kind": "ivf-pq", "code_bytes": 7}},
            "section 'index': code_bytes = 7 does not divide the 32 numbers",
        ),
        (
            {"index": {"kind": "ivf-pq", "code_bytes": 8}, "embed": {"dimensions": 12}},
            "code_bytes = 8 does not divide the 12",
        ),
        ({"index": {"kind": "auto", "memory_gb": 1e-6}}, "section 'index': memory_gb = 1e-06 is too little"),
        ({"index": {"factory": "IFV12,Flat"}}, "section 'index': factory = 'IFV12,Flat' is no index of 32 numbers"),
        (
            {"embed": {"num_workers": 5000}},
            "5000 workers of section 'embed' of 1 CPU each cannot be placed: there is room for",
        ),
        ({"embed": {"num_cpus_per_worker": 5000}}, "1 workers of section 'embed' of 5000 CPU each cannot be placed"),
        ({"train": {"num_workers": 5000, "batch_size": 5000}}, "5000 workers of section 'train' of 1 CPU each cannot"),
        ({"merge": {"layer_scales": "0-9=0.5"}}, "layer_scales = '0-9=0.5': the model has the layers 0 to 1"),
        ({"merge": {"num_workers": 1, "num_cpus_per_worker": 5000}}, "1 workers of section 'merge' of 5000 CPU"),
        (
            {"evaluate": {"measures": ["nDCG@1000"]}, "search": {"top_k": 10}},
            "top_k = 10 finds fewer results than nDCG@1000",
        ),
        ({"train": {"trackers": "wandb"}}, "trackers names 'wandb', which is not installed"),
        ({"ingest": {"split_tokens": 64, "tokenizer": "absent"}}, "'absent'"),
    ],
)
def test_options_that_contradict_each_other_or_this_machine_are_refused_first(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    options = {"train": {"check_memory": False, **options.pop("train", {})}, **options}
    with pytest.raises(ReadaptError, match=said):
        check(desk, **options)
    assert not desk.root.exists()


def test_options_that_go_together_are_not_refused(desk: Desk) -> None:
    check(
        desk,
        embed={"dimensions": 16, "num_workers": 1},
        index={"kind": "ivf-pq", "code_bytes": 4, "bm25": True},
        search={"mode": "hybrid", "top_k": 1000},
        evaluate={"measures": ["nDCG@1000"]},
        ingest={"split_tokens": 64, "tokenizer": desk.values["retriever"]},
    )


def test_a_machine_without_faiss_is_told_before_the_hours_that_come_before_the_index(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("faiss", "readapt_ray.retrieval.faiss_build"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "faiss", None)  # as Python marks what cannot be imported
    assert desk.run() == 2
    assert (
        "vector indexes need FAISS, which is not installed; pip install 'readapt-ray[cpu]'" in capsys.readouterr().err
    )
    assert not desk.root.exists()


@pytest.mark.parametrize("place", ["flag", "file"])
def test_one_encoding_serves_merge_and_embed(desk: Desk, models: Path, tmp_path: Path, place: str) -> None:
    encoding = tmp_path / "encoding.json"
    encoding.write_text(json.dumps({"pooling": "mean", "add_bos": True, "add_eos": True, "max_passage_tokens": 64}))
    desk.values["retriever"] = str(models / "silent")
    changes = {"encoding": str(encoding)}
    config = run_file.read_run(written(desk), changes if place == "flag" else {})
    if place == "file":
        desk.values |= changes
        config = run_file.read_run(written(desk), {})
    steps = chain.plan_run(config)
    assert {step.config.encoding.pooling for step in steps if step.stage in ("merge", "embed")} == {"mean"}
    run_checks.check_run(config, steps, [], Problems())
    assert desk.run("--encoding", str(encoding)) == 0 if place == "flag" else desk.run() == 0


def test_what_training_needs_is_checked_first(desk: Desk, models: Path, tmp_path: Path) -> None:
    headless = shutil.copytree(models / "base", tmp_path / "headless")
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    with pytest.raises(ModelError, match="has no language-model head"):
        check(desk, pretrained=str(headless))
    (headless / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(InputError, match="models of the type 'gpt2'; give --target-modules"):
        check(desk, pretrained=str(headless))
    with pytest.raises(ModelError, match=r"\['Wqkv'\] match no linear layer; the model has"):
        check(desk, train={"target_modules": "Wqkv"})
    adapter = factories.lora_adapter(tmp_path / "adapter", models / "base")
    with pytest.raises(ModelError, match="is an adapter; give the model that it was trained on"):
        check(desk, pretrained=str(adapter))
    encoding = {"pooling": "mean", "add_bos": True, "add_eos": True, "max_passage_tokens": 100_000}
    with pytest.raises(ModelError, match="the encoding allows 100000 tokens"):
        check(desk, encoding=encoding)


def test_what_lies_in_the_root_and_room_on_the_disk_are_checked_first(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (desk.root / "index" / "adapted").mkdir(parents=True)
    (desk.root / "index" / "adapted" / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactConflictError, match=r"mine\.txt that no stage of readapt made"):
        check(desk)
    (desk.root / "index" / "adapted" / "mine.txt").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(
        StorageError,
        match=r"has 0 bytes free, and the run writes the adapted model 1\d\d KB and 2 checkpoints and the adapter 640 KB; make",
    ):
        check(desk)
    free = 30_880 * 4 + 22_848 * 28 + 60_000  # and some for the head and the header of the weights
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    check(desk)
    with pytest.raises(StorageError, match="4 checkpoints and the adapter"):
        check(desk, train={"keep_checkpoints": 4})


@pytest.mark.parametrize("root", ["/proc/readapt", "s3://no-such-bucket/root"])
def test_a_root_that_cannot_be_written_is_told_with_all_else(
    desk: Desk, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with object_store.running() as store:
        before = set(store.names())
        assert desk.run(root=root, qrels="absent.tsv") == 2
        said = capsys.readouterr().err
        assert "2 things are wrong" in said, said
        assert f"{root} cannot be used: " in said
        assert ("check the name of the bucket" if ":" in root else "give a folder that this user may read") in said
        assert "qrels = 'absent.tsv' is not there" in said
        assert set(store.names()) == before


def test_a_root_is_probed_and_left_as_it_was(desk: Desk) -> None:
    with object_store.running() as store:
        before = set(store.names())
        room_checks.check_root(f"s3://{object_store.BUCKET}/root")
        assert any(each.startswith("PUT /bucket/root/") for each in store.requests)
        assert any(each.startswith("DELETE /bucket/root/") for each in store.requests)
        assert set(store.names()) - before <= {"root/"}, "the store's mark of a folder may stay"
    room_checks.check_root(str(desk.root / "new" / "folder"))
    assert not desk.root.exists()


def test_room_for_the_vectors_is_checked_once_the_corpus_is_there(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.num_passages, desk.broken = 1_000_000, "blocks"
    assert desk.run() == 2
    desk.broken = ""
    free = (
        4 * 32 * 4 * 1_000_000
    )  # vectors and indexes of both retrievers; and the adapted model has some bytes as well
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    capsys.readouterr()
    assert desk.run() == 2
    said = capsys.readouterr().err
    assert "has 512 MB free, and the run writes the adapted model 1" in said
    assert " and blocks 165 MB and vectors of 1,000,000 passages 256 MB and indexes of them 256 MB; make room" in said
    assert desk.made == []
    assert desk.run("--set", "embed.vector_dtype=float16") == 0


def test_the_memory_of_a_training_step_is_checked_before_any_stage(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(memory, "free_bytes", lambda *_: 900_000_000)
    assert desk.run() == 2
    said = capsys.readouterr().err
    assert "a worker would need about 0.9" in said
    assert "start anyway with check_memory false" in said
    assert desk.made == []
    assert desk.run("--set", "train.check_memory=false") == 0
    assert desk.run() == 0, "what is trained already needs no memory"


@pytest.mark.parametrize("where", ["this machine has", "the nodes of the cluster have 2 x"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"embed": {"num_workers": 2, "dtype": "float32"}},
            r"embed \(the 30,\d+ weights of '.*' in each worker\) would need about 2 x 12\d KB",
        ),
        (
            {"embed": {"dtype": "float32"}, "packs": True},
            r"embed \(the 30,\d+ weights .*\) would need about \d x 197 KB",
        ),
        ({"embed": {"dtype": "float16"}, "packs": True}, None),
        ({"embed": {"dtype": "bfloat16"}}, None),
        ({"merge": {"low_rank": 0.5}}, r"merge with low_rank \(a matrix of 384 x 32\) would need about 197 KB"),
        (
            {"index": {"rows_per_shard": 500}},
            r"index \(shards of 500 vectors, one per core\) would need about 2 x 128 KB",
        ),
        ({"index": {"rows_per_shard": 100}}, None),
    ],
)
def test_the_memory_of_each_stage_is_checked_where_it_will_run(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str | None, where: str
) -> None:
    free, is_here = 150_000, where == "this machine has"
    node = {"Alive": True, "Resources": {"CPU": 1.0, "memory": float(free)}}
    monkeypatch.setattr(memory_checks.connection, "connect", lambda: Resources(2, 0, 2))
    monkeypatch.setattr(memory_checks.nodes, "alive", lambda: [node, node])
    monkeypatch.setattr(hardware, "num_cores", lambda: 2)
    packs = bool(options.get("packs"))
    monkeypatch.setattr(hardware, "is_amd", lambda: packs)
    monkeypatch.setattr(hardware, "has_bfloat16_units", lambda: packs)
    monkeypatch.setattr(memory, "free_bytes", lambda *_: free)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: not is_here))
    problems = Problems()
    small = {"embed": {"dtype": "bfloat16"}, "index": {"rows_per_shard": 100}, "train": {"check_memory": False}}
    options = {**small, **{name: value for name, value in options.items() if name != "packs"}}
    configs = {step.stage: step.config for step in chain.plan_run(chain.RunConfig.parse({**desk.values, **options}))}
    found = {name: open_model(desk.values[name]) for name in ("pretrained", "retriever")}
    memory_checks.check_memory(configs, configs, found, problems, dimension=32, num_passages=1000)
    if said is None or (" 2 x " in said and not is_here):
        assert not problems, "each of the two nodes has one worker"
    else:
        with pytest.raises(PlacementError, match=f"{said}, and {where} 150 KB; "):
            problems.raise_them()


@pytest.mark.parametrize(
    ("nodes", "num_workers", "num_cpus", "share"),
    [
        ([(8, 64)], 1, 1, 64),
        ([(8, 64)], 16, 1, 4),
        ([(8, 64), (8, 64)], 2, 8, 64),
        ([(8, 64), (8, 64)], 3, 1, 32),
        ([(8, 64), (8, 8)], 2, 8, 8),  # one worker on each, as large as they are
        ([(8, 64), (8, 8)], 2, 4, 32),  # both may be on the larger one
        ([(8, 64), (8, 8)], 16, 1, 1),
        ([(8, 64), (1, 8)], 9, 1, 8),
    ],
)
def test_a_worker_has_a_part_of_the_memory_of_its_node(
    nodes: list[tuple[int, int]], num_workers: int, num_cpus: int, share: int
) -> None:
    machines = memory_checks._Machines("cpu", tuple(memory_checks._Node(*each) for each in nodes), "the nodes have")
    assert machines.share(num_workers, num_cpus) == share


def test_a_node_without_cpus_has_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = [{"memory": 1000.0}, {"CPU": 2.0, "memory": 30.0}, {"CPU": 4.0, "memory": 70.0}]
    monkeypatch.setattr(memory_checks.connection, "connect", lambda: Resources(6, 0, 3))
    monkeypatch.setattr(memory_checks.nodes, "alive", lambda: [{"Resources": each} for each in resources])
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    machines = memory_checks._machines()
    assert machines is not None
    assert (machines.nodes, machines.num_cpus) == (((2, 30), (4, 70)), 6)
    with pytest.raises(
        PlacementError,
        match=r"would need about 6 x 16 bytes, and the nodes of the cluster have 30 bytes and 70 bytes; ",
    ):
        machines.refuse("work", 6, 16, "take more")


@pytest.mark.parametrize("known_by", ["option", "autoscaler", "cluster", "this machine"])
def test_a_batch_that_cannot_feed_all_workers_is_refused_before_any_stage(
    known_by: str, desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    options = ["--set", "train.batch_size=4"]
    if known_by == "option":
        options += ["--set", "train.num_workers=8"]
        monkeypatch.setattr(hardware, "num_cores", lambda: 8)
        monkeypatch.delenv("READAPT_NUM_CPUS", raising=False)
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    elif known_by == "autoscaler":
        monkeypatch.setenv("READAPT_NUM_GPUS", "8")
    elif known_by == "cluster":
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        monkeypatch.setattr(placement, "num_training_workers", lambda asked, _: asked or 8)
        monkeypatch.setattr(memory_checks, "_machines", lambda: None)
    else:
        monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert desk.run(*options) == 2
    said = capsys.readouterr().err
    assert "batch_size = 4 blocks cannot feed 8 workers: give batch_size 8 or more, or num_workers 4 or fewer" in said
    assert desk.made == []
    desk.run(*options, "--set", "train.batch_size=auto", "--set", "train.check_memory=false")
    assert desk.made == ALL
    assert desk.run(*options, "--set", "train.batch_size=auto", "--set", "train.check_memory=false") == 0
