"""How many requests of an object store a stage takes that was finished, or killed at its very end: no more with more files.

The artifacts are made on a disk and copied to an S3 server that counts. There, a request takes some 25 ms: 244,000 files that
are each opened take ten minutes, 32 at a time, and their listing takes six seconds.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from readapt_ray.artifacts import Artifact
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.stages.index import IndexConfig, index
from readapt_ray.stages.ingest import IngestConfig, ingest
from readapt_ray.stages.pack import PackConfig, pack
from readapt_ray.storage import Location
from tests import factories, object_store
from tests.object_store import BUCKET, Store

NUM_FILES = 24
ROWS = 4
MOST_REQUESTS = 60
"""Of everything beside the files: manifests, tables, listings. A file that is opened takes three."""
LEASE = {"host": "", "boot": "", "pid": 0, "process_started": 0, "started": 0, "heartbeat": 0, "owner": ""}


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with object_store.running() as running:
        yield running


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """A corpus, blocks, vectors and an index of `NUM_FILES` files each, on a disk."""
    root = tmp_path_factory.mktemp("made")
    factories.write_contract(factories.tiny_decoder(root / "headless", headless=True))
    factories.tiny_decoder(root / "base")
    rows = [
        {"_id": each.doc_id, "text": f"{each.title} {each.text}"} for each in factories.small_corpus(NUM_FILES * ROWS)
    ]
    (root / "source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = str(root / "source.jsonl")
    ingest(IngestConfig(source=source, output=str(root / "corpus"), rows_per_file=ROWS, deduplicate="none"))
    for name in ("pack", "embed", "index"):
        STAGES[name](root, str(root))
    return root


def _pack(models: Path, root: str) -> Artifact:
    return pack(
        PackConfig(pretrained=str(models / "base"), corpus=f"{root}/corpus", output=f"{root}/pack", block_tokens=64)
    )


def _embed(models: Path, root: str) -> Artifact:
    options: dict[str, Any] = {"rows_per_shard": ROWS, "num_workers": 1, "dtype": "float32"}
    return embed(
        EmbedConfig(retriever=str(models / "headless"), corpus=f"{root}/corpus", output=f"{root}/embed", **options)
    )


def _index(models: Path, root: str) -> Artifact:
    del models
    return index(IndexConfig(vectors=f"{root}/embed", output=f"{root}/index", rows_per_shard=ROWS * NUM_FILES))


STAGES: dict[str, Callable[[Path, str], Artifact]] = {"pack": _pack, "embed": _embed, "index": _index}


def _on_store(made: Path, name: str) -> Location:
    root = Location(f"s3://{BUCKET}/{name}")
    for each in ("corpus", *STAGES):
        Location(str(made / each)).copy_to(root / each)
    return root


def _leave_unfinished(folder: Location) -> None:
    """Make of a finished artifact what a process leaves that is killed just before it writes the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    state = {name: manifest[name] for name in ("stage", "fingerprint", "config", "inputs", "seconds", "files")}
    (folder / "building.json").write_text(json.dumps(state | LEASE | {"is_over": True, "seconds_before": 0}))
    (folder / "manifest.json").delete()


def _opened(store: Store) -> list[str]:
    return [each for each in store.requests if "/part-" in each]


def _num_requests(store: Store) -> int:
    """Count the requests, but for the lease, whose number grows with the seconds."""
    return sum("building.json" not in each for each in store.requests)


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_finished_stage_looks_at_no_file(made: Path, store: Store, stage: str) -> None:
    root = _on_store(made, f"finished-{stage}")
    store.requests.clear()
    STAGES[stage](made, root.uri)
    assert _opened(store) == []
    assert _num_requests(store) <= MOST_REQUESTS, store.requests


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_that_was_killed_opens_no_file_that_a_table_and_the_listing_tell_of(
    made: Path, store: Store, stage: str
) -> None:
    root = _on_store(made, f"killed-{stage}")
    _leave_unfinished(root / stage)
    store.requests.clear()
    artifact = STAGES[stage](made, root.uri)
    assert _opened(store) == []
    assert _num_requests(store) <= MOST_REQUESTS, store.requests
    assert artifact.manifest.counts == json.loads((made / stage / "manifest.json").read_text())["counts"]


def test_a_source_of_many_files_is_listed_once(made: Path, store: Store) -> None:
    """Parquet, whose files need not be opened to be cut, since each is smaller than what a task reads."""
    from readapt_ray.sources.opening import open_source
    from readapt_ray.sources.pieces import plan_pieces
    from readapt_ray.sources.read_options import ReadOptions
    from readapt_ray.sources.table_sources import TableSource

    root = Location(f"s3://{BUCKET}/source")
    Location(str(made / "corpus" / "passages")).copy_to(root)
    store.requests.clear()
    source = open_source(root.uri, "parquet", ReadOptions())
    source.check()
    source.fingerprint()
    assert isinstance(source, TableSource)
    assert sum(len(piece.ranges) for piece in plan_pieces(source)[0]) == NUM_FILES
    assert {each.rpartition("/")[2] for each in _opened(store)} == {"part-00000.parquet"}
    assert len(store.requests) <= 20, store.requests


def test_a_finished_ingest_lists_its_source_and_reads_one_file(made: Path, store: Store) -> None:
    root = Location(f"s3://{BUCKET}/ingested")
    Location(str(made / "corpus" / "passages")).copy_to(root / "source")
    config = IngestConfig(
        source=(root / "source").uri, format="parquet", output=str(made / "again"), deduplicate="none"
    )
    first = ingest(config)
    store.requests.clear()
    assert ingest(config).fingerprint == first.fingerprint
    assert {each.rpartition("/")[2] for each in _opened(store)} == {"part-00000.parquet"}
    assert len(store.requests) <= 20, store.requests
