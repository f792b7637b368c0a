"""The main job: its plan for real models, and a whole run on tiny ones."""

import json
import logging
import re
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ir_measures
import pytest
import yaml

import readapt_ray as ra
from benchmarks.smollm.adapter import ENCODING
from readapt_ray import artifacts, cli, root_status
from readapt_ray.catalog import retrievers
from readapt_ray.errors import InputError, ModelError
from readapt_ray.recipes import chain, quickstart, run_checks, running
from readapt_ray.recipes.chain import RunConfig
from readapt_ray.stages.train import TrainConfig
from readapt_ray.storage import Location
from tests import factories

JOBS = Path(__file__).parent.parent.parent / "jobs"
FILES = sorted(JOBS.glob("*.yaml"))
FIRST_RUN = "smollm2"
"""The file for a first run, whose models are folders that a script makes; the others are for models of the catalog."""


@pytest.mark.parametrize("file", [each for each in FILES if each.stem != FIRST_RUN], ids=lambda file: file.stem)
def test_the_shipped_experiments_resolve_to_the_papers_settings_and_use_all_gpus_unless_named_paper(file: Path) -> None:
    config = RunConfig.parse(yaml.safe_load(file.read_text()), where=file.name)
    steps = {step.name: step for step in chain.plan_run(config)}
    assert list(steps) == [
        "corpus",
        "blocks",
        "adapter",
        "adapted",
        "vectors/retriever",
        "index/retriever",
        "vectors/adapted",
        "index/adapted",
        "runs/retriever.trec",
        "runs/adapted.trec",
        "report",
    ]
    train: Any = steps["adapter"].config
    assert (train.lora_rank, train.lora_alpha, train.lora_dropout) == (32, 64, 0.05)
    assert (train.learning_rate, train.num_epochs, train.method) == (2e-4, 1, "dora")
    blocks: Any = steps["blocks"].config
    is_papers = file.stem.endswith("-paper")
    assert (blocks.mode, train.batch_size) == (("passage", 4) if is_papers else ("packed", "auto"))
    assert blocks.block_tokens == 1024
    merge: Any = steps["adapted"].config
    assert (merge.readapter_scale, merge.knowledge_scale) == (1.0, 0.5)
    row = retrievers.retriever(config.retriever)
    assert row.pretrained == config.pretrained
    assert train.target_modules == (), "those of the model's family"
    assert row.dora_targets in retrievers.TARGETS_BY_FAMILY.values()
    embed: Any = steps["vectors/adapted"].config
    assert embed.retriever == "readapt-run/adapted"


def test_a_run_is_as_deep_as_its_measures_and_without_self_hits_where_the_corpus_wants_it() -> None:
    def searched(**options: Any) -> tuple[int, bool]:
        values = {"source": "x", "pretrained": "a", "retriever": "b", **options}
        steps = {step.name: step.config for step in chain.plan_run(RunConfig.parse(values))}
        both: Any = [steps[f"runs/{arm}.trec"] for arm in ("retriever", "adapted")]
        ((depth, drops),) = {(each.top_k, each.drop_self_hits) for each in both}
        return depth, drops

    assert searched() == (100, False)
    steps = {step.name: step.config for step in chain.plan_run(RunConfig(**VALUES, split="dev"))}
    judged: Any = [steps[f"runs/{arm}.trec"] for arm in ("retriever", "adapted")]
    assert {each.qrels for each in judged} == {"readapt-run/corpus/qrels/dev.parquet"}, (
        "others would be searched for nothing"
    )
    assert searched(source="arguana", evaluate={"measures": "nDCG@10,R@1000"}) == (1000, True)
    own = {"top_k": 30, "drop_self_hits": False}
    assert searched(source="arguana", evaluate={"measures": ["R@1000"]}, search=own) == (30, False)


def test_there_is_a_file_for_each_promised_model() -> None:
    models = ("e5-mistral", "qwen3-embedding-0.6b", "repllama")
    assert {file.stem for file in FILES} == {
        FIRST_RUN,
        *(f"{model}{variant}" for model in models for variant in ("", "-paper")),
    }


