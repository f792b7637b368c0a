"""`readapt refresh`: what it finds, makes, shares and refuses, with stand-ins for embed and index."""

import datetime
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from readapt_ray import artifacts, cli, generations
from readapt_ray.catalog import cache_entries
from readapt_ray.config import Config
from readapt_ray.errors import ArtifactConflictError, CorpusError, CorruptFileError, InputError
from readapt_ray.generations import Generation
from readapt_ray.recipes.refreshing import history
from readapt_ray.recipes.refreshing import refresh as refreshing
from readapt_ray.recipes.refreshing.clean import clean
from readapt_ray.recipes.refreshing.find import find
from readapt_ray.recipes.refreshing.lock import LOCK_NAME
from readapt_ray.recipes.refreshing.options import CleanConfig, FindConfig
from readapt_ray.serving.options import ServeConfig
from readapt_ray.stages.search import SearchConfig
from tests import factories
from tests.recipes.refreshing import root as roots
from tests.recipes.refreshing.root import Root, StandIns

PASSAGES = factories.small_corpus(40)
REST = [each for each in PASSAGES if each.doc_id not in ("d00003", "d00007")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return roots.models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(monkeypatch)


@pytest.fixture
def root(tmp_path: Path, models: Path, stages: StandIns) -> Root:
    made = Root(tmp_path, models / "model")
    made.holds(PASSAGES)
    return made


def counts(generation: Generation) -> tuple[int, ...]:
    return tuple(generation.counts[name] for name in ("added", "changed", "deleted", "kept"))


def test_only_what_changed_is_counted_and_an_unchanged_source_ends_in_one_line(
    root: Root, stages: StandIns, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "readapt_ray")
    first = root.refresh()
    assert counts(first) == (40, 0, 0, 0)
    assert stages.calls == [("ingest", False), ("embed", False), ("index", False)]
    stages.calls.clear()
    caplog.clear()
    assert root.refresh() == first and not stages.calls
    assert [each.getMessage() for each in caplog.records] == [
        f"refresh: nothing changed in {root.source} since generation 1"
    ]
    now = [*REST, PASSAGES[0]._replace(doc_id="new", text="something new")]
    now[5] = now[5]._replace(title="another title")
    root.holds(now)
    second = root.refresh()
    assert counts(second) == (1, 1, 2, 37)
    assert stages.calls == [("ingest", True), ("embed", True), ("index", True)]
    assert root.there() == [first, second]
    assert root.passages(second) == {each.doc_id: (each.title, each.text) for each in now}
    assert [(row["generation"], row["state"]) for row in history.history(root.location)] == [
        (1, "there"),
        (2, "present"),
    ]


def test_a_file_that_is_written_again_with_the_same_passages_makes_no_generation(root: Root, stages: StandIns) -> None:
    first = root.refresh()
    root.holds(PASSAGES[::-1])
    stages.calls.clear()
    again = root.refresh()
    assert again.artifacts == first.artifacts and len(root.there()) == 1
    assert stages.calls == [("ingest", True)]
    assert artifacts.names_under(root.location) == sorted(first.artifacts.values())
    stages.calls.clear()
    root.refresh()
    assert not stages.calls, "the file is known by now"


def test_other_judgements_of_the_same_passages_make_a_generation(root: Root) -> None:
    folder = root.folder / "beir"
    (folder / "qrels").mkdir(parents=True)
    shutil.copy(root.source, folder / "corpus.jsonl")
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "a word"}\n')
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td00001\t1\n")
    root.refresh(source=str(folder))
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td00002\t1\n")
    assert counts(root.refresh()) == (0, 0, 0, 40)
    assert len(root.there()) == 2


def test_a_source_that_shrank_is_refused_and_the_old_state_stays(root: Root) -> None:
    root.refresh()
    before = (Path(root.uri) / "refresh.json").read_bytes()
    root.holds(PASSAGES[:4])
    with pytest.raises(CorpusError, match=r"has 4 passages, and generation 1 has 40; .* --allow-shrink"):
        root.refresh()
    assert (Path(root.uri) / "refresh.json").read_bytes() == before
    assert counts(root.refresh(allow_shrink=True)) == (0, 0, 36, 4)


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone"])
def test_a_source_that_cannot_be_read_leaves_the_old_state(root: Root, damage: str) -> None:
    source = root.folder / "corpus.jsonl.gz"
    source.write_bytes(gzip.compress(root.source.read_bytes()))
    first = root.refresh(source=str(source))
    before = (Path(root.uri) / "refresh.json").read_bytes()
    if damage == "gone":
        source.unlink()
    else:
        source.write_bytes(source.read_bytes()[:200] if damage == "truncated" else b"")
    with pytest.raises(InputError):
        root.refresh()
    assert (Path(root.uri) / "refresh.json").read_bytes() == before
    assert generations.as_of(root.location, None) == first
    source.write_bytes(gzip.compress(root.source.read_bytes()))
    assert root.refresh().artifacts == first.artifacts


