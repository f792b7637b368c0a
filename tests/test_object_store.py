"""Files, artifacts and a whole run on an S3 server: same promises as on a disk, busy or killed; no credentials anywhere."""

import functools
import http.server
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest
import yaml

from readapt_ray import artifact_files, artifacts, cli, filesystems, ranged_reads, root_status, storage
from readapt_ray.artifacts import Workspace
from readapt_ray.config import StageConfig
from readapt_ray.errors import ArtifactConflictError, InputError
from readapt_ray.retrieval.index_files import find_shards, write_shard
from readapt_ray.retrieval.index_shard import build_shard
from readapt_ray.retrieval.vector_files import read_footer, write_vectors
from readapt_ray.storage import Location
from tests import factories, object_store
from tests.object_store import BUCKET, KEYS, Store

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with object_store.running() as running:
        yield running


@pytest.fixture
def folder(store: Store, request: pytest.FixtureRequest) -> Location:
    store.busy = lambda method, path: False
    store.refused.clear()
    return Location(f"s3://{BUCKET}/{request.node.name}")


def test_files_are_written_whole_and_listed(store: Store, folder: Location) -> None:
    (folder / "a/b.txt").write_text("one")
    (folder / "a/b.txt").write_text("two")
    assert (folder / "a/b.txt").read_text() == "two"
    assert [name for name, _ in folder.listing(recursive=True)] == ["a/b.txt"]
    assert folder.children() == ([], ["a"])
    assert folder.is_folder()
    assert not any(".tmp-" in name for name in store.names())
    (folder / "a/b.txt").delete()
    (folder / "a/b.txt").delete()
    assert folder.listing(recursive=True) == []


def test_a_writer_that_fails_leaves_the_file_that_was_there(store: Store, folder: Location) -> None:
    (folder / "x").write_text("good")
    with pytest.raises(RuntimeError), (folder / "x").open_output() as stream:
        stream.write(b"half")
        raise RuntimeError
    assert (folder / "x").read_text() == "good"
    assert [name for name in store.names() if folder.name in name and not name.endswith("/")] == [f"{folder.name}/x"]