def test_the_first_run_trains_on_what_its_retriever_reads() -> None:
    text = (JOBS / f"{FIRST_RUN}.yaml").read_text()
    config = RunConfig.parse(yaml.safe_load(text))
    steps: dict[str, Any] = {step.name: step.config for step in chain.plan_run(config)}
    assert steps["blocks"].block_tokens == ENCODING["max_passage_tokens"]
    assert (steps["adapted"].readapter_scale, steps["adapted"].knowledge_scale) == (1.0, 0.5)
    (command,) = re.findall(r"bash (benchmarks/smollm/run\.sh) \. (\w+) model", text)
    assert (JOBS.parent / command[0]).is_file()
    assert {config.pretrained, config.retriever} == {f"{command[1]}/pretrained", f"{command[1]}/retriever"}


def test_a_wrong_section_is_named() -> None:
    values = {"source": "x", "pretrained": "a", "retriever": "b"}
    with pytest.raises(InputError, match=r"section 'train': unknown option 'lora_rnak'"):
        chain.plan_run(RunConfig(**values, train={"lora_rnak": 3}))
    with pytest.raises(InputError, match="section 'embed' sets corpus, which the run itself sets"):
        chain.plan_run(RunConfig(**values, embed={"corpus": "y"}))
    with pytest.raises(InputError, match="unknown option 'retreiver'"):
        RunConfig.parse({**values, "retreiver": "x"})


VALUES = {"source": "x", "pretrained": "a", "retriever": "b"}


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("merge", "bundle", "y"),
        ("merge", "factors", True),
        ("merge", "knowledge_scale", [0.5, 0.25]),
        ("embed", "previous", "y"),
        ("embed", "sample", "1%"),
        ("index", "previous", "y"),
        ("search", "vectors", "y"),
        ("search", "encoding", "y.json"),
        ("evaluate", "names", ["only one"]),
        ("evaluate", "names", "same,same"),
        ("evaluate", "require", "nDCG@10 > better"),
        ("train", "torch_compile", True),
    ],
)
def test_what_a_run_cannot_honour_is_refused_before_anything_starts(section: str, option: str, value: Any) -> None:
    options = {option: value} | ({"zero_stage": 3} if option == "torch_compile" else {})
    with pytest.raises(InputError, match=f"(section '{section}': )?{option}.*[;,]") as refused:
        chain.plan_run(RunConfig(**VALUES, **{section: options}))
    assert "\n" not in str(refused.value)


def test_what_a_run_cannot_honour_does_not_stand_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    entries = " ".join(capsys.readouterr().out.split("Options of the file:")[1].split())
    offered = {section: entries.partition(f" {section}: ")[2].partition(":")[0] for section in chain.NOT_IN_A_RUN}
    for section, refused in chain.NOT_IN_A_RUN.items():
        assert "overwrite" in offered[section]
        assert not set(refused) & set(offered[section].replace(",", "").split())


def test_every_option_of_a_section_is_set_by_the_run_or_refused_or_offered_on_purpose() -> None:
    """A new option of a stage is looked at here: what names a file, a folder or another output needs a decision."""
    steps = {step.stage: step.config for step in chain.plan_run(RunConfig(**VALUES))}
    places = {
        stage: sorted(
            name
            for name, field in type(config).model_fields.items()
            if "str" in str(field.annotation) and "Literal" not in str(field.annotation)
            if name not in config.model_fields_set and name not in chain.NOT_IN_A_RUN.get(stage, {})
        )
        for stage, config in steps.items()
    }
    assert places == {
        "ingest": ["columns", "keep", "tokenizer"],
        "pack": ["exclude", "new_since", "only"],
        "train": ["continue_from", "exclude", "new_since", "only", "target_modules"],
        "merge": ["layer_scales", "measures"],
        "embed": [],
        "index": ["factory"],
        "search": ["columns"],
        "evaluate": ["columns", "measures", "names", "require"],
    }


def test_a_run_looks_for_the_files_that_its_sections_name(tmp_path: Path) -> None:
    base = factories.tiny_decoder(tmp_path / "base")
    factories.write_contract(factories.full_retriever(tmp_path / "retriever", base))
    models = {"source": str(tmp_path), "pretrained": str(base), "retriever": str(tmp_path / "retriever")}
    for section, option in (("train", "exclude"), ("train", "only"), ("merge", "measures"), ("search", "qrels")):
        config = RunConfig(**models, root=str(tmp_path / "root"), **{section: {option: str(tmp_path / "absent")}})
        with pytest.raises(InputError, match=rf"section '{section}': {option} = .*absent'.* is not there"):
            running.run(config)
    assert not (tmp_path / "root").exists()


