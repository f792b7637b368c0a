"""Commands that write more than one artifact refuse files of other programs before they start."""

import json
from pathlib import Path
from typing import Any

import pytest

from readapt_ray import artifacts
from readapt_ray.catalog.contracts import show_contract
from readapt_ray.config import StageConfig
from readapt_ray.errors import ArtifactConflictError, ModelError
from readapt_ray.recipes import chain, compare, quickstart, running
from readapt_ray.recipes.compare_plan import CompareConfig
from readapt_ray.recipes.paper import experiments
from readapt_ray.recipes.paper.options import PaperConfig
from readapt_ray.recipes.refreshing import lock
from readapt_ray.serving.options import ServeConfig
from readapt_ray.serving.server import serve
from readapt_ray.storage import Location
from tests import factories

BUILT_IN = {"pretrained": "quickstart-pretrained", "retriever": "quickstart-retriever"}


def run_all(root: str) -> None:
    running.run(chain.RunConfig(root=root, source="python-docs:json", **BUILT_IN))


def compare_all(root: str) -> None:
    compare.compare(CompareConfig(retrievers=("quickstart-retriever",), corpus="nothing", output=root))


def paper_all(root: str) -> None:
    experiments.run(PaperConfig(root=root, corpora=("own=nothing.jsonl",), **BUILT_IN))


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (run_all, "run.json"),
        (compare_all, "compare.json"),
        (compare_all, "compare.md"),
        (paper_all, "table1.json"),
        (paper_all, "table1.md"),
        (quickstart.run, "answer.json"),
    ],
)
def test_results_of_another_program_are_in_the_way(command: Any, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"precious": true}')
    with pytest.raises(ArtifactConflictError, match=f"{name} is there, and readapt did not write it"):
        command(str(tmp_path))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: '{"precious": true}'}


class _EvaluateConfig(StageConfig):
    """The options of a report that say whose it is."""

    runs: tuple[str, ...]
    """Run files."""
    names: tuple[str, ...] = ()
    """What they are called."""


@pytest.mark.parametrize(
    ("runs", "names", "is_its_own"),
    [
        (("r/runs/base.trec", "r/runs/adapted.trec"), (), False),
        (("mine/a.trec",), ("b",), False),
        (("r/runs/a.trec", "r/runs/a-finetune.trec"), ("a", "a + finetune"), True),
    ],
)
def test_compare_replaces_only_a_report_of_its_own(
    runs: tuple[str, ...], names: tuple[str, ...], is_its_own: bool, tmp_path: Path
) -> None:
    config = _EvaluateConfig(output=str(tmp_path / "report"), runs=runs, names=names)
    artifacts.produce("evaluate", config, inputs={}, work=lambda w: None)
    said = "does not exist" if is_its_own else "is not a report of `readapt compare`"
    with pytest.raises(artifacts.InputError, match=said):
        compare_all(str(tmp_path))


def test_the_file_of_serve_replaces_its_like_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    config = ServeConfig(retriever="r", index="i", write_config=str(file))
    for max_replicas in (1, 2):
        serve(config.model_copy(update={"max_replicas": max_replicas}))
    before = file.read_text()
    assert "readapt_ray.serving.app:gateway" in before
    for content in (
        "",
        "not: [YAML",
        "kind: Deployment",
        json.dumps({"applications": []}),
        json.dumps({"applications": [{"import_path": "mine:app"}]}),
    ):
        file.write_text(content)
        with pytest.raises(ArtifactConflictError, match=r"serve\.yaml' is there, and `readapt serve` did not write it"):
            serve(config)
        assert file.read_text() == content


@pytest.mark.parametrize("content", ["", "{}", '{"owner": "ACME"}', "not JSON"])
def test_a_lock_of_another_program_is_in_the_way(content: str, tmp_path: Path) -> None:
    file = tmp_path / "refreshing.json"
    file.write_text(content)
    if content:
        said = r"refreshing\.json is there, and readapt did not write it"
        with pytest.raises(ArtifactConflictError, match=said), lock.locked(Location(str(tmp_path))):
            pass
        assert file.read_text() == content
    else:  # what a driver leaves that is killed as it takes the lock
        with lock.locked(Location(str(tmp_path))):
            assert file.read_text()


def test_the_quickstart_replaces_only_its_own_list_of_passages(tmp_path: Path) -> None:
    passages = factories.small_corpus(9)
    factories.ingest_artifact(tmp_path / "corpus", passages)
    corpus, root, file = (
        artifacts.open_artifact(str(tmp_path / "corpus"), "ingest"),
        str(tmp_path),
        tmp_path / "trained-on.txt",
    )
    file.write_text("precious")
    with pytest.raises(ArtifactConflictError, match=r"trained-on\.txt is there, and readapt did not write it"):
        quickstart.choose_passages(corpus, root)
    assert file.read_text() == "precious"
    ids = "".join(f"{each.doc_id}\n" for each in passages[::3])
    file.write_text(ids)  # it was killed before it wrote run.json
    quickstart.choose_passages(corpus, root)
    file.write_text("of an earlier version of torch\n")
    (tmp_path / "run.json").write_text(
        json.dumps({"steps": [], "config": quickstart.recipe(root).model_dump(mode="json")})
    )
    quickstart.choose_passages(corpus, root)
    assert file.read_text() == ids


@pytest.mark.parametrize("content", ['{"name": "app"}', '{"encoding": "utf-8"}'])
def test_a_readapt_json_of_another_program_is_neither_read_nor_replaced(content: str, tmp_path: Path) -> None:
    folder = factories.tiny_encoder(tmp_path / "model")
    (folder / "readapt.json").write_text(content)
    for write in (False, True):
        with pytest.raises(ModelError, match=r"readapt\.json has no section 'encoding', so it is not of readapt"):
            show_contract(str(folder), write=write)
    assert (folder / "readapt.json").read_text() == content