def test_an_object_too_large_to_be_copied_is_uploaded_again(
    store: Store, folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_MAX_COPY_BYTES", 10)
    content = os.urandom(5 << 20)
    (folder / "large").write_bytes(content)
    assert (folder / "large").read_bytes() == content
    assert not any(".tmp-" in name for name in store.names())


def test_a_busy_store_is_asked_again(store: Store, folder: Location) -> None:
    answers = iter([True, False, True, True, False] * 3)
    store.busy = lambda method, path: next(answers, False)
    (folder / "x").write_text("kept")
    assert (folder / "x").read_text() == "kept"
    assert len(store.refused) >= 3


@pytest.mark.slow
def test_more_refusals_than_pyarrow_alone_would_bear(store: Store, folder: Location) -> None:
    (folder / "x").write_text("kept")
    refusals = iter([True] * 5)
    store.busy = lambda method, path: method == "GET" and next(refusals, False)
    assert (folder / "x").read_text() == "kept"
    assert len(store.refused) == 5


def test_a_store_that_stays_busy_is_an_error_that_names_the_file(
    store: Store, folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystems, "_S3_ATTEMPTS", 2)
    monkeypatch.setattr(filesystems, "_s3_client", filesystems._s3_client.__wrapped__)
    monkeypatch.setattr(ranged_reads, "_ATTEMPTS", 2)
    (folder / "x").write_text("kept")
    store.busy = lambda method, path: True
    with pytest.raises(OSError, match=r"SLOW_DOWN|SlowDown|503"):
        Location(f"{folder}/x").read_text()


class _Config(StageConfig):
    """Options of a stage that writes one file."""

    word: str
    """What it writes."""


def test_an_artifact_on_a_store_keeps_its_promises(store: Store, folder: Location) -> None:
    config = _Config(output=(folder / "made").uri, word="hello")
    runs = []

    def work(workspace: Workspace) -> None:
        runs.append(1)
        (workspace.location / "word.txt").write_text(config.word)
        if len(runs) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifacts.produce("merge", config, inputs={}, work=work)
    assert artifacts.read_manifest(config.output) is None
    assert {row["state"] for row in root_status.rows(folder)} <= {"running", "stopped"}
    for _ in range(2):
        artifacts.produce("merge", config, inputs={}, work=work)
    assert len(runs) == 2
    assert [row["state"] for row in root_status.rows(folder)] == ["done"]
    assert artifacts.names_under(folder) == ["made"]


def test_on_a_store_only_what_is_ours_is_replaced(
    store: Store, folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(artifact_files.STAGE_FILES, "copy", ("words/part-*.txt",))

    def make(name: str, word: str) -> None:
        config = _Config(output=(folder / name).uri, word=word, overwrite=True)
        artifacts.produce("copy", config, inputs={}, work=lambda workspace: write(workspace, word))

    def write(workspace: Workspace, word: str) -> None:
        for number in range(5 if word == "old" else 1):
            (workspace.location / f"words/part-{number}.txt").write_text(word)

    def keys() -> list[str]:
        names = [name.removeprefix(f"{folder.name}/") for name in store.names() if name.startswith(f"{folder.name}/")]
        return sorted(name for name in names if name and not name.endswith("/"))

    make("run/made", "old")
    with pytest.raises(ArtifactConflictError, match="holds made/ that no stage of readapt made"):
        make("run", "new")
    (folder / "run/made/words/notes.txt").write_text("precious")
    (folder / "run/made/thesis/chapter.doc").write_text("precious")
    make("run/made", "new")
    ours = ["run/made/manifest.json", "run/made/words/part-0.txt"]
    assert keys() == sorted([*ours, "run/made/thesis/chapter.doc", "run/made/words/notes.txt"])
    assert (folder / "run/made/words/part-0.txt").read_text() == "new"
    assert artifacts.names_under(folder) == ["run/made"]


def test_marks_of_deleted_folders_on_a_store_are_not_in_the_way(store: Store, folder: Location) -> None:
    (folder / "made/words/part-0.txt").write_text("old")
    (folder / "made/words/part-0.txt").delete()
    assert (folder / "made").children() == ([], ["words"])
    config = _Config(output=(folder / "made").uri, word="new")
    artifacts.produce("copy", config, inputs={}, work=lambda workspace: None)
    assert artifacts.names_under(folder) == ["made"]


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA123:very-secret@bucket/run",
        "s3://AKIA123:very/secret@bucket/run",
        "gs://user:very-secret@bucket",
        "s3://bucket/run?region=eu&secret_key=very-secret",
        "abfs://container@account/run?client_secret=very-secret",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(InputError, match="holds credentials") as refused:
        Location(uri)
    assert "secret" not in str(refused.value)
    run = {"source": "x", "pretrained": "quickstart-pretrained", "retriever": "quickstart-retriever", "root": uri}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    for arguments in (
        ["status", "--root", uri],
        ["ingest", "--source", uri, "--output", str(tmp_path / "a")],
        ["run", "--config", str(tmp_path / "run.yaml")],
    ):
        assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert not re.search("very.secret", said.out + said.err + caplog.text)


def test_an_unknown_option_of_a_uri_is_named_without_its_value() -> None:
    with pytest.raises(InputError, match=r"unknown options \['acess_kye'\]") as refused:
        Location(f"s3://{BUCKET}/x?acess_kye=very-secret").exists()
    assert "very-secret" not in str(refused.value)


def test_names_with_marks_of_uris_are_found_again(store: Store, folder: Location) -> None:
    names = ["C# guide.md", "What is X?", "What is X?.md", "page?id=3", "what%20is"]
    for name in names:
        (folder / name).write_text(name)
    assert [file.name for file in folder.files()] == sorted(names)
    assert [Location(file.uri).read_text() for file in folder.files()] == sorted(names)


def test_a_small_object_is_written_by_one_request_and_read_by_two(store: Store, folder: Location) -> None:
    file = folder / "small"
    store.requests.clear()
    file.write_bytes(b"x" * 100_000)
    assert [each.split()[0] for each in store.requests] == ["PUT"]
    store.requests.clear()
    with file.open_input() as stream:
        assert (stream.read(10), stream.seek(-5, os.SEEK_END), stream.read()) == (b"x" * 10, 99_995, b"x" * 5)
    assert [each.split()[0] for each in store.requests] == ["HEAD", "GET"]


@pytest.mark.parametrize("num_bytes", [100, 4 << 20, (4 << 20) + 1, 11 << 20])
def test_what_is_not_written_to_its_end_is_not_seen(store: Store, folder: Location, num_bytes: int) -> None:
    file, content = folder / "file", os.urandom(num_bytes)

    def write(piece_bytes: int, *, fails: bool) -> None:
        with file.open_output() as stream:
            for start in range(0, num_bytes, piece_bytes):
                stream.write(content[start : start + piece_bytes])
            assert stream.tell() == num_bytes
            if fails:
                raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write(1 << 20, fails=True)
    assert folder.entries()[0] == []
    write(3 << 20, fails=False)
    assert file.read_bytes() == content and folder.entries()[0] == ["file"]


def test_all_files_of_a_store_share_one_client(store: Store, folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    client = pafs.S3FileSystem
    monkeypatch.setattr(pafs, "S3FileSystem", lambda **options: made.append(options) or client(**options))
    filesystems._s3_client.cache_clear()
    files = [folder / f"part-{number}" for number in range(100)]
    for file in files[:3]:
        file.write_text("x")
    assert {id(each.filesystem) for each in (*files, Location(f"s3://{BUCKET}/elsewhere"))} == {id(files[0].filesystem)}
    assert len(made) == 1
    assert pickle.loads(pickle.dumps(files[0])).read_text() == "x"
    assert len(made) == 1
    assert Location(f"s3://{BUCKET}/x?region=eu-west-1").filesystem is not files[0].filesystem
    assert len(made) == 2


def test_many_files_are_read_over_few_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a server that keeps connections open, which moto's does not."""
    connections = set()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            connections.add(self.client_address)
            self.send_response(200 if self.command == "HEAD" else 206)
            for name, value in (("Content-Length", "2"), ("ETag", '"e"'), ("Content-Range", "bytes 0-1/2")):
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(b"42")

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}.items():
        monkeypatch.setenv(name, value)
    found = [(Location("s3://some-bucket/folder") / f"{number}").read_text() for number in range(60)]
    server.shutdown()
    assert found == ["42"] * 60
    assert len(connections) <= 4


def test_a_large_file_is_read_in_ranges_at_once(
    store: Store, folder: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranged_reads, "_RANGE_BYTES", 1000)
    monkeypatch.setattr(ranged_reads, "_BACKOFF_S", 0.0)
    content = os.urandom(20_500)
    (folder / "large").write_bytes(content)
    store.requests.clear()
    assert (folder / "large").read_bytes() == content
    assert sum(each.startswith("GET") for each in store.requests) == 21
    calls = iter(range(10**9))
    store.busy = lambda method, path: method == "GET" and next(calls) % 5 == 4
    (folder / "large").copy_to(Location(str(tmp_path / "copy")))
    assert store.refused
    assert (tmp_path / "copy").read_bytes() == content


def test_a_resumed_index_lists_its_shards_once_and_reads_a_small_file_of_each(store: Store, folder: Location) -> None:
    for number in range(40):
        shard = build_shard("Flat", 4, [([f"d{number}"], np.ones((1, 4), np.float32))])
        write_shard(folder, f"{number:05d}", shard, encoder="f")
    store.requests.clear()
    names = [f"{number:05d}" for number in range(50)]
    assert len(find_shards(folder, names, encoder="f")) == 40
    assert sum("?" not in each and each.endswith(BUCKET) for each in store.requests) <= 1
    assert len(store.requests) <= 40 * 2 + 2
    assert not any(each.endswith((".faiss", ".parquet")) for each in store.requests)


def test_a_footer_is_three_requests(store: Store, folder: Location) -> None:
    vectors = np.ones((5, 4), np.float32)
    write_vectors(folder / "a.parquet", list("abcde"), vectors, dtype="float32", metadata={})
    size_bytes = (folder / "a.parquet").size_bytes()
    store.requests.clear()
    footer = read_footer(folder / "a.parquet")
    assert (footer.num_rows, footer.num_bytes) == (5, size_bytes)
    assert len(store.requests) <= 3


def test_a_forked_process_has_a_client_of_its_own(store: Store, folder: Location) -> None:
    """What was opened before the fork shares its connections with the parent process."""
    below = folder / "below"
    opened = id(folder.filesystem)
    assert id(below.filesystem) == opened
    pid = os.fork()
    if pid == 0:  # nothing is asked of the store: pytest's own threads are not here
        clients = {id(each.filesystem) for each in (folder, below)}
        os._exit(0 if len(clients) == 1 and opened not in clients else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert id(folder.filesystem) == opened


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("gs://anonymous@bucket/a%20b/", "bucket/a b"),
        ("gs://anonymous@bucket", "bucket"),
        ("gs://anonymous@bucket/a#b?retry_limit_seconds=3", "bucket/a#b"),
        ("file:///tmp/a%20b", "/tmp/a b"),
    ],
)
def test_other_stores_have_one_client_too(monkeypatch: pytest.MonkeyPatch, uri: str, path: str) -> None:
    made: list[str] = []
    from_uri = pafs.FileSystem.from_uri
    stand_in = SimpleNamespace(from_uri=lambda root: made.append(root) or from_uri(root))
    monkeypatch.setattr(filesystems, "pafs", SimpleNamespace(**{**vars(pafs), "FileSystem": stand_in}))
    filesystems._client.cache_clear()
    folder = Location(uri)
    copies = [folder, folder / "x", folder / "y", pickle.loads(pickle.dumps(folder / "z"))]
    assert [each.path for each in copies] == [path, f"{path}/x", f"{path}/y", f"{path}/z"]
    assert len(made) == 1


def test_the_region_of_a_bucket_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        filesystems, "_region_of", functools.lru_cache(lambda bucket: asked.append(bucket) or "eu-west-1")
    )
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for number in range(5):
        assert Location(f"s3://looked-up/{number}").filesystem.region == "eu-west-1"
    assert asked == ["looked-up"]