def test_a_run_asks_for_the_encoding_of_each_stage_that_needs_it_before_it_trains(tmp_path: Path) -> None:
    base = factories.tiny_decoder(tmp_path / "base")
    retriever = factories.full_retriever(tmp_path / "retriever", base)
    contract = tmp_path / "encoding.json"
    contract.write_text(json.dumps({"pooling": "mean", "add_bos": True, "add_eos": True}))
    values = {
        "source": str(tmp_path),
        "pretrained": str(base),
        "retriever": str(retriever),
        "root": str(tmp_path / "r"),
    }
    for section in ("embed", "merge"):
        with pytest.raises(InputError, match="encoding"):
            running.run(RunConfig(**values, **{section: {"encoding": str(contract)}}))
    assert not (tmp_path / "r").exists()


def test_the_quickstarts_recipe_is_a_plan() -> None:
    assert len(chain.plan_run(quickstart.recipe("root"))) == 11


def test_the_quickstart_trains_on_every_third_passage(tmp_path: Path) -> None:
    passages = factories.small_corpus(10)
    factories.ingest_artifact(tmp_path / "corpus", passages)
    quickstart.choose_passages(artifacts.open_artifact(str(tmp_path / "corpus"), "ingest"), str(tmp_path))
    chosen = Path(quickstart.recipe(str(tmp_path)).train["only"]).read_text().split()
    assert chosen == [passages[index].doc_id for index in (0, 3, 6, 9)]


@pytest.mark.parametrize(
    ("root", "corpus"),
    [("a/", "a/corpus"), ("s3://b/r?endpoint_override=127.0.0.1:1", "s3://b/r/corpus?endpoint_override=127.0.0.1:1")],
)
def test_outputs_lie_under_the_root_whatever_its_uri(root: str, corpus: str) -> None:
    ingest, pack, train, *_ = (step.config for step in chain.plan_run(quickstart.recipe(root)))
    assert (ingest.output, pack.corpus, train.corpus) == (corpus, corpus, corpus.replace("corpus", "blocks"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    base = factories.tiny_decoder(folder / "base")
    factories.write_contract(factories.lora_adapter(folder / "retriever", base))
    passages = factories.small_corpus(60)
    queries, qrels = factories.small_queries(passages, 12)
    beir = folder / "beir"
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": p.doc_id, "title": p.title, "text": p.text}) + "\n" for p in passages)
    )
    (beir / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": q.query_id, "text": q.text}) + "\n" for q in queries)
    )
    lines = ["query-id\tcorpus-id\tscore", *(f"{q.query_id}\t{q.doc_id}\t{q.relevance}" for q in qrels)]
    (beir / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    (folder / "my-run.yaml").write_text(
        yaml.safe_dump(
            {
                "source": str(beir),
                "general": {"source": str(beir)},  # its own corpus again: both must measure the same
                "pretrained": str(base),
                "retriever": str(folder / "retriever"),
                "train": {"block_tokens": 64, "batch_size": 8, "num_workers": 1, "num_cpus_per_worker": 1},
                "evaluate": {"measures": "nDCG@10,R@100"},
            }
        )
    )
    return folder


def test_a_whole_run_measures_what_an_independent_computation_measures(
    ray_session: None, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tiny / "run"
    again = ["run", "--config", str(tiny / "my-run.yaml"), "--root", str(root), "--set", "merge.knowledge_scale=0.75"]
    assert cli.main(again) == 0
    said = capsys.readouterr().out
    assert said.count("## Means") == 1 and "## Beside 12 general queries" in said
    measured = json.loads((root / "report" / "measures.json").read_text())["means"]
    assert measured == json.loads((root / "general" / "report" / "measures.json").read_text())["means"]
    qrels = list(ir_measures.read_trec_qrels("\n".join(_trec_qrels(tiny / "beir" / "qrels" / "test.tsv"))))
    for name in ("retriever", "adapted"):
        run = list(ir_measures.read_trec_run(str(root / "runs" / f"{name}.trec")))
        assert len(run) == 12 * 60
        expected = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10]
        assert measured[name]["nDCG@10"] == pytest.approx(expected, abs=1e-9)
    assert json.loads((root / "adapted" / "manifest.json").read_text())["details"]["knowledge_scale"] == [0.75]
    assert {row["state"] for row in root_status.rows(Location(str(root)))} == {"done"}

    own = ("run.json", running.LOG_NAME)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name not in own}
    assert cli.main(again) == 0
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name not in own}
    assert before == after