def test_other_options_are_refused_with_what_they_make_stale(root: Root, models: Path, stages: StandIns) -> None:
    root.refresh()
    with pytest.raises(
        InputError, match=r"model' there, '.*other' now\. Stale, .*: vectors \(.*\), index \(.*--overwrite"
    ):
        root.refresh(retriever=str(models / "other"))
    with pytest.raises(InputError, match=r"index\.kind: 'flat' there, 'hnsw' now\. Stale, .* took: index \("):
        root.refresh(index={"kind": "hnsw"})
    with pytest.raises(InputError, match=r"ingest\.deduplicate: 'auto' there, 'none' now\. Stale, .* took: corpus \("):
        root.refresh(ingest={"deduplicate": "none"})
    root.refresh(embed={"num_workers": 2})  # changes no vector
    assert len(root.there()) == 1
    stages.calls.clear()
    second = root.refresh(index={"kind": "hnsw"}, overwrite=True)
    assert stages.calls == [("index", False)]
    assert second.artifacts["vectors"] == "generations/00001/vectors", "what is not stale is shared"
    stages.calls.clear()
    third = root.refresh(retriever=str(models / "other"), overwrite=True)
    assert stages.calls == [("embed", False), ("index", False)]
    assert third.settings["retriever"] == str(models / "other") and third.settings["index"] == {"kind": "hnsw"}


def test_a_model_that_was_replaced_under_its_name_is_noticed(root: Root, models: Path) -> None:
    shutil.copytree(models / "model", root.folder / "model")
    root.refresh(retriever=str(root.folder / "model"))
    shutil.copytree(models / "other", root.folder / "model", dirs_exist_ok=True)
    with pytest.raises(InputError, match=r"the content of '.*model' changed\. Stale, .* vectors"):
        root.refresh()


def test_the_index_is_built_as_a_whole_past_a_fifth(root: Root, stages: StandIns) -> None:
    root.refresh()
    found = []
    for number in range(4):
        root.holds(
            [
                *PASSAGES[: 39 - number],
                *(PASSAGES[0]._replace(doc_id=f"new{each}", text=f"new {each}") for each in range(number + 1)),
            ]
        )
        stages.calls.clear()
        made = root.refresh()
        found.append((stages.calls[-1], made.index_changes))
    assert found == [(("index", True), 2), (("index", True), 4), (("index", True), 6), (("index", True), 8)]
    root.holds(PASSAGES[:38])
    made = root.refresh()
    assert stages.calls[-1] == ("index", False) and made.index_changes == 0


def test_going_back_is_a_generation_that_shares_the_parts_of_an_earlier_one(root: Root, models: Path) -> None:
    target = f"files:{root.folder}/collection"
    first = root.refresh(to=target)
    root.holds(REST)
    root.refresh()
    assert "d00003" not in exported_ids(root)
    third = root.refresh(back=1)
    assert (third.number, third.what) == (3, "back to 1")
    assert {**third.artifacts, "export": ""} == {**first.artifacts, "export": ""}
    assert exported_ids(root) == {each.doc_id for each in PASSAGES}
    search = SearchConfig(root=root.uri, as_of=2, queries="q.tsv", output="x.trec")
    assert (search.index, search.retriever) == (f"{root.uri}/generations/00002/index", str(models / "model"))
    served = ServeConfig(root=root.uri)
    assert served.index == f"{root.uri}/generations/00001/index"
    assert served.corpus == f"{root.uri}/generations/00001/corpus"
    with pytest.raises(InputError, match=r"generation 9 of '.*' does not exist; existing generations: 1, 2, 3"):
        root.refresh(back=9)
    with pytest.raises(InputError, match="generation 3 is the present one"):
        root.refresh(back=3)
    clean(CleanConfig(root=root.uri, yes=True))
    with pytest.raises(InputError, match=r"generation 2 of '.*' was removed by `readapt clean`"):
        root.refresh(back=2)
    assert root.refresh().number == 4, "the source still holds what was gone back from"
    assert "d00003" not in exported_ids(root)


def exported_ids(root: Root) -> set[str]:
    import pyarrow.parquet as pq

    files = (root.folder / "collection").glob("*.parquet")
    return {doc_id for file in files for doc_id in pq.read_table(file)["doc_id"].to_pylist()}


