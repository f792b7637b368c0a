"""The pages that people read first: their commands parse, their snippets run, and all that they name exists."""

import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import yaml

from readapt_ray import artifacts, cli
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.recipes import chain
from readapt_ray.serving import answers, schema
from readapt_ray.serving.keys import read_keys
from readapt_ray.serving.readiness import Readiness
from readapt_ray.serving.routes import build_api
from readapt_ray.storage import Location

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "readapt_ray"
FOLDERS = ("benchmarks", "clusters", "jobs", "readapt_ray")
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted(page for folder in FOLDERS for page in (REPOSITORY / folder).rglob("README.md")),
]
MAX_LINES = {"README.md": 140, "CONTRIBUTING.md": 120, "clusters/README.md": 120}
MAX_COLUMNS = 120
OUTPUTS = ("run/", "s3://my-bucket/run/")
"""How the names of outputs begin in the commands of all pages."""
FOREIGN_OPTIONS = {"--dashboard-host"}
REQUEST_FIELDS = {
    "/v1/embeddings": schema.EmbeddingsRequest.model_fields.keys(),
    "/v1/search": schema.SearchRequest.model_fields.keys(),
}
WORK = (
    "readapt_ray.recipes.running.run",
    "readapt_ray.recipes.chain.train_on_passages",
    "readapt_ray.recipes.compare.compare",
    "readapt_ray.recipes.paper.experiments.run",
    "readapt_ray.planner.plan",
    "readapt_ray.recipes.quickstart.run",
    "readapt_ray.serving.server.serve",
    "readapt_ray.root_status.status_table",
    "readapt_ray.recipes.refreshing.refresh.refresh",
    "readapt_ray.recipes.refreshing.find.find",
    "readapt_ray.recipes.refreshing.clean.clean",
    "readapt_ray.recipes.refreshing.history.as_text",
    "readapt_ray.cluster.doctor.examine",
    "readapt_ray.catalog.contracts.show_contract",
)
"""The functions that do the work of commands; those of stages are reached through `stage_parts`."""


def label(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


each_page = pytest.mark.parametrize("page", PAGES, ids=label)


class Block(NamedTuple):
    """A block of code: its language ("" if it says none), and its text."""

    language: str
    text: str


def code_blocks(page: Path) -> list[Block]:
    """Fenced blocks, and blocks that are indented by four spaces after a blank line."""
    text = page.read_text()
    fenced = [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]
    without = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:\A|\n)\n((?: {4}.*\n|\n(?= {4}))+)", without)
    return fenced + [Block("", re.sub(r"^ {4}", "", block, flags=re.MULTILINE)) for block in indented]


def spans(page: Path) -> list[str]:
    """What stands in backticks within a sentence or a table."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(each.split()) for each in re.findall(r"`([^`]+)`", text)]


def shell_commands(page: Path) -> list[list[str]]:
    """The words of each command in a page, of one that goes on in the next line too."""
    lines = [
        line
        for block in code_blocks(page)
        if block.language in ("", "bash")
        for line in block.text.replace("\\\n", " ").splitlines()
        if re.match(r"(readapt|python|make|bash|curl|ray|sbatch|podman|export) ", line)
    ]
    lines += [each for each in spans(page) if each.startswith(("sbatch clusters", "python benchmarks", "bash "))]
    return [shlex.split(line, comments=True) for line in lines]


def readapt_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each command of ours in a page: the script that starts it, and its arguments."""
    for words in shell_commands(page):
        if words[0] == "readapt":
            yield "readapt", words[1:]
        elif words[:2] == ["sbatch", "clusters/slurm.sh"]:
            yield "jobs/pipeline.py", words[2:]
        else:
            script = next((at for at, word in enumerate(words) if word.startswith("jobs/") and word.endswith(".py")), 0)
            if script:
                assert words[script - 1] == "python"
                yield words[script], words[script + 1 :]


ALL_COMMANDS = [(page, *command) for page in PAGES for command in readapt_commands(page)]