def test_the_readmes_python_runs_and_finds_what_the_run_found(
    ray_session: None, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the root of the whole run above, so that its stages are complete."""
    readme = (JOBS.parent / "README.md").read_text()
    (block,) = (each for each in re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S) if "readapt_ray" in each)
    monkeypatch.chdir(tiny)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert "report" in names["made"]
    texts = {each.doc_id: each for each in factories.small_corpus(60)}
    assert all((texts[hit.doc_id].title, texts[hit.doc_id].text) == (hit.title, hit.text) for hit in names["hits"])
    assert names["vectors"].shape == (1, 32)
    assert str(Path("run/corpus")) in capsys.readouterr().out
    assert names["made"]["vectors/adapted"].to_ray().count() == 60

    queries, _ = factories.small_queries(factories.small_corpus(60), 12)
    lines = [line.split() for line in Path("run/runs/adapted.trec").read_text().splitlines()]
    ranked = {query.query_id: [line for line in lines if line[0] == query.query_id] for query in queries}
    found = names["retriever"].search_all([query.text for query in queries], top_k=5)
    for query, hits in zip(queries, found, strict=True):
        expected = {line[2]: float(line[4]) for line in ranked[query.query_id]}
        assert len(hits) == 5
        assert [hit.score for hit in hits] == pytest.approx(list(expected.values())[:5], abs=1e-5)
        assert all(hit.score == pytest.approx(expected[hit.doc_id], abs=1e-5) for hit in hits)
    alone = names["retriever"].search(queries[0].text, top_k=5)  # bfloat16: the batch changes the third digit
    assert [hit.score for hit in alone] == pytest.approx([hit.score for hit in found[0]], abs=3e-3)
    with pytest.raises(InputError, match="top_k = 0"):
        names["retriever"].search("a", top_k=0)
    with pytest.raises(InputError, match=r"query = .*: must be text"):
        names["retriever"].search(["a"])
    with pytest.raises(InputError, match="was not made by"):
        ra.Retriever(retriever=tiny / "retriever", index="run/index/adapted")


def _trec_qrels(file: Path) -> list[str]:
    rows = [line.split("\t") for line in file.read_text().splitlines()[1:]]
    return [f"{query_id} 0 {doc_id} {relevance}" for query_id, doc_id, relevance in rows]


@pytest.mark.slow
def test_a_corpus_without_labels_is_adapted_all_the_same(ray_session: None, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "plain.jsonl"
    source.write_text((tiny / "beir" / "corpus.jsonl").read_text())
    values = yaml.safe_load((tiny / "my-run.yaml").read_text()) | {"general": None}
    made = running.run(RunConfig(**{**values, "source": str(source), "root": str(tmp_path / "root")}))
    assert list(made) == [
        "corpus",
        "blocks",
        "adapter",
        "adapted",
        "vectors/retriever",
        "index/retriever",
        "vectors/adapted",
        "index/adapted",
        "drift",
    ]
    states = {row["artifact"]: row["state"] for row in root_status.rows(Location(str(tmp_path / "root")))}
    assert set(states.values()) == {"done"}
    assert "report" not in states
    found = made["drift"].manifest.details
    assert found["loss"]["num_passages"] == made["corpus"].manifest.counts["num_passages"] // 20
    assert 0 < found["vectors"]["mean_cosine"] < 1
    assert 0 < found["vectors"]["neighbours_kept"] <= 1


def test_tune_scores_the_retriever_as_the_run_does_and_reports_on_the_other_half(
    ray_session: None, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from readapt_ray.records import Qrel
    from readapt_ray.stages.tune import TuneConfig, tune

    passages = factories.small_corpus(60)
    queries, qrels = factories.small_queries(passages, 12)
    factories.ingest_artifact(tmp_path / "corpus", passages, queries, [*qrels, Qrel(queries[0].query_id, "gone", 1)])
    factories.dora_adapter(tmp_path / "adapter", tiny / "base")
    config = TuneConfig(
        pretrained=str(tiny / "base"),
        retriever=str(tiny / "retriever"),
        adapter=str(tmp_path / "adapter"),
        corpus=str(tmp_path / "corpus"),
        queries=str(tmp_path / "corpus" / "queries"),
        qrels=str(tmp_path / "corpus" / "qrels"),
        knowledge_scales=(0.0, 0.5),
        num_refinements=1,
        output=str(tmp_path / "tuned"),
    )
    artifact = tune(config)
    corpus = tmp_path / "corpus"
    assert f"tune: 1 of 13 judged passages are not in {corpus}, so no pair can find them: gone" in caplog.messages
    result = json.loads((artifact.location / "tune.json").read_text())
    assert result["queries"] == "judged queries"
    tried = [(cell["readapter_scale"], cell["knowledge_scale"]) for cell in result["grid"]]
    assert tried == [(1.0, 0.0), (1.0, 0.25), (1.0, 0.5)]
    assert result["reported"]["num_queries"] == 6
    best = max(result["grid"], key=lambda cell: cell["tuning"])
    if best["tuning"] > result["grid"][0]["tuning"]:
        assert result["best"] == {name: best[name] for name in ("readapter_scale", "knowledge_scale")}
    cells = {path.name: json.loads(path.read_text()) for path in (tmp_path / "tuned" / "grid").iterdir()}
    assert set(cells) == {"1_0.json", "1_0.25.json", "1_0.5.json"}
    assert cells["1_0.json"] != cells["1_0.5.json"]
    seconds = artifact.manifest.details["seconds"]
    assert seconds.keys() == {"weights", "encoding", "measuring"}
    assert all(spent > 0 for spent in seconds.values())
    assert "judged queries" in (tmp_path / "tuned" / "tune.md").read_text()
    assert "<svg" in (tmp_path / "tuned" / "tune.html").read_text()


def test_tune_without_labels_says_that_its_queries_are_pseudo(ray_session: None, tiny: Path, tmp_path: Path) -> None:
    from readapt_ray.records import Passage
    from readapt_ray.stages.tune import TuneConfig, tune

    passages = [
        Passage(each.doc_id, "", f"How does {each.doc_id} lock a thread? {each.text} {each.text}")
        for each in factories.small_corpus(20)
    ]
    factories.ingest_artifact(tmp_path / "corpus", passages)
    factories.dora_adapter(tmp_path / "adapter", tiny / "base")
    artifact = tune(
        TuneConfig(
            pretrained=str(tiny / "base"),
            retriever=str(tiny / "retriever"),
            adapter=str(tmp_path / "adapter"),
            corpus=str(tmp_path / "corpus"),
            knowledge_scales=(0.5,),
            output=str(tmp_path / "tuned"),
        )
    )
    assert artifact.manifest.details["queries"] == "pseudo-queries made from the corpus"
    assert artifact.manifest.counts["num_queries"] == 20


@pytest.mark.parametrize(
    ("splits", "reported", "chosen", "said"),
    [
        (("dev", "test", "train"), "", "dev", "the corpus's own queries of the split dev choose the scales"),
        (("test", "train"), "", "train", "of the split train choose"),
        (("dev", "train"), "dev", "train", "of the split train choose"),
        (("test",), "", None, "judgements of test, and what is reported on (test) must not choose; give others with"),
        (("dev", "test"), "dev", None, "judgements of dev, test, and what is reported on (dev, test) must not choose"),
        ((), "", None, "pseudo-queries choose the scales, since the corpus has no judgements of its own"),
    ],
)
def test_tune_takes_the_corpus_own_queries_but_never_those_that_are_reported_on(
    *,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    splits: tuple[str, ...],
    reported: str,
    chosen: str | None,
    said: str,
) -> None:
    from readapt_ray.stages import tune

    caplog.set_level(logging.INFO, logger="readapt_ray")
    base = factories.write_contract(factories.tiny_decoder(tmp_path / "base"))
    factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(8))
    for split in splits:
        Location(str(tmp_path / "corpus" / "qrels" / f"{split}.parquet")).write_text(split)
        Location(str(tmp_path / "corpus" / "queries" / "part-00000.parquet")).write_text("")
    if reported:
        (tmp_path / "report").mkdir()
        config = {"qrels": f"{tmp_path}/corpus/qrels/{reported}.parquet"}
        values = {"config": config, "inputs": {}, "counts": {}, "details": {}, "versions": {}, "files": []}
        values |= {"stage": "evaluate", "fingerprint": "1", "seconds": 1.0, "created": ""}
        (tmp_path / "report" / "manifest.json").write_text(json.dumps(values))
    asked: dict[str, Any] = {}
    monkeypatch.setattr(tune, "_tune", lambda config, *_, split: asked.update(split=split, config=config))
    tune.tune(
        tune.TuneConfig(
            pretrained=str(base),
            retriever=str(base),
            adapter=str(factories.lora_adapter(tmp_path / "adapter", base)),
            corpus=str(tmp_path / "corpus"),
            output=str(tmp_path / "tuned"),
        )
    )
    assert asked["split"] == chosen
    assert said in caplog.text
    qrels = asked["config"].qrels
    assert qrels == (f"{tmp_path}/corpus/qrels/{chosen}.parquet" if chosen else None)


class Stages:
    """Stand-ins for stages: each writes down when it began and ended, and waits for another where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, has_gpus: bool = True, broken: str = "") -> None:
        self.events: list[tuple[str, str]] = []
        self.began: dict[str, threading.Event] = defaultdict(threading.Event)
        self.waits: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._broken = broken
        monkeypatch.setattr(running, "run_stage", self._run)
        monkeypatch.setattr(running, "_leaves_gpus_idle", lambda step: has_gpus)
        monkeypatch.setattr(run_checks, "check_run", lambda *_: [])

    def _run(self, stage: str, config: Any) -> SimpleNamespace:
        name = config.output.partition("/root/")[2]
        self.events.append(("begin", name))
        self.began[name].set()
        if name in self.waits:
            assert self.began[self.waits[name]].wait(300), f"{name} and {self.waits[name]} do not run at once"
        if name == self._broken:
            raise ModelError("broken")
        time.sleep(self.seconds.get(name, 0.0))
        self.events.append(("end", name))
        return SimpleNamespace(fingerprint=name)