def test_after_clean_no_byte_of_a_deleted_passage_is_left(root: Root) -> None:
    target = f"files:{root.folder}/root/collection"
    first = root.refresh(to=target)
    gone = PASSAGES[3]
    vector = root.vectors(first)[gone.doc_id]
    needles = {"id": gone.doc_id.encode(), "text": gone.text[-40:].encode(), "vector": vector}
    root.holds(REST)
    root.refresh()
    assert {each.partition(" in ")[0] for each in root.files_with(needles)} == {"id", "text", "vector"}
    rows = find(FindConfig(root=root.uri, doc_id=gone.doc_id))
    assert {row["artifact"] for row in rows} == {
        f"generations/00001/{name}" for name in ("corpus", "vectors", "export")
    }
    assert all(row["generation"] == "1" for row in rows)
    listed = clean(CleanConfig(root=root.uri))
    assert not listed.is_done and "`readapt clean --root" in listed.text()
    assert {each.partition(" in ")[0] for each in root.files_with(needles)} == {"id", "text", "vector"}
    done = clean(CleanConfig(root=root.uri, yes=True))
    assert done.rows == listed.rows and done.num_deleted == 2
    assert root.files_with(needles) == []
    assert find(FindConfig(root=root.uri, doc_id=gone.doc_id)) == []
    assert clean(CleanConfig(root=root.uri)).text() == "nothing to free"
    assert [each.what for each in root.there()] == ["refresh", "refresh", "compaction"]
    assert root.refresh().number == 3, "nothing changed"