def test_a_store_may_be_silent_while_it_copies(store: Store, folder: Location) -> None:
    """The SDK gives a silent store up after 3 s, and asks again."""
    copies = []

    def slow(method: str, path: str) -> bool:
        if method == "PUT" and path.endswith("/large"):
            copies.append(path)
            time.sleep(5)
        return False

    store.busy = slow
    (folder / "large").write_text("kept")
    assert (folder / "large").read_text() == "kept"
    assert len(copies) == 1


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file on a tiny model, with judgements."""
    folder = tmp_path_factory.mktemp("experiment")
    train = {"block_tokens": 64, "batch_size": 16, "num_workers": 1, "num_cpus_per_worker": 1}
    factories.run_file(folder, num_passages=600, num_queries=20, train=train)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_whole_run_on_a_store_killed_once_and_throttled_measures_what_one_on_a_disk_does(
    store: Store, folder: Location, experiment: Path
) -> None:
    command = [sys.executable, "-m", "readapt_ray.cli", "run", "--config", str(experiment / "run.yaml"), "--root"]
    environment = {**os.environ, "READAPT_NUM_CPUS": "2", "READAPT_LOG_LEVEL": "DEBUG"}
    environment.pop("RAY_ADDRESS", None)
    subprocess.run([*command, str(experiment / "disk")], cwd=REPOSITORY, env=environment, check=True, timeout=600)
    calls = iter(range(10**9))
    store.busy = lambda method, path: next(calls) % 20 == 0
    process = subprocess.Popen(
        [*command, folder.uri],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "] merge ->" in line:
            process.kill()
    process.wait(timeout=60)
    done = subprocess.run(
        [*command, folder.uri],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    means = [
        json.loads((root / "report/measures.json").read_text()) for root in (Location(str(experiment / "disk")), folder)
    ]
    assert means[0] == means[1]
    assert len(store.refused) > 10
    everything = "".join(said) + done.stdout + done.stderr
    for name in store.names():
        if name.endswith(".json"):
            everything += store.client.get_object(Bucket=BUCKET, Key=name)["Body"].read().decode()
    assert not re.search(KEYS["AWS_SECRET_ACCESS_KEY"], everything)
    assert not any(".tmp-" in name for name in store.names())


def test_a_record_that_is_replaced_by_a_longer_one_while_it_is_read_is_read_whole(
    store: Store, folder: Location
) -> None:
    """An object is read up to the length that it had when it was opened."""
    record = folder / "building.json"
    texts = [json.dumps({"stage": "a", "owner": "b", "pid": 1, "heartbeat": 10**digits}) for digits in (3, 9)]
    record.write_text(texts[0])
    key = record.path.partition("/")[2]
    replaced: list[str] = []

    def replace_it(method: str, path: str) -> bool:
        if method == "GET" and path.endswith("building.json") and not replaced:
            replaced.append(path)
            store.client.put_object(Bucket=BUCKET, Key=key, Body=texts[1].encode())
        return False

    store.busy = replace_it
    assert artifacts.read_lease(folder) == json.loads(texts[1])
    assert len(replaced) == 1
    record.write_text(texts[1][:-9])
    assert artifacts.read_lease(folder) is None