def run_of(tmp_path: Path) -> RunConfig:
    return RunConfig(root=str(tmp_path / "root"), source="x", pretrained="a", retriever="b")


def test_gpus_embed_with_the_retriever_while_the_adapted_model_is_merged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "root").mkdir()
    stages = Stages(monkeypatch)
    stages.waits = {"adapted": "vectors/retriever", "index/retriever": "vectors/adapted"}
    made = running.run(run_of(tmp_path))
    assert set(made) == {name for _, name in stages.events}
    order = stages.events.index
    assert order(("end", "adapter")) < order(("begin", "vectors/retriever"))
    assert order(("end", "adapted")) < order(("begin", "index/retriever"))
    assert order(("end", "adapted")) < order(("begin", "vectors/adapted")), "it is made with that model"
    assert order(("end", "index/retriever")) < order(("begin", "index/adapted"))


def test_without_gpus_one_stage_runs_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    stages = Stages(monkeypatch, has_gpus=False)
    running.run(run_of(tmp_path))
    names = [name for what, name in stages.events if what == "begin"]
    assert stages.events == [(what, name) for name in names for what in ("begin", "end")]


def test_what_fails_in_the_background_fails_the_run_after_the_stage_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "root").mkdir()
    stages = Stages(monkeypatch, broken="adapted")
    with pytest.raises(ModelError, match="broken"):
        running.run(run_of(tmp_path))
    assert ("end", "vectors/retriever") in stages.events, "it is kept for the next start"
    assert ("begin", "vectors/adapted") not in stages.events


def test_what_runs_in_the_background_is_waited_for_where_the_stage_beside_it_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "root").mkdir()
    stages = Stages(monkeypatch, broken="vectors/retriever")
    stages.waits, stages.seconds = {"vectors/retriever": "adapted"}, {"adapted": 0.5}
    with pytest.raises(ModelError, match="broken"):
        running.run(run_of(tmp_path))
    assert stages.events[-1] == ("end", "adapted"), "it is kept for the next start"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["LlamaModel"]}, "no language-model head"),
        ({"model_type": "gpt2"}, "no target modules are known"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_before_packing(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    base = factories.tiny_decoder(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(8))
    with pytest.raises(ModelError, match=said):
        chain.train_on_passages(
            TrainConfig(pretrained=str(base), corpus=str(tmp_path / "corpus"), output=str(tmp_path / "adapter"))
        )
    assert not (tmp_path / "adapter-blocks").exists()
