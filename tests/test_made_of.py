"""What an artifact was made of is found where it was, and where both were moved or copied together."""

import os
import shutil
from pathlib import Path

import pytest

from readapt_ray import artifacts, made_of
from readapt_ray.artifacts import Artifact
from readapt_ray.config import StageConfig
from readapt_ray.errors import ArtifactMissingError
from tests import object_store


class MadeConfig(StageConfig):
    """Options of stages that exist for these tests."""

    corpus: str = "nothing"
    """What it is made of."""
    size: int = 1
    """Decides what comes out."""

    inputs = frozenset({"corpus"})


def made(stage: str, output: str, corpus: Artifact | None = None, size: int = 1) -> Artifact:
    config = MadeConfig(output=output, size=size, **({"corpus": corpus.uri} if corpus else {}))
    inputs = {"corpus": corpus.fingerprint if corpus else "none"}
    return artifacts.produce(stage, config, inputs=inputs, work=lambda workspace: None)


def assert_found(blocks: str, corpus: str, size: int = 1) -> None:
    found = made_of.open_input(artifacts.open_artifact(blocks, "pack"), "corpus", "ingest")
    assert (found.location.path, found.manifest.config["size"]) == (artifacts.Location(corpus).path, size)


@pytest.mark.parametrize(
    ("corpus", "blocks"),
    [("corpus", "blocks"), ("a/b/corpus", "blocks"), ("corpus", "a/b/blocks"), ("a/corpus", "b/c/blocks")],
)
def test_a_root_that_was_moved_or_copied(tmp_path: Path, corpus: str, blocks: str) -> None:
    first, second = tmp_path / "deep/er/root", tmp_path / "other"
    made("pack", str(first / blocks), made("ingest", str(first / corpus)))
    assert_found(str(first / blocks), str(first / corpus))
    shutil.copytree(first, second)
    assert_found(str(second / blocks), str(first / corpus))  # the recorded one is there
    shutil.rmtree(first)
    assert_found(str(second / blocks), str(second / corpus))
    made("ingest", str(first / corpus), size=2)
    assert_found(str(second / blocks), str(second / corpus))  # another one is at the recorded place


def test_an_input_that_is_gone_or_another_is_said(tmp_path: Path) -> None:
    corpus = made("ingest", str(tmp_path / "root/corpus"))
    blocks = made("pack", str(tmp_path / "root/blocks"), corpus)
    (tmp_path / "root/corpus").rename(tmp_path / "away")
    with pytest.raises(ArtifactMissingError, match="root/corpus' does not exist"):
        made_of.open_input(blocks, "corpus", "ingest")
    other = made("ingest", corpus.uri, size=2)
    assert (
        made_of.open_input(blocks, "corpus", "ingest").fingerprint
        == other.fingerprint
        != blocks.manifest.inputs["corpus"]
    )
    shutil.copytree(tmp_path / "root/blocks", tmp_path / "blocks")  # no corpus beside it
    assert made_of.open_input(artifacts.open_artifact(str(tmp_path / "blocks"), "pack"), "corpus", "ingest") == other


def test_relative_paths_are_found_from_another_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made("pack", "run/blocks", made("ingest", "run/corpus"))
    assert_found("run/blocks", "run/corpus")
    monkeypatch.chdir("/")
    assert_found(str(tmp_path / "run/blocks"), str(tmp_path / "run/corpus"))


def test_a_place_with_fewer_folders_above_it_than_the_path_climbs(tmp_path: Path) -> None:
    deep = tmp_path / os.path.join(*"abcdefghijklmnopqrst") / "blocks"
    blocks = made("pack", str(deep), made("ingest", str(tmp_path / "corpus")))
    shutil.rmtree(tmp_path / "corpus")
    moved = Artifact(artifacts.Location("/blocks"), blocks.manifest)
    with pytest.raises(ArtifactMissingError):
        made_of.open_input(moved, "corpus", "ingest")


def test_a_root_that_was_copied_to_another_bucket_folder_or_down_to_a_disk(tmp_path: Path) -> None:
    with object_store.running() as store:
        root = f"s3://{object_store.BUCKET}/team/run"
        made("pack", f"{root}/blocks", made("ingest", f"{root}/corpora/all"))
        for key in [each for each in store.names() if each.startswith("team/run/")]:  # others' are there, too
            target = {"Bucket": object_store.BUCKET, "Key": key.replace("team/run/", "moved/")}
            store.client.copy_object(CopySource={"Bucket": object_store.BUCKET, "Key": key}, **target)
            if not key.endswith("/"):
                file = tmp_path / key.removeprefix("team/run/")
                file.parent.mkdir(parents=True, exist_ok=True)
                store.client.download_file(object_store.BUCKET, key, str(file))
            store.client.delete_object(Bucket=object_store.BUCKET, Key=key)
        assert_found(f"s3://{object_store.BUCKET}/moved/blocks", f"s3://{object_store.BUCKET}/moved/corpora/all")
        assert_found(str(tmp_path / "blocks"), str(tmp_path / "corpora/all"))
