"""Which variants an experiment has, on which passages their adapters are trained, and a whole one on tiny models."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from readapt_ray import cli
from readapt_ray.catalog import corpora
from readapt_ray.errors import CorpusError, InputError, ModelError
from readapt_ray.recipes.paper.experiments import run
from readapt_ray.recipes.paper.options import PaperConfig, collection
from readapt_ray.recipes.paper.published import paper_gain, paper_scores
from readapt_ray.recipes.paper.reproduction import Reproduction
from readapt_ray.recipes.paper.variants import EXPERIMENTS, variants_of
from readapt_ray.storage import Location
from tests import factories

TRAIN = {"block_tokens": 64, "batch_size": 8, "num_workers": 1, "num_cpus_per_worker": 1}


def config(tiny: Path, **changes: Any) -> PaperConfig:
    values = {
        "root": str(tiny / "root"),
        "retriever": str(tiny / "retriever"),
        "pretrained": str(tiny / "base"),
        "corpora": ["nfcorpus", "scifact"],
        "general": "scifact",
        "data": str(tiny / "data"),
        "sizes": [20, 500],
        "train": TRAIN,
        "embed": {"dimensions": 16},
    }
    return PaperConfig.parse(values | changes)


def named(reproduction: Reproduction, experiment: str, seed: int = 0) -> list[tuple[str, str]]:
    return [(own.name, variant.name) for own, variant in reproduction.steps(experiment, seed)]


def test_every_experiment_begins_with_the_retriever_as_it_is_and_readapted() -> None:
    for experiment in EXPERIMENTS:
        variants = variants_of(experiment, (10,))
        assert [variant.name for variant in variants[:2]] == ["base", "readapted"]
        assert len({variant.name for variant in variants}) == len(variants)
        assert not variants[0].has_seed
        assert variants[1].has_seed


def test_arms_that_a_corpus_cannot_have_are_left_out(tiny: Path) -> None:
    reproduction = Reproduction(config(tiny, experiments=["all"]))
    both = [("nfcorpus", "base"), ("nfcorpus", "readapted")]
    assert named(reproduction, "table3") == [
        *both,
        ("nfcorpus", "general adapter"),
        ("scifact", "base"),
        ("scifact", "readapted"),
    ]
    assert named(reproduction, "figure2")[:3] == [*both, ("nfcorpus", "20 passages")]
    assert "500 passages" not in {variant for _, variant in named(reproduction, "figure2")}
    alone = Reproduction(config(tiny, corpora=["nfcorpus"], experiments=["baselines"]))
    assert "wrong domain" not in {variant for _, variant in named(alone, "baselines")}
    assert "wrong domain" in {variant for _, variant in named(reproduction, "baselines")}


def test_everything_is_under_a_store_whose_address_has_options(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "?scheme=http&endpoint_override=127.0.0.1:9000"
    reproduction = Reproduction(config(tiny, root=f"s3://bucket/paper{options}"))
    asked = []

    def make(stage: str, _: Any, __: Any, **wired: Any) -> SimpleNamespace:
        asked.append((stage, wired))
        return SimpleNamespace(uri=wired["output"], location=Location(wired["output"]))

    monkeypatch.setattr("readapt_ray.recipes.paper.reproduction.make", make)
    for own, variant in reproduction.steps("table1", 0):
        reproduction.search(own, variant, 0)
    places = {value for _, wired in asked for value in wired.values() if str(value).startswith("s3://")}
    assert all(place.endswith(options) and place.count("?") == 1 for place in places)
    paths = {place.removesuffix(options).removeprefix("s3://bucket/paper/") for place in places}
    assert {
        "nfcorpus/corpus/queries",
        "nfcorpus/corpus/qrels/test.parquet",
        "scifact/runs/readapted-seed0.trec",
    } < paths


def test_layer_scales_are_those_of_every_merge_that_adds_knowledge(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reproduction = Reproduction(config(tiny, corpora=["nfcorpus"], layer_scales=["0=0.25"]))
    merged = {}

    def make(stage: str, _: Any, __: Any, **wired: Any) -> SimpleNamespace:
        if stage == "merge":
            merged[Location(wired["output"]).name] = wired.get("layer_scales")
        return SimpleNamespace(uri=wired["output"], location=Location(wired["output"]))

    monkeypatch.setattr("readapt_ray.recipes.paper.reproduction.make", make)
    for variant in variants_of("baselines"):
        if not variant.is_base and not variant.continues_retriever and variant.domain == "own":
            reproduction._model(reproduction.collections["nfcorpus"], variant, 0)
    assert merged == {
        **dict.fromkeys(("readapted-seed0", "knowledge-alone-seed0", "plain-LoRA-seed0"), ("0=0.25",)),
        **dict.fromkeys(("readapter-0.5", "readapter-1.5")),
    }
    with pytest.raises(InputError, match=r"layer_scales = '90=0\.25'"):
        Reproduction(config(tiny, layer_scales=["90=0.25"]))


def test_only_what_a_seed_changes_is_made_again_for_another_seed(tiny: Path) -> None:
    reproduction = Reproduction(config(tiny, seeds=[3, 4]))
    first, second = (dict.fromkeys(variant for _, variant in named(reproduction, "baselines", seed)) for seed in (3, 4))
    assert first.keys() - second.keys() == {"base", "readapter 0.5", "readapter 1.5"}


def test_parts_of_a_corpus_are_its_judged_its_unjudged_or_so_many_passages(tiny: Path) -> None:
    reproduction = Reproduction(config(tiny))
    own = reproduction.collections["nfcorpus"]
    variants = {
        variant.passages: variant
        for experiment in ("table2", "figure2")
        for variant in variants_of(experiment, (5, 20))
    }
    ids = {
        passages: set(pq.read_table(f"{reproduction._passages(own, variant, 0)}/passages")["doc_id"].to_pylist())
        for passages, variant in variants.items()
    }
    lines = (tiny / "data/nfcorpus/qrels/test.tsv").read_text().splitlines()[1:]
    assert ids["judged"] == {line.split("\t")[1] for line in lines}
    assert len(ids["all"]) == 60
    assert ids["unjudged"] == ids["all"] - ids["judged"]
    assert (len(ids["5"]), len(ids["20"])) == (5, 20)
    assert ids["5"] < ids["20"] < ids["all"]
    text = pq.read_table(f"{reproduction._passages(own, variants['5'], 0)}/passages").to_pylist()[0]
    whole = {row["doc_id"]: row for row in pq.read_table(f"{reproduction.corpus(own).uri}/passages").to_pylist()}
    assert text == whole[text["doc_id"]]


def test_a_part_that_has_no_passage_is_left_out_and_said_once(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    beir = tiny / "all-judged"
    shutil.copytree(tiny / "data" / "nfcorpus", beir)
    doc_ids = [json.loads(line)["_id"] for line in (beir / "corpus.jsonl").read_text().splitlines()]
    query_id = json.loads((beir / "queries.jsonl").read_text().splitlines()[0])["_id"]
    lines = ["query-id\tcorpus-id\tscore", *(f"{query_id}\t{doc_id}\t1" for doc_id in doc_ids)]
    (beir / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    reproduction = Reproduction(config(tiny, experiments=["table2"], corpora=[f"whole={beir}", "scifact"]))
    for _ in range(2):
        variants = named(reproduction, "table2")
        assert ("whole", "unjudged passages") not in variants
        assert {("whole", "judged passages"), ("scifact", "unjudged passages")} < set(variants)
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert said == [
        "whole: no passage is unjudged in the split test (every one is judged), so the variant 'unjudged passages' is left out"
    ]


def test_a_folder_called_like_a_corpus_of_the_catalog_is_not_scored_as_that_corpus_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nfcorpus").mkdir()
    with pytest.raises(
        CorpusError, match=r"'nfcorpus' is a corpus of the catalog and a folder here.*nfcorpus=nfcorpus"
    ):
        collection("nfcorpus", None)
    assert collection("nfcorpus=nfcorpus", None).source == "nfcorpus"
    assert collection("nfcorpus", str(tmp_path)).source == str(tmp_path / "nfcorpus")
    assert collection("mine=nfcorpus", None).name == "mine"


def test_a_corpus_is_a_name_of_the_catalog_or_a_name_and_a_source(tiny: Path) -> None:
    assert collection("nfcorpus", str(tiny / "data")).source == str(tiny / "data" / "nfcorpus")
    assert collection("NFCorpus", None).source == "nfcorpus"
    quora = collection("quora=/mine", None)
    assert (quora.source, quora.drops_self_hits, quora.task) == ("/mine", True, corpora.corpus("quora").task)
    own = collection("numpy=python-docs:numpy", None)
    assert (own.name, own.source, own.split, own.drops_self_hits) == ("numpy", "python-docs:numpy", "test", False)
    with pytest.raises(CorpusError, match="no corpus 'nosuch'"):
        collection("nosuch", None)
    with pytest.raises(CorpusError, match="NAME=SOURCE"):
        collection("../x=y", None)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"experiments": ["table4"]}, InputError, "give some of table1"),
        ({"corpora": []}, InputError, "at least one"),
        ({"seeds": [1, 1]}, InputError, "none twice"),
        ({"measure": "nDCG@10,R@5"}, InputError, "give one measure"),
        ({"corpora": ["nosuch"]}, CorpusError, "no corpus 'nosuch'"),
        ({"retriever": "absent-model"}, InputError, "absent-model"),
        ({"pretrained": "absent-model"}, ModelError, "absent-model"),
        ({"train": {"lora_rnak": 3}}, InputError, "section 'train': unknown option 'lora_rnak'"),
        ({"train": {"seed": 3}}, InputError, "section 'train' sets seed, which the reproduction itself sets"),
        ({"train": {"exclude": "x"}}, InputError, "section 'train': exclude = 'x' is refused: .*; give one corpus"),
        ({"train": {"only": "x"}, "corpora": ["nfcorpus"]}, InputError, "section 'train': only = 'x' is not there"),
        ({"embed": {"sample": "1%"}}, InputError, "section 'embed': sample = '1%' is refused: .*;"),
        ({"embed": {"previous": "x"}}, InputError, "section 'embed': previous = 'x' is refused: .*;"),
        ({"search": {"index": "x"}}, InputError, "section 'search': index = 'x' is refused: .*;"),
        ({"search": {"encoding": "x.json"}}, InputError, "section 'search': encoding = 'x.json' is refused: .*;"),
        ({"search": {"qrels": "x"}}, InputError, "section 'search' sets qrels, which the reproduction itself sets"),
    ],
)
def test_bad_input_is_named_before_any_stage_starts(
    tiny: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(config(tiny, root=str(tmp_path / "root"), **changes))
    assert not (tmp_path / "root").exists()


def test_every_option_of_pack_reaches_pack_and_train(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, dict[str, Any]] = {}

    def stage(name: str, options: dict[str, Any], **wired: Any) -> SimpleNamespace:
        made[name] = options | wired
        return SimpleNamespace(uri=wired["output"])

    listed = str(tiny / "data/nfcorpus/qrels/test.tsv")
    options = {"mode": "packed", "block_tokens": 64, "exclude": listed, "only": listed, "overwrite": True}
    reproduction = Reproduction(config(tiny, train=options, corpora=["nfcorpus"]))
    monkeypatch.setattr(reproduction, "_make", stage)
    reproduction._adapter(reproduction.collections["nfcorpus"], variants_of("table1")[1], 0)
    assert options.items() <= made["pack"].items()
    assert options.items() <= made["train"].items()


def test_the_scales_are_those_that_are_given_where_a_variant_names_none(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[tuple[float, float]] = []

    def stage(name: str, _: dict[str, Any], **wired: Any) -> SimpleNamespace:
        if name == "merge":
            merged.append((wired["readapter_scale"], wired["knowledge_scale"]))
        return SimpleNamespace(uri=wired["output"])

    given = config(tiny, readapter_scale=0.75, knowledge_scale=0.25, corpora=["nfcorpus"])
    reproduction = Reproduction(given)
    monkeypatch.setattr(reproduction, "_make", stage)
    for variant in (variants_of("table1")[1], *variants_of("baselines")):
        if variant.name in ("readapted", "readapter 0.5", "knowledge alone"):
            reproduction._model(reproduction.collections["nfcorpus"], variant, 0)
    assert merged[0] == (0.75, 0.25)
    assert {(0.5, 0.0), (0.0, 1.0)} <= set(merged)


def test_the_papers_gains_agree_with_its_scores() -> None:
    for retriever in ("repllama", "e5-mistral"):
        rows = [paper_scores(retriever, row.name) for row in corpora.CORPORA]
        means = [sum(getattr(row, side) for row in rows if row) / 14 for side in ("base", "readapted")]
        expected = {"repllama": (53.7, 54.3), "e5-mistral": (53.5, 55.4)}[retriever]
        assert [round(mean, 1) for mean in means] == pytest.approx(expected, abs=0.11)
        assert paper_gain(retriever, "nfcorpus", "judged passages") == {"repllama": 0.5, "e5-mistral": 1.1}[retriever]
        assert paper_gain(retriever, "quora", "readapted") == {"repllama": 2.7, "e5-mistral": 2.4}[retriever]
    assert paper_scores("m3e-base", "nfcorpus") is None


def test_one_command_makes_table_1_and_the_same_again_makes_nothing(
    ray_session: None, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    (tmp_path / "paper.yaml").write_text(
        yaml.safe_dump(config(tiny, corpora=["nfcorpus"]).model_dump(mode="json", exclude={"root"}))
    )
    arguments = ["paper", "--config", str(tmp_path / "paper.yaml"), "--root", str(tmp_path / "root")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# table1")
    result = json.loads((tmp_path / "root" / "table1.json").read_text())
    assert [(row["corpus"], row["arm"], row["num_queries"]) for row in result["rows"]] == [
        ("nfcorpus", "base", 12),
        ("nfcorpus", "readapted", 12),
    ]
    merged = json.loads((tmp_path / "root/nfcorpus/models/readapted-seed0/manifest.json").read_text())
    assert (merged["details"]["readapter_scale"], merged["details"]["knowledge_scale"]) == (1.0, [0.5])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "root").rglob("manifest.json")}
    assert cli.main(arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "root").rglob("manifest.json")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_experiment_is_one_command(ray_session: None, tiny: Path, tmp_path: Path) -> None:
    said = run(config(tiny, root=str(tmp_path / "root"), experiments=["all"]))
    assert list(said) == list(EXPERIMENTS)
    for experiment in EXPERIMENTS:
        rows = json.loads((tmp_path / "root" / f"{experiment}.json").read_text())["rows"]
        base = {row["corpus"]: row["mean"] for row in rows if row["arm"] == "base"}
        assert base.keys() == {"nfcorpus", "scifact"}
        assert all(0 <= row["mean"] <= 1 for row in rows)
    continued = tmp_path / "root/nfcorpus/adapters/continued-seed0/adapter_config.json"
    assert json.loads(continued.read_text())["base_model_name_or_path"].endswith("retriever-with-head")


@pytest.mark.slow
def test_a_retriever_with_tied_embeddings_is_trained_on_as_it_is(ray_session: None, tiny: Path, tmp_path: Path) -> None:
    base = factories.tiny_decoder(tmp_path / "base", tie_word_embeddings=True)
    retriever = factories.write_contract(factories.full_retriever(tmp_path / "retriever", base))
    reproduction = Reproduction(
        config(tiny, root=str(tmp_path / "root"), pretrained=str(base), retriever=str(retriever))
    )
    folder = Path(reproduction._continued(reproduction.collections["nfcorpus"], 0))
    trained_on = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(trained_on).name == "retriever"
    body, expected = (factories.read_tensors(each) for each in (Path(trained_on), retriever))
    assert body.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in body.items())
