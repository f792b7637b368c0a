"""Refreshes of other columns than texts, exports that did not end, and what `find` and `clean` say of it."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from readapt_ray import artifact_files, artifacts
from readapt_ray.errors import ArtifactConflictError, InputError, TargetError
from readapt_ray.recipes.refreshing.clean import clean
from readapt_ray.recipes.refreshing.find import find
from readapt_ray.recipes.refreshing.options import CleanConfig, FindConfig
from readapt_ray.sources import parts
from readapt_ray.stages import export
from tests import factories
from tests.recipes.refreshing import root as roots
from tests.recipes.refreshing.root import Root, StandIns

PASSAGES = factories.small_corpus(40)
FEWER = PASSAGES[2:]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return roots.models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def root(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    StandIns(monkeypatch)
    made = Root(tmp_path, models / "model")
    made.holds(PASSAGES)
    return made


def holds_with_url(root: Root, url: str | None) -> None:
    rows = [{"_id": each.doc_id, "title": each.title, "text": each.text, "url": url} for each in PASSAGES]
    root.source.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_other_values_of_a_kept_column_make_a_generation(root: Root, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "readapt_ray")
    target = f"files:{root.folder}/collection"
    for number, url in enumerate(("a", "b", None), start=1):
        holds_with_url(root, url)
        made = root.refresh(to=target, **({"ingest": {"keep": ["url"]}} if number == 1 else {}))
        assert made.number == number
        assert set(root.table(made, "corpus", "passages")["url"].to_pylist()) == {url}
        assert {value for values in exported(root, "url") for value in values} == {url}
    assert caplog.messages.count("refresh: the kept columns of 40 passages differ") == 2
    assert (made.counts["changed"], made.counts["kept"]) == (0, 40)
    root.source.write_text("".join(reversed(root.source.read_text().splitlines(keepends=True))))
    assert root.refresh().number == 3, "the same rows in another order"


def test_a_column_that_is_newly_kept_arrives(root: Root) -> None:
    holds_with_url(root, "a")
    root.refresh()
    with pytest.raises(InputError, match=r"ingest\.keep: "):
        root.refresh(ingest={"keep": ["url"]})
    made = root.refresh(ingest={"keep": ["url"]}, overwrite=True)
    assert set(root.table(made, "corpus", "passages")["url"].to_pylist()) == {"a"}


def exported(root: Root, column: str) -> list[list[Any]]:
    return [pq.read_table(file)[column].to_pylist() for file in (root.folder / "collection").glob("*.parquet")]


def fail_to_export(root: Root, monkeypatch: pytest.MonkeyPatch, to: str, **options: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TargetError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(export, "send_all", refuse)
        with pytest.raises(TargetError):
            root.refresh(to=to, **options)


def test_a_first_export_that_fails_is_done_by_the_next_refresh(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    root.refresh()
    target = f"files:{root.folder}/collection"
    fail_to_export(root, monkeypatch, target)
    root.holds(FEWER)
    assert "export" in root.refresh(to=target).artifacts
    root.refresh()
    assert {each for ids in exported(root, "doc_id") for each in ids} == {each.doc_id for each in FEWER}
    clean(CleanConfig(root=root.uri, yes=True))


def test_an_export_by_another_model_is_finished_by_the_same_command_alone(
    root: Root, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"files:{root.folder}/collection"
    first = root.refresh(to=target)
    other = {"retriever": str(models / "other"), "overwrite": True}
    fail_to_export(root, monkeypatch, target, **other)
    root.holds(FEWER)
    with pytest.raises(InputError, match=rf"did not end, and {target} is half changed; run that command again"):
        root.refresh()
    assert root.there() == [first]
    assert root.refresh(**other).settings["retriever"] == str(models / "other")
    assert root.passages(root.refresh()).keys() == {each.doc_id for each in FEWER}


@pytest.mark.parametrize("to", [None, "files:{folder}/other"])
def test_an_export_that_failed_is_left_for_another_target_or_none(
    root: Root, monkeypatch: pytest.MonkeyPatch, to: str | None
) -> None:
    root.refresh()
    wrong = f"files:{root.folder}/collection"
    to = to and to.format(folder=root.folder)
    fail_to_export(root, monkeypatch, wrong)
    root.holds(FEWER)
    with pytest.raises(
        InputError, match=rf"begun to export to {wrong}, and this one .*--to {wrong}, or add --overwrite"
    ):
        root.refresh(to=to)
    made = root.refresh(to=to, overwrite=True)
    assert (made.number, made.settings["to"], "export" in made.artifacts) == (2, to, to is not None)
    assert root.passages(made).keys() == {each.doc_id for each in FEWER}
    assert root.refresh() == made
    clean(CleanConfig(root=root.uri, yes=True))


def test_a_list_of_generations_that_was_removed_brings_no_earlier_state_back(root: Root) -> None:
    to = f"files:{root.folder}/collection"
    root.refresh(to=to)
    for passages in (FEWER, FEWER[2:]):
        root.holds(passages)
        before = root.refresh()
    (root.location / "refresh.json").delete()
    root.holds(FEWER[4:])
    with pytest.raises(
        ArtifactConflictError, match=r"holds another export of the same encoder.* or --overwrite to replace it"
    ):
        root.refresh(to=to)
    made = root.refresh(to=to, overwrite=True)
    assert root.passages(made).keys() == {each.doc_id for each in FEWER[4:]} and made.number > before.number
    assert {each for ids in exported(root, "doc_id") for each in ids} == {each.doc_id for each in FEWER[4:]}
    assert root.passages(before).keys() == {each.doc_id for each in FEWER[2:]}, "who searches it is not disturbed"
    assert root.refresh() == made
    clean(CleanConfig(root=root.uri, yes=True))
    assert {name.partition("/")[0] for name in (root.location / "generations").entries()[0]} == {f"{made.number:05d}"}


@pytest.mark.parametrize("others", ["removed", "exported", "wrote"])
def test_a_collection_that_others_changed_is_noticed_and_made_again(root: Root, models: Path, others: str) -> None:
    """By a refresh of an unchanged source, of a changed one, and by going back."""
    collection = root.folder / "collection"
    root.refresh(to=f"files:{collection}")
    root.holds(FEWER)
    made = root.refresh()
    if others == "exported":
        (root.folder / "other").mkdir()
        other = Root(root.folder / "other", models / "other", str(root.folder / "other/root"))
        other.holds(PASSAGES[:9])
        other.refresh(to=f"files:{collection}", overwrite=True)
    else:
        shutil.rmtree(collection)
        if others == "wrote":
            collection.mkdir()
            (collection / "notes.txt").write_text("mine")
    what = {
        "removed": "is gone",
        "exported": "was written by another export",
        "wrote": "was written by another program",
    }
    for holds in (FEWER, PASSAGES[5:]):
        root.holds(holds)
        with pytest.raises(InputError, match=rf"collection {what[others]}.* Stale.*: export \(.*add --overwrite"):
            root.refresh()
    with pytest.raises(InputError, match=rf"collection {what[others]}.*refresh --root {root.uri} --overwrite` first"):
        root.refresh(back=1)
    assert root.there()[-1] == made
    if others == "wrote":
        with pytest.raises(ArtifactConflictError, match="readapt did not write it"):
            root.refresh(overwrite=True)
        return
    root.holds(FEWER)
    assert root.refresh(overwrite=True).number == made.number + 1
    assert {each for ids in exported(root, "doc_id") for each in ids} == {each.doc_id for each in FEWER}
    root.refresh(back=1)
    assert {each for ids in exported(root, "doc_id") for each in ids} == {each.doc_id for each in PASSAGES}


def test_rows_that_others_deleted_are_said_and_what_is_advised_mends_it(root: Root) -> None:
    collection = root.folder / "collection"
    root.refresh(to=f"files:{collection}")
    for part in collection.rglob("*.parquet"):
        part.unlink()
    root.holds(FEWER)
    with pytest.raises(TargetError, match=r"rows were deleted in between; remove the collection and run"):
        root.refresh()
    shutil.rmtree(collection)
    with pytest.raises(InputError, match=r"collection is gone.*add --overwrite"):
        root.refresh()
    root.refresh(overwrite=True)
    assert {each for ids in exported(root, "doc_id") for each in ids} == {each.doc_id for each in FEWER}
    assert root.refresh() == root.there()[-1]


def test_going_back_keeps_the_target_for_later_refreshes(root: Root) -> None:
    root.refresh()
    target = f"files:{root.folder}/collection"
    root.refresh(to=target)
    root.holds(FEWER)
    root.refresh()
    assert root.refresh(back=1).settings["to"] == target
    root.holds(PASSAGES[5:])
    assert "export" in root.refresh().artifacts
    assert {each for ids in exported(root, "doc_id") for each in ids} == {each.doc_id for each in PASSAGES[5:]}


def test_what_was_removed_stays_removed_and_does_not_count_as_kept(root: Root) -> None:
    root.refresh()
    for number in range(1, 5):
        root.holds(PASSAGES[number:])
        root.refresh()
        clean(CleanConfig(root=root.uri, yes=True, keep=0 if number == 1 else 2))
    assert [each.freed for each in root.there()] == [True, True, True, False, False, False]
    for each in root.there():
        if not each.freed:
            artifacts.open_artifact(each.folder(root.location, "corpus"), "ingest")


def test_find_takes_no_rank_for_an_id_and_passes_over_a_file_that_was_not_finished(root: Root) -> None:
    made = root.refresh()

    class Options(artifacts.StageConfig):
        """None."""

    run = artifacts.produce(
        "search",
        Options(output=f"{root.uri}/base.trec"),
        inputs={},
        work=lambda workspace: workspace.location.write_text("q1 Q0 other 5 0.5 r\nq1 Q0 7 6 5 r\n"),
    )
    part = Path(made.folder(root.location, "corpus")) / "passages/part-00000.parquet"
    part.with_name(".tmp-0123456789ab-part-00001.parquet").write_bytes(part.read_bytes()[:99])
    found = {doc_id: find(FindConfig(root=root.uri, doc_id=doc_id)) for doc_id in ("5", "Q0", "6", "q1", "7", "other")}
    assert {doc_id for doc_id, rows in found.items() if rows} == {"7", "other"}
    assert [row["artifact"] for row in found["7"]] == [run.location.name]


def test_clean_removes_what_a_killed_refresh_shares_with_an_earlier_generation(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.refresh(ingest={"rows_per_file": 10})
    root.holds([*PASSAGES[:39], PASSAGES[39]._replace(text="something new")])
    root.refresh()
    root.holds([*PASSAGES[:39], PASSAGES[39]._replace(text="something newer")])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts.PartWriter, "close", interrupt)
        root.refresh()
    left = Path(root.uri) / "generations/00003/corpus"
    assert len(list(left.glob("passages/*.parquet"))) == 3
    monkeypatch.setattr(artifact_files, "_LAST_WRITES_S", 0.2)
    time.sleep(0.5)
    clean(CleanConfig(root=root.uri, yes=True))
    assert not left.exists()
    assert root.refresh().counts["changed"] == 1


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_local_target_is_the_same_folder_from_anywhere(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.folder)
    root.refresh(to="files:collection")
    monkeypatch.chdir(tmp_path.parent)
    root.holds(FEWER)
    root.refresh()
    assert {each for ids in exported(root, "doc_id") for each in ids} == {each.doc_id for each in FEWER}


def test_clean_removes_nothing_by_a_link_to_the_present_generation(root: Root, tmp_path: Path) -> None:
    root.refresh()
    root.holds([*PASSAGES[:39], PASSAGES[39]._replace(text="something new")])
    made = root.refresh()
    (Path(root.uri) / "current").symlink_to(Path(root.uri) / "generations/00002")
    (Path(root.uri) / "up").symlink_to(root.folder)
    (tmp_path / "elsewhere").mkdir()
    (Path(root.uri) / "generations/00001").rename(tmp_path / "elsewhere/00001")
    (Path(root.uri) / "generations/00001").symlink_to(tmp_path / "elsewhere/00001")
    names = artifacts.names_under(root.location)
    assert names == [f"generations/0000{number}/{name}" for number in (1, 2) for name in ("corpus", "index", "vectors")]
    freed = {str(row["artifact"]) for row in clean(CleanConfig(root=root.uri, yes=True)).rows}
    assert freed >= {f"generations/00001/{name}" for name in ("corpus", "index", "vectors")}
    assert not list((tmp_path / "elsewhere/00001").rglob("*.parquet"))
    for name, folder in root.there()[-1].artifacts.items():
        assert artifacts.read_manifest(root.location / folder) is not None, name
    assert made.artifacts["corpus"] == root.there()[-1].artifacts["corpus"]