class Started(BaseException):
    """Raised in place of a command's work. It holds what the work was given."""

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.given = given


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the commands: the repository's folders, the YAML files of the pages, and no work is done."""
    for folder in FOLDERS:
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    for block in (block for page in PAGES for block in code_blocks(page) if block.language == "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block.text)
        assert name, f"the first line of a YAML block is a comment that names its file: {block.text}"
        (tmp_path / name[1]).write_text(block.text)

    def start(*given: Any, **_: Any) -> None:
        raise Started(*given)

    for name in WORK:
        monkeypatch.setattr(name, start)
    find = chain.stage_parts
    monkeypatch.setattr(chain, "stage_parts", lambda stage: (find(stage)[0], start))
    monkeypatch.setenv("AWS_REGION", "us-east-1")  # else it is looked up
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What the work of a command is given; the real command line parses and checks it."""
    try:
        if script == "readapt":
            code: object = cli.main(arguments)
        else:
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            code = runpy.run_path(script, run_name="__main__")
    except Started as stop:
        return stop.given
    except SystemExit as stop:
        code = stop.code
    pytest.fail(f"{script} {shlex.join(arguments)}: refused with exit code {code}")


def texts(values: Any) -> Iterator[str]:
    """Every text in a config's values."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict | list | tuple):
        for each in values.values() if isinstance(values, dict) else values:
            yield from texts(each)


def outputs(config: Any) -> set[str]:
    """What a command writes: all under a root, or the output of a stage with what it makes beside it."""
    if isinstance(config, chain.RunConfig):
        return {config.root, *(step.config.output for step in chain.plan_run(config))}
    output = getattr(config, "output", None) or getattr(config, "root", None)
    return {output, f"{output}-blocks", f"{output}-sample"} if output else set()


def test_the_pages_have_commands() -> None:
    assert {label(page) for page, *_ in ALL_COMMANDS} >= {
        "README.md",
        "clusters/README.md",
        "jobs/README.md",
        "readapt_ray/serving/README.md",
        "readapt_ray/sources/README.md",
    }
    assert len(ALL_COMMANDS) > 30
    assert {script for _, script, _ in ALL_COMMANDS} >= {"readapt", "jobs/pipeline.py"}


def test_every_command_parses_and_reads_what_another_writes(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []
    for _, script, arguments in ALL_COMMANDS:
        configs += [each for each in started(script, arguments, monkeypatch) if hasattr(each, "model_dump")]
    written = set[str]().union(*map(outputs, configs))
    assert {"run/adapter-blocks", "s3://my-bucket/run/index/adapted"} <= written
    for config in configs:
        read = {each for each in texts(config.model_dump(mode="json")) if each.startswith(OUTPUTS)}
        assert read <= written, f"no command on any page writes {read - written}, which {config!r} reads"


def test_a_command_with_a_typing_error_is_found(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.fail.Exception, match="exit code 2"):
        started("readapt", ["embed", "--retreiver", "a", "--corpus", "b", "--output", "c"], monkeypatch)
    with pytest.raises(pytest.fail.Exception, match="exit code 2"):
        started("jobs/pipeline.py", ["--config", "jobs/no-such-file.yaml"], monkeypatch)


def test_the_files_of_api_keys_are_files_of_api_keys(desk: Path) -> None:
    files = [Path(words[words.index("--api-keys") + 1]) for _, _, words in ALL_COMMANDS if "--api-keys" in words]
    assert files
    for file in files:
        assert len(read_keys(str(file))) == len(yaml.safe_load(file.read_text()))


def test_the_encodings_are_encodings() -> None:
    blocks = [block for page in PAGES for block in code_blocks(page) if block.language == "json"]
    assert blocks
    for block in blocks:
        Encoding.parse(json.loads(block.text))


@cache
def help_text(*command: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return said.getvalue()


def options_of(command: str) -> set[str]:
    """The options that `readapt COMMAND --help` lists."""
    return set(re.findall(r"--[a-z][a-z-]*", help_text(command)))


def all_options() -> set[str]:
    commands = re.findall(r"^  ([a-z]+)  ", help_text(), re.MULTILINE)
    return set[str]().union(*map(options_of, commands))


@each_page
def test_options_in_sentences_exist(page: Path) -> None:
    for span in spans(page):
        command = re.match(r"readapt ([a-z]+) ", span)
        if command or span.startswith("--"):
            known = options_of(command[1]) if command else all_options() | FOREIGN_OPTIONS
            unknown = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", span)) - known
            assert not unknown, f"{span}: unknown {unknown}"


@each_page
def test_files_and_targets_of_commands_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for words in shell_commands(page):
        if words[0] == "make":
            assert words[1] in targets, words
        for word in words:
            if re.match(r"(benchmarks|clusters|jobs|tests)/", word):
                assert (REPOSITORY / word).exists(), word
        if words[0] == "python" and words[1].startswith("benchmarks/"):
            source = (REPOSITORY / words[1]).read_text()
            assert all(f'"{word}"' in source for word in words if word.startswith("--")), words


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in found}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


@each_page
def test_environment_variables_are_read_somewhere(page: Path) -> None:
    files = [*PACKAGE.rglob("*.py"), *(REPOSITORY / "clusters").glob("*.sh")]
    sources = "".join(file.read_text() for file in files)
    for name in set(re.findall(r"READAPT_[A-Z_]+", page.read_text())):
        assert name in sources, name


@each_page
def test_pages_are_short(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert len(lines) <= MAX_LINES.get(label(page), 300)
    wide = [line for line in lines if len(line) > MAX_COLUMNS and not (line.startswith("|") and page != PAGES[0])]
    assert not wide, wide


@each_page
def test_files_and_names_in_sentences_exist(page: Path) -> None:
    ours = {each.name for root in (REPOSITORY, PACKAGE) for each in root.iterdir()}
    sources = "".join(file.read_text() for file in PACKAGE.rglob("*.py"))
    for span in spans(page):
        is_path = re.fullmatch(r"[a-z_]+/[\w./-]*", span) and span.split("/")[0] in ours
        if is_path and not re.search(r"NAME|STAGE|SPLIT", span):
            assert any((root / span).exists() for root in (REPOSITORY, PACKAGE)), span
        if page.name == "CONTRIBUTING.md" and re.fullmatch(r"[A-Za-z][A-Za-z_]*[A-Za-z]", span):
            assert re.search(rf"\b{span}\b", sources), span


@pytest.mark.parametrize("page", PAGES[:2], ids=label)
def test_the_tree_names_every_folder(page: Path) -> None:
    tree = next(block.text for block in code_blocks(page) if block.text.startswith("readapt_ray/"))
    named = set(re.findall(r"[a-z_]+", tree))
    folders = {folder.parent.name for folder in PACKAGE.glob("*/__init__.py")}
    assert folders - {"nn"} <= named
    assert {"jobs", "clusters", "benchmarks", "tests"} <= named
    files = re.findall(r"[a-z_]+\.py", tree)
    assert all((PACKAGE / file).exists() or list(PACKAGE.glob(f"*/{file}")) for file in files)


class Answers:
    """In place of the service behind the API: it answers every request that the API accepts."""

    async def embed(self, body: schema.EmbeddingsRequest, _: object) -> bytes:
        number = 1 if isinstance(body.input, str) else len(body.input)
        vectors = np.zeros((number, 4), dtype=np.float32)
        is_base64 = body.encoding_format == "base64"
        return answers.embeddings_json(vectors, as_base64=is_base64, model="tiny", fingerprint="f", num_tokens=1)

    async def search(self, body: schema.SearchRequest, _: object) -> bytes:
        number = 1 if isinstance(body.query, str) else len(body.query or ())
        return answers.search_json(
            [[("d1", 0.5)]] * number, {}, model="tiny", fingerprint="f", num_tokens=1, missing=()
        )

    def models(self, _: object) -> schema.ModelList:
        return schema.ModelList(data=[])

    async def readiness(self) -> Readiness:
        return Readiness(ready=True, versions={})


async def no_metrics() -> str:
    return ""


def answering_client() -> httpx.Client:
    """A client of the real API, which refuses fields that the API does not know."""
    from starlette.testclient import TestClient

    api = build_api(Answers(), no_metrics)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {})["trace"] = SimpleNamespace(request_id="1")
        await api(scope, receive, send)

    def check(request: httpx.Request) -> None:
        if request.method == "POST":
            assert json.loads(request.content).keys() <= REQUEST_FIELDS[request.url.path]

    client = TestClient(app)
    client.event_hooks["request"].append(check)
    return client


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=label)
def test_python_snippets_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openai = pytest.importorskip("openai")

    def stage(config: Any) -> artifacts.Artifact:
        fields = {"counts": {}, "details": {}, "seconds": 1.0, "created": "2026-11-28T15:00:00", "versions": {}}
        manifest = artifacts.Manifest(stage="ingest", fingerprint="f", config={}, inputs={}, **fields)
        return artifacts.Artifact(Location(config.output), manifest)

    monkeypatch.setattr("readapt_ray.stages.ingest.ingest", stage)
    monkeypatch.setattr(chain, "train_on_passages", stage)
    real = openai.OpenAI
    monkeypatch.setattr(openai, "OpenAI", lambda **given: real(**given, http_client=answering_client(), max_retries=0))
    for block in (block for block in code_blocks(page) if block.language == "python"):
        if re.search(r"^from (langchain|llama|airflow)", block.text, re.MULTILINE):
            continue  # tests/serving/test_clients.py runs these; Airflow is not installed
        if "ra.run(" in block.text:
            continue  # tests/recipes/test_chain.py runs it
        names: dict[str, Any] = {}
        exec(compile(block.text, label(page), "exec"), names)
        assert "adapter" in names or len(names["answer"].data) == 1


@pytest.mark.parametrize("page", [page for page in PAGES if "\ncurl " in page.read_text()], ids=label)
def test_curl_commands_are_answered(page: Path) -> None:
    commands = [words for words in shell_commands(page) if words[0] == "curl"]
    assert commands
    for _, url, *options in commands:
        given = dict(zip(options[::2], options[1::2], strict=True))
        assert given.keys() <= {"-H", "-d"}
        name, _, value = given.get("-H", "accept: */*").partition(": ")
        client = answering_client()
        answer = client.request("POST" if "-d" in given else "GET", url, content=given.get("-d"), headers={name: value})
        assert answer.status_code == 200, (url, answer.text)


def test_the_page_of_serving_lists_every_route() -> None:
    api = build_api(Answers(), no_metrics)
    paths = [(each.path.replace(":path}", "}"), each.methods - {"HEAD"}) for each in api.routes]
    routes = {f"{method} {path}" for path, methods in paths for method in methods}
    listed = {each for each in spans(PACKAGE / "serving/README.md") if re.match(r"(GET|POST) /", each)}
    assert listed == routes - {"POST /embeddings", *(f"POST {each}/rerank" for each in ("", "/v1", "/v2"))}