def test_clean_removes_the_copies_of_texts_that_no_server_uses(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    root.refresh()
    used, left = (cache_entries.folder_of("passages") / (digit * 32) for digit in "12")
    for entry in (used, left):
        entry.mkdir(parents=True)
        (entry / "passages.arrow").write_text(PASSAGES[3].text)
        cache_entries.note_files(entry, {"passages.arrow": {"size_bytes": 1}})
    with cache_entries.open_use_lock(used):
        clean(CleanConfig(root=root.uri))
        assert left.exists()
        clean(CleanConfig(root=root.uri, yes=True))
        assert (used.exists(), left.exists()) == (True, False)


def test_clean_keeps_what_it_is_told_to_and_what_others_made(root: Root) -> None:
    root.refresh()
    for number in (1, 2):
        root.holds(PASSAGES[number:])
        root.refresh()
    other = Path(root.uri) / "generations/00001/corpus/notes.txt"
    other.write_text("mine")
    _artifact_of(Path(root.uri) / "generations/mine", "ingest", {})
    assert {row["why"] for row in clean(CleanConfig(root=root.uri, keep=1)).rows} == {"generation 1"}
    clean(CleanConfig(root=root.uri, keep=1, yes=True))
    assert [each.freed for each in root.there()] == [True, False, False]
    assert other.read_text() == "mine"
    assert "generations/mine" in artifacts.names_under(root.location)
    assert root.refresh(back=2).number == 4


def test_the_root_of_a_run_is_refreshed_with_what_the_run_made(root: Root, models: Path, stages: StandIns) -> None:
    run, there = Path(root.uri), root.refresh()
    for name, folder in (("corpus", "corpus"), ("vectors", "vectors/adapted"), ("index", "index/adapted")):
        (run / folder).parent.mkdir(exist_ok=True)
        shutil.move(there.folder(root.location, name), run / folder)
    shutil.rmtree(run / "generations")
    (run / "refresh.json").unlink()
    shutil.copytree(models / "model", run / "adapted")
    blocks = artifacts.read_manifest(str(run / "corpus"))
    config = {"source": str(root.source), "ingest": {}, "embed": {}, "index": {}, "encoding": None}
    (run / "run.json").write_text(json.dumps({"config": config, "steps": []}))
    assert blocks is not None
    _artifact_of(run / "blocks", "pack", {"corpus": blocks.fingerprint})
    _artifact_of(run / "adapter", "train", {"corpus": "of the blocks"})
    stages.calls.clear()
    assert root.refresh().what == "run" and not stages.calls
    root.holds(REST)
    assert counts(root.refresh()) == (0, 0, 2, 38)
    assert [each for each in stages.calls if each[1]] == [("ingest", True), ("embed", True), ("index", True)]
    rows = find(FindConfig(root=root.uri, doc_id="d00003"))
    assert ("blocks", "its tokens") in {(row["artifact"], row["where"]) for row in rows}
    freed = {row["artifact"] for row in clean(CleanConfig(root=root.uri, yes=True)).rows}
    assert {"corpus", "vectors/adapted", "index/adapted", "blocks"} <= freed and "adapter" not in freed


def _artifact_of(folder: Path, stage: str, inputs: dict[str, str]) -> None:
    class Options(artifacts.StageConfig):
        """None."""

    artifacts.produce(stage, Options(output=str(folder)), inputs=inputs, work=lambda _: None)


@pytest.mark.parametrize("stage", ["ingest", "embed", "index", "export"])
def test_what_was_interrupted_goes_on_even_if_the_source_changed_again(
    root: Root, stages: StandIns, stage: str
) -> None:
    target = f"files:{root.folder}/collection"
    first = root.refresh(to=target)
    root.holds(REST)
    stages.fails_at = stage
    with pytest.raises(KeyboardInterrupt):
        root.refresh()
    assert root.there() == [first]
    stages.fails_at = ""
    root.holds(PASSAGES[10:])
    made = root.refresh()
    assert root.passages(made).keys() == exported_ids(root) == {each.doc_id for each in PASSAGES[10:]}


def test_a_collection_between_two_states_is_brought_to_the_one_it_was_going_to(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.refresh(to=f"files:{root.folder}/collection")
    root.holds(REST)
    write = generations.write
    monkeypatch.setattr(generations, "write", lambda *_: pytest.exit("killed"))
    with pytest.raises(BaseException, match="killed"):
        root.refresh()
    monkeypatch.setattr(generations, "write", write)
    with pytest.raises(InputError, match=r"begun to change its collection; run `readapt refresh"):
        clean(CleanConfig(root=root.uri, yes=True))
    root.holds(PASSAGES[10:])
    assert counts(root.refresh()) == (0, 0, 2, 38)
    assert counts(root.refresh()) == (0, 0, 8, 30)
    assert exported_ids(root) == {each.doc_id for each in PASSAGES[10:]}


def test_a_refresh_that_lost_its_lock_publishes_nothing(root: Root, stages: StandIns) -> None:
    root.refresh()
    root.holds(REST)
    lock = root.location / LOCK_NAME

    def taken_over() -> None:
        lock.write_text(json.dumps({**json.loads(lock.read_text()), "owner": "another"}))

    stages.before["index"] = taken_over
    with pytest.raises(ArtifactConflictError):
        root.refresh()
    assert [each.number for each in root.there()] == [1]


def test_two_refreshes_at_once_are_impossible(root: Root) -> None:
    root.refresh()
    code = (
        "import sys, time; from readapt_ray.storage import Location; from readapt_ray.recipes.refreshing.lock import locked\n"
        "with locked(Location(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    held = subprocess.Popen(
        [sys.executable, "-c", code, root.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert held.stdout is not None
    assert held.stdout.readline() == "held\n"
    try:
        for call in (root.refresh, lambda: clean(CleanConfig(root=root.uri, yes=True))):
            with pytest.raises(ArtifactConflictError, match=f"process {held.pid} on .* is writing"):
                call()
    finally:
        held.kill()
        held.wait()
    root.holds(REST)
    assert root.refresh().number == 2, "the lock of a killed process is taken over"
    assert not (Path(root.uri) / "refreshing.json").exists()


@pytest.mark.parametrize("content", ['{"a": 1}', '{"generations": [{"num', "[]"])
def test_a_list_of_generations_that_cannot_be_read_is_left_alone(root: Root, content: str) -> None:
    file = Path(root.uri) / "refresh.json"
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(CorruptFileError, match=r"is not a list of generations .*; restore it from a backup"):
        refreshing.refresh(refreshing.RefreshConfig(root=root.uri, source=str(root.source), retriever="m"))
    assert file.read_text() == content


def test_a_root_of_another_release_is_read_or_refused(root: Root) -> None:
    """An older release wrote fewer fields, and no digest into the files of passages."""
    first = root.refresh()
    file = Path(root.uri) / "refresh.json"
    values = json.loads(file.read_text())
    for name in ("signals", "advice", "turnover", "index_changes", "freed", "counts"):
        del values["generations"][0][name]
    values["generations"][0]["of_a_later_release"] = 1
    file.write_text(json.dumps(values))
    for part in (Path(first.folder(root.location, "corpus")) / "passages").iterdir():
        roots.pq.write_table(roots.pq.read_table(part).replace_schema_metadata(), part)
    root.holds(REST)
    assert counts(root.refresh()) == (0, 0, 2, 38)
    assert root.there()[0].counts == {} and root.there()[0].artifacts == first.artifacts
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 9}))
    with pytest.raises(
        InputError, match=r"has format_version 9, and this release reads 1; use the release that wrote it"
    ):
        root.refresh()


def test_what_is_missing_or_not_for_a_refresh_is_said(root: Root, tmp_path: Path) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(InputError) as raised:
            refreshing.refresh(refreshing.RefreshConfig(root=root.uri, **options))
        return str(raised.value)

    assert "was never refreshed, so give --source and --retriever" in refused()
    given = {"source": str(root.source), "retriever": str(root.model)}
    assert "previous = 'x' is refused: a refresh passes the generation before" in refused(
        **given, embed={"previous": "x"}
    )
    assert "section 'ingest' sets source, which the refresh itself sets" in refused(**given, ingest={"source": "x"})
    assert "unknown option 'knd'; did you mean 'kind'?" in refused(**given, index={"knd": "flat"})
    assert "there is no target; give one with --to" in refused(**given, export={"check": 0})
    assert not Path(root.uri).exists() or not artifacts.names_under(root.location)


def test_the_commands_and_their_exit_codes(root: Root, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--source", str(root.source), "--retriever", str(root.model)]
    assert cli.main(["refresh", "--root", root.uri, *given]) == 0
    assert capsys.readouterr().out == f"generation 1 of {root.uri}\n"
    root.holds(PASSAGES[:4])
    assert cli.main(["refresh", "--root", root.uri]) == 2
    assert cli.main(["refresh", "--root", root.uri, "--allow-shrink"]) == 0
    capsys.readouterr()
    assert cli.main(["status", "--root", root.uri, "--history"]) == 0
    assert "2           refresh  present" in capsys.readouterr().out
    assert cli.main(["find", "--root", root.uri, "--doc-id", "d00001"]) == 0
    assert (
        "generations/00002/corpus   ingest  2 (present)  row 1 of passages/part-00000.parquet"
        in capsys.readouterr().out
    )
    assert cli.main(["find", "--root", root.uri, "--doc-id", "none"]) == 0
    assert capsys.readouterr().out == f"nothing under {root.uri} holds 'none'\n"
    assert cli.main(["clean", "--root", root.uri]) == 0
    assert "would free 3 artifacts" in capsys.readouterr().out
    assert cli.main(["clean", "--root", str(root.folder / "none")]) == 2


def test_a_local_source_and_model_are_known_by_paths_that_work_from_anywhere(
    root: Root, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(root.folder)
    made = root.refresh(source="corpus.jsonl")
    assert made.settings["source"] == str(root.source)
    assert issubclass(refreshing.RefreshConfig, Config)


@pytest.mark.parametrize("hours", [(1, -1, 30), (-48, 0, -72)])
def test_drivers_and_sources_whose_clocks_differ_go_by_what_is_there(
    root: Root, monkeypatch: pytest.MonkeyPatch, hours: tuple[int, ...]
) -> None:
    """Each refresh runs on another machine, and the source has a clock of its own."""
    now_s = time.time()
    states = [PASSAGES, REST, [*REST, PASSAGES[0]._replace(doc_id="new", text="something new")]]
    for number, (ahead, passages) in enumerate(zip(hours, states, strict=True), start=1):
        root.holds(passages)
        os.utime(root.source, (now_s - 3600 * 24 * number, now_s + 3600 * 24 * (len(states) - number)))
        with monkeypatch.context() as machine:
            machine.setattr(time, "time", lambda ahead=ahead: now_s + 3600 * ahead)
            stamp = datetime.datetime.fromtimestamp(now_s + 3600 * ahead, datetime.UTC).isoformat(timespec="seconds")
            machine.setattr(generations, "now", lambda stamp=stamp: stamp)
            made = root.refresh()
            assert root.refresh() == made, "the same state again"
        assert (made.number, made.seconds >= 0) == (number, True)
        assert root.passages(made) == {each.doc_id: (each.title, each.text) for each in passages}
    rows = history.history(root.location)
    assert [(row["generation"], row["state"]) for row in rows] == [(1, "there"), (2, "there"), (3, "present")]
    assert [row["created"] for row in rows] != sorted(row["created"] for row in rows), "the clocks did differ"
    assert generations.as_of(root.location, None).number == 3
    assert root.passages(generations.as_of(root.location, 1)).keys() == {each.doc_id for each in PASSAGES}
    clean(CleanConfig(root=root.uri, keep=1, yes=True))
    assert [(row["generation"], row["state"]) for row in history.history(root.location)][-1] == (3, "present")
    assert root.passages(root.there()[-1]).keys() == {each.doc_id for each in states[-1]}
