import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from readapt_ray import cli
from readapt_ray.errors import InputError
from readapt_ray.filesystems import last_part
from readapt_ray.serving.options import ServeConfig
from readapt_ray.storage import Location


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    file = Location(str(tmp_path)) / "a.txt"
    file.write_text("old")
    with pytest.raises(RuntimeError), file.open_output() as stream:
        stream.write(b"half")
        raise RuntimeError("cut")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_files_are_listed_in_order_without_temporary_ones(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", ".tmp-1-c.parquet", "d.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.parquet").write_text("x")
    folder = Location(str(tmp_path))
    assert [file.name for file in folder.files(".parquet")] == ["a.parquet", "b.parquet"]
    assert [name for name, _ in folder.listing(".parquet", recursive=True)] == [
        "a.parquet",
        "b.parquet",
        "sub/e.parquet",
    ]
    assert (folder / "absent").files() == []


def test_the_content_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("one")
    before = Location(str(tmp_path / "a")).content_fingerprint()
    (tmp_path / "a").rename(tmp_path / "b")
    assert Location(str(tmp_path / "b")).content_fingerprint() == before
    (tmp_path / "b" / "x.txt").write_text("two")
    assert Location(str(tmp_path / "b")).content_fingerprint() != before


def test_a_location_is_joined_pickled_and_copied(tmp_path: Path) -> None:
    here = Location(str(tmp_path / "from"))
    (here / "deep" / "x.bin").write_bytes(b"123")
    there = pickle.loads(pickle.dumps(Location(str(tmp_path / "to"))))
    here.copy_to(there)
    assert (there / "deep" / "x.bin").read_bytes() == b"123"
    assert (Location("s3://bucket/a?region=x") / "b").uri == "s3://bucket/a/b?region=x"
    for _ in range(2):
        (there / "deep" / "x.bin").delete()
    assert there.entries() == ([], ["deep"])


def test_a_scheme_that_nothing_opens_is_named() -> None:
    with pytest.raises(InputError, match="gopher://x"):
        Location("gopher://x/y").exists()


_NAMES = [
    "C# guide.md",
    "What is X?.md",
    "What is X?",
    "page?id=3",
    "page?id=3?",
    "a?b=c&d=e.md",
    "100%25 é.md",
    "x?region=y",
    "a??",
]


@pytest.mark.parametrize("root", ["s3://b/docs", "s3://b/docs?region=eu&scheme=http", "file:///tmp/d", "/tmp/what?/d#"])
@pytest.mark.parametrize("name", _NAMES)
def test_a_name_with_marks_of_uris_in_it_stays_one(root: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    path = f"{Location(root).path}/{name}"
    made = Location(root) / name
    again = Location(made.uri)
    assert made.path == again.path == path
    assert made.name == name
    assert (again / "part").path == f"{path}/part"
    assert again.beside(".json").path == f"{path}.json"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("s3://b/docs/C# guide.md", "b/docs/C# guide.md"),
        ("s3://b/docs/What is X?.md", "b/docs/What is X?.md"),
        ("s3://b/docs/C#?region=eu", "b/docs/C#"),
        ("file:///tmp/C#.md", "/tmp/C#.md"),
    ],
)
def test_only_options_end_the_path_of_a_uri(uri: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert Location(uri).path == path


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("s3://bucket/run/adapted?scheme=http&endpoint_override=http://minio:9000", "adapted"),
        ("s3://bucket/run/adapted/", "adapted"),
        ("run/adapted/", "adapted"),
        ("intfloat/e5-mistral-7b-instruct", "e5-mistral-7b-instruct"),
        ("e5-mistral", "e5-mistral"),
        ("what?a=b", "what?a=b"),
    ],
)
def test_the_name_of_a_model_is_without_the_options_of_its_store(name: str, last: str) -> None:
    assert last_part(name) == last
    assert ServeConfig(retriever=name).names() == [last]


def test_of_several_processes_one_creates_a_file(tmp_path: Path) -> None:
    file = Location(str(tmp_path / "new" / "a"))
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(file.create_text, [str(number) for number in range(8)]))
    assert made.count(True) == 1
    assert file.read_text() == str(made.index(True))


@pytest.mark.parametrize(
    "arguments",
    [
        ("ingest", "--source", "c.jsonl", "--output", ""),
        ("ingest", "--source", "", "--output", "made"),
        ("embed", "--retriever", "all-minilm-l6-v2", "--corpus", "", "--output", "made"),
        ("status", "--root", ""),
        ("find", "--root", "", "--doc-id", "a"),
        ("clean", "--root", ""),
        ("doctor", "--root", ""),
        ("train", "--pretrained", "p", "--corpus", "c", "--exclude", "", "--output", "made"),
        ("serve", "--retriever", "r", "--index", ""),
        ("serve", "--retriever", "r", "--require-report", ""),
        ("serve", "--retriever", "r", "--config", "", "--write-config", "made"),
        ("doctor", "--config", ""),
        ("status", "--root", ".", "--cluster", ""),
    ],
    ids=" ".join,
)
def test_an_empty_path_is_refused_and_does_not_mean_the_root_of_the_disk(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.jsonl").write_text('{"_id": "a", "text": "hello there"}\n')
    assert cli.main(arguments) == InputError.exit_code
    assert "is empty, as one from a variable that is not set" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["c.jsonl"]


def test_the_size_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"abc")
    assert Location(str(tmp_path / "there")).size_bytes() == 3
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Location(str(tmp_path / "missing")).size_bytes()
