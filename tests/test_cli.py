"""The command line as a user meets it: messages, exit codes, help."""

import json
import os
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from readapt_ray import cli, flags
from readapt_ray.artifacts import open_artifact
from readapt_ray.command_parsers import parser_of
from readapt_ray.evaluation.runs import write_run
from readapt_ray.recipes import chain, running
from readapt_ray.records import ScoredDoc
from readapt_ray.stages import STAGES
from readapt_ray.stages.ingest import IngestConfig
from readapt_ray.stages.ingest import ingest as ingest_corpus
from tests import factories

REPOSITORY = Path(__file__).parent.parent


def run(*arguments: str) -> tuple[int, str, str]:
    """`readapt` in a process of its own: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "readapt_ray", *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a command that must be refused as bad input, without a long wait and without a traceback."""
    started = time.monotonic()
    code = cli.main(list(arguments))
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    assert time.monotonic() - started < 150
    assert said.count("readapt: error:") == 1, said
    lines = [said[said.index("readapt: error:") :].rstrip("\n")]
    import ray

    assert "RAY_ADDRESS" not in said
    assert ray is not None
    return lines[0]


@pytest.mark.parametrize(("arguments", "unbuffered"), [(["ingest", "--help"], ""), (["--help"], "1")])
def test_a_reader_that_goes_away_ends_a_command_without_a_word(arguments: list[str], unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "readapt_ray", *arguments],
            stdout=closed,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            text=True,
            timeout=300,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", [(1,), (0, 1), (2,), (0, 1, 2)], ids=str)
def test_closed_streams_are_as_the_null_device(closed: tuple[int, ...], tmp_path: Path) -> None:
    """`readapt ... >&-`: the command works, and files that it opens do not get the numbers of the streams."""
    script = (
        "import sys\nfrom readapt_ray import cli\ncode = cli.main(['--version'])\nprint('said', file=sys.stderr)\n"
        "with open(sys.argv[1], 'w') as file:\n    file.write(f'{code} {file.fileno() > 2}')\n"
    )
    closing = " ".join(f"{each}>&-" for each in closed)
    command = ["sh", "-c", f'exec "$0" "$@" {closing}', sys.executable, "-c", script, str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120, check=False)
    assert (tmp_path / "found").read_text() == "0 True", done.stderr
    assert (done.stdout.strip(), done.stderr.strip()) == (
        "" if 1 in closed else version("readapt-ray"),
        "" if 2 in closed else "said",
    )


def test_a_connection_that_breaks_is_a_failure_though_stdout_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(cli._RUNNERS, "status", breaks)
    assert cli.main(["status"]) == 1
    assert "failed: BrokenPipeError" in capsys.readouterr().err


def test_help_names_every_command_and_every_option() -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"\n  {name}" in out for name in (*STAGES, "run", "serve", "status", "quickstart"))
    assert "130 after Ctrl-C, 143 after SIGTERM" in out


@pytest.mark.parametrize("command", [*STAGES, "serve"])
def test_each_option_has_a_help_text_and_a_default_or_is_required(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "serve":
        from readapt_ray.serving.options import ServeConfig

        config_class: type = ServeConfig
    else:
        config_class, _ = chain.stage_parts(command)
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in config_class.model_fields.items():  # type: ignore[attr-defined]
        assert f"--{name.replace('_', '-')}" in text
        assert field.description, name
        assert " ".join(field.description.split()[:4]) in text, name


def test_help_groups_the_options_and_begins_with_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    usage, _, text = capsys.readouterr().out.partition("options:")
    assert "usage: readapt train --pretrained TEXT --corpus TEXT --output TEXT [OPTIONS]\n" in usage
    places = [text.index(f"\n{title}:\n") for title in flags.GROUPS]
    assert places == sorted(places)
    group = {title: text[place:] for title, place in zip(flags.GROUPS, places, strict=True)}
    inputs = [line.split()[0] for line in group["Input and output"].splitlines() if line.startswith("  --")]
    assert inputs[:3] == ["--pretrained", "--corpus", "--output"]
    assert "--overwrite" in group["Safety"]
    assert "--num-workers" in group["Speed and memory"].partition("\nSafety:")[0]
    assert "--lora-rank" in group["Settings"].partition("\nSpeed and memory:")[0]
    assert "'\"a,b\",c' has two items" in text


def test_usage_of_plan_names_the_file_and_the_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    assert "usage: readapt plan --config FILE.yaml --cluster TEXT [OPTIONS]\n" in capsys.readouterr().out


def test_help_of_compare_and_paper_names_the_sections_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    for command, sections in (("compare", "embed_options, train_options"), ("paper", "train, embed, search")):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert f"sections {sections}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", STAGES)
def test_help_texts_are_sentences(command: str) -> None:
    """Each begins with a word and a capital letter (or a value that it explains) and ends with a full stop."""
    config_class, _ = chain.stage_parts(command)
    for name, field in config_class.model_fields.items():
        text = field.description or ""
        first = text.split()[0].rstrip(":")
        assert text.endswith("."), name
        assert len(text.split()) >= 3, name
        assert first[0].isupper() or first in str(field.annotation) or first in ("flat", "nprobe"), name


def test_help_of_run_names_the_sections_of_the_file_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    entries = " ".join(capsys.readouterr().out.split("Options of the file:")[1].split())
    assert "source: The corpus:" in entries
    assert "train: overwrite, method, lora_rank" in entries
    search = entries.partition(" search: ")[2].partition(" evaluate: ")[0].split(", ")
    assert {"top_k", "drop_self_hits"} <= set(search)
    assert not {"retriever", "index", "queries", "output"} & set(search)


def test_what_is_mistyped_is_named_with_what_was_meant(
    pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, "embedd").endswith("no command 'embedd'; did you mean 'embed'?")
    assert "no command 'frobnicate'; the commands are quickstart, run, ingest" in refused(capsys, "frobnicate")
    assert refused(capsys, "embed", "--ouput", "x").endswith("unknown option '--ouput'; did you mean '--output'?")
    assert refused(capsys, "embed", "--zzz=1").endswith("'--zzz'; `readapt embed --help` shows the options")
    assert "--output: expected one argument" in refused(capsys, "embed", "--output")
    vectors = refused(capsys, "index", "--vectors", "v", "--output", "o", "--kind", "hsnw")
    assert vectors.endswith("did you mean 'hnsw'?")
    file = tmp_path / "run.yaml"
    file.write_text("source: a\npretrained: b\nretriever: c\ntrain: {lora_rnk: 4}\n")
    assert "section 'train': unknown option 'lora_rnk'; did you mean 'lora_rank'?" in refused(
        capsys, "run", "--config", str(file)
    )
    assert "'trian'; did you mean 'train'?" in refused(
        capsys, "run", "--config", str(file), "--set", "trian.lora_rank=4"
    )


def test_what_is_wrong_is_said_in_a_sentence_with_the_names_of_flags(capsys: pytest.CaptureFixture[str]) -> None:
    search = ("search", "--retriever", "r", "--queries", "q", "--output", "o.trec")
    assert refused(capsys, *search).endswith("readapt search: give exactly one of --index and --vectors")
    tune = ("tune", "--pretrained", "p", "--retriever", "r", "--adapter", "a", "--corpus", "c", "--output", "o")
    assert refused(capsys, *tune, "--queries", "q").endswith(
        "readapt tune: give both --queries and --qrels, or none of them"
    )
    assert refused(capsys, *search, "--index", "i", "--top-k", "0").endswith('--top-k = "0": must be 1 or more')
    assert refused(capsys, *search, "--index", "i", "--top-k", "ten").endswith('"ten": must be a whole number')
    assert "option --output is required" in refused(capsys, "ingest", "--source", "s")
    assert refused(capsys, "serve").endswith("give a --retriever, or several --versions with one each, or --domains")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained model, retriever, adapter, an adapter of another model, and a corpus."""
    folder = tmp_path_factory.mktemp("pieces")
    base = factories.tiny_decoder(folder / "base")
    factories.write_contract(factories.full_retriever(folder / "retriever", base))
    factories.dora_adapter(folder / "adapter", base)
    other = factories.tiny_decoder(folder / "other", hidden_size=48)
    factories.dora_adapter(folder / "other-adapter", other)
    passages = factories.small_corpus(30)
    factories.ingest_artifact(folder / "corpus", passages, *factories.small_queries(passages))
    return folder


def merge_arguments(pieces: Path, output: Path, **changes: str) -> list[str]:
    values = {
        "pretrained": str(pieces / "base"),
        "retriever": str(pieces / "retriever"),
        "adapter": str(pieces / "adapter"),
        "output": str(output),
        **changes,
    }
    return ["merge", *(part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value))]


def test_a_stage_prints_where_its_artifact_lies(
    pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(merge_arguments(pieces, tmp_path / "m", knowledge_scale="0.25")) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_bad_input_gives_one_message_and_exit_code_2(
    pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent")
    assert absent in refused(capsys, "ingest", "--source", absent, "--output", str(tmp_path / "a"))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl" in refused(capsys, "ingest", "--source", str(empty), "--output", str(tmp_path / "b"))
    textless = tmp_path / "textless.jsonl"
    textless.write_text('{"_id": "1", "name": "x"}\n')
    assert "text" in refused(capsys, "ingest", "--source", str(textless), "--output", str(tmp_path / "c"))
    corpus = str(pieces / "corpus")
    not_a_model = refused(capsys, "embed", "--retriever", corpus, "--corpus", corpus, "--output", str(tmp_path / "d"))
    assert "is not a model" in not_a_model
    other = refused(capsys, *merge_arguments(pieces, tmp_path / "e", adapter=str(pieces / "other-adapter")))
    assert "other-adapter" in other
    scales = refused(capsys, *merge_arguments(pieces, tmp_path / "f", knowledge_scale="much"))
    assert "--knowledge-scale" in scales
    assert "much" in scales
    infinite = refused(capsys, *merge_arguments(pieces, tmp_path / "g", readapter_scale="nan"))
    assert "--readapter-scale" in infinite
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in refused(capsys, "serve", "--retriever", str(pieces / "retriever"), "--port", port)
    assert not any((tmp_path / name).exists() for name in "abcdefg")


def test_no_worker_starts_on_bad_input() -> None:
    """In a fresh process: Ray is not even imported when the input is refused."""
    script = (
        "import sys\nfrom readapt_ray import cli\n"
        "code = cli.main(['embed', '--retriever', 'absent-model', '--corpus', 'absent', '--output', 'x'])\n"
        "print(code, 'ray' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=300, check=True
    )
    assert done.stdout.split() == ["2", "False"]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import readapt_ray", "pydantic pyarrow numpy yaml argparse"),
        ("from readapt_ray import cli; cli.main(['--help'])", "pydantic pyarrow numpy yaml rich"),
        ("from readapt_ray import cli; cli.main(['embedd'])", "pyarrow numpy rich ray torch"),
        *(
            (f"import readapt_ray.{module}", "ray torch transformers deepspeed faiss pandas scipy")
            for module in (
                "recipes.chain",
                "recipes.compare",
                "recipes.paper.experiments",
                "planner",
                "root_status",
                "serving.options",
            )
        ),
        *((f"import readapt_ray.stages.{stage}", "ray torch transformers deepspeed faiss") for stage in STAGES),
    ],
)
def test_what_is_not_needed_is_not_imported(statement: str, absent: str) -> None:
    """What keeps `readapt --help` and a stage with nothing to do quick; a clock would say it less reliably."""
    script = f"import sys\n{statement}\nprint(*sorted(set({absent.split()}) & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=300, check=True
    )
    assert done.stdout.splitlines()[-1] == ""


def test_options_come_from_a_file_and_flags_go_before_it(
    pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text("knowledge_scale: 0.25\nreadapter_scale: 0.75\n")
    assert cli.main([*merge_arguments(pieces, tmp_path / "m", readapter_scale="1.0"), "--config", str(file)]) == 0
    config = json.loads((tmp_path / "m" / "manifest.json").read_text())["config"]
    assert (config["readapter_scale"], config["knowledge_scale"]) == (1.0, 0.25)
    file.write_text("knowlege_scale: 0.25\n")
    assert "unknown option 'knowlege_scale'; did you mean 'knowledge_scale'?" in refused(
        capsys, *merge_arguments(pieces, tmp_path / "n"), "--config", str(file)
    )


@pytest.mark.parametrize(("command", "goes_on"), [("run", True), ("serve", False), ("status", False)])
def test_an_interruption_says_how_to_go_on_where_one_can(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, goes_on: bool
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._RUNNERS, command, interrupt)
    assert cli.main([command]) == 130
    said = capsys.readouterr().err
    assert "interrupted" in said
    assert ("run the same command again" in said) == goes_on


@pytest.mark.parametrize("waiting", ["time.sleep(600)", "ray_get()"])
def test_sigterm_ends_a_command_as_ctrl_c_does_with_one_line(waiting: str) -> None:
    script = (
        "import signal, sys, time; from readapt_ray import cli, termination\n"
        "def ray_get():\n"  # raises a plain one, whichever signal it was
        "    try: time.sleep(600)\n"
        "    except KeyboardInterrupt: raise KeyboardInterrupt from None\n"
        "def work(_):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"  # as Ray does when it starts
        "    termination.take_back(); print('ready', flush=True); " + waiting + "\n"
        "cli._RUNNERS['run'] = work; sys.exit(cli.main(['run']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 143
    assert said.split() == [
        "readapt:",
        "terminated;",
        "run",
        "the",
        "same",
        "command",
        "again",
        "and",
        "it",
        "resumes",
        "where",
        "it",
        "stopped",
    ]


def test_sigterm_while_ray_starts_ends_so_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli._RUNNERS, "run", lambda _: sys.exit(15))  # Ray's own handler
    assert cli.main(["run"]) == 143
    assert "readapt: terminated; run the same command again" in capsys.readouterr().err
    monkeypatch.setitem(cli._RUNNERS, "run", lambda _: sys.exit(3))
    with pytest.raises(SystemExit):
        cli.main(["run"])


@pytest.fixture
def evaluation(pieces: Path, tmp_path: Path) -> list[str]:
    """The arguments that measure two runs."""
    _, qrels = factories.small_queries(factories.small_corpus(30))
    for name, score in (("base", 1.0), ("adapted", 3.0)):
        docs = [ScoredDoc(qrel.query_id, doc, s) for qrel in qrels for doc, s in ((qrel.doc_id, score), ("other", 2.0))]
        write_run(str(tmp_path / f"{name}.trec"), docs, tag=name)
    runs, qrels_file = f"{tmp_path}/base.trec,{tmp_path}/adapted.trec", f"{pieces}/corpus/qrels/test.parquet"
    return ["evaluate", "--runs", runs, "--qrels", qrels_file, "--output", f"{tmp_path}/report"]


def test_evaluate_and_run_print_verdict_and_tables_and_not_where_the_runs_are_from(
    evaluation: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(evaluation) == 0
    out = capsys.readouterr().out
    assert "## Where the runs are from" in (tmp_path / "report" / "report.md").read_text()
    assert "Where the runs are from" not in out
    assert "adapted is better than base: nDCG@10 1.0000 against 0.6309" in out
    assert "| adapted | 1.0000 (1.0000 to 1.0000) |" in out
    assert out.splitlines()[-1] == str(tmp_path / "report")
    file = tmp_path / "run.yaml"
    file.write_text("source: a\npretrained: b\nretriever: c\n")
    monkeypatch.setattr(running, "run", lambda *_, **__: {"report": open_artifact(f"{tmp_path}/report", "evaluate")})
    assert cli.main(["run", "--config", str(file)]) == 0
    of_run = capsys.readouterr().out
    table, closing = out.splitlines()[:-1], of_run.splitlines()[-3:]
    assert of_run.splitlines()[: len(table)] == table
    assert closing[0].split() == ["report", str(tmp_path / "report")]
    assert closing[2] == f"report: {tmp_path}/report/report.html"


def test_evaluate_ends_with_1_where_what_is_required_does_not_hold(
    evaluation: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holds, fails = "nDCG@10 >= base - 0.005", "nDCG@10 >= base + 0.9"
    assert cli.main([*evaluation, "--require", holds]) == 0
    assert f"adapted: `{holds}` holds (difference" in capsys.readouterr().out
    for _ in range(2):  # when it is measured, and when the report is there
        assert cli.main([*evaluation, "--require", f"{holds},{fails}", "--overwrite"]) == 1
        said = capsys.readouterr()
        assert f"1 of 2 requirements do not hold: adapted: {fails} does not hold (difference" in said.err
    assert "does not hold" in (tmp_path / "report" / "report.html").read_text()
    assert cli.main([*evaluation, "--require", "nDCG@7 >= base", "--overwrite"]) == 2


def test_ingest_says_in_words_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("1", "one"), ("2", "two"), ("3", "one"), ("4", ""), ("5", " "), ("1", "three")]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"_id": doc_id, "text": text}) + "\n" for doc_id, text in rows))
    assert cli.main(["ingest", "--source", str(source), "--output", str(tmp_path / "corpus")]) == 0
    assert (
        "ingest: left out as duplicates: 1; as bad rows: 3 (an earlier row has its id: 1; its text is empty: 2)"
        in capsys.readouterr().err
    )


def test_a_run_into_the_root_of_another_says_what_run_can_do(
    pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.jsonl").write_text('{"_id": "1", "text": "one"}\n')
    ingest_corpus(IngestConfig(source=f"{tmp_path}/other.jsonl", output=f"{tmp_path}/root/corpus", max_text_bytes=99))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"source: {tmp_path}/other.jsonl\npretrained: {pieces}/base\nretriever: {pieces}/retriever\n"
        f"root: {tmp_path}/root\n"
    )
    said = refused(capsys, "run", "--config", str(file))
    assert f"outputs under '{tmp_path}/root' were made with other options or inputs: " in said
    assert "Stale, with the time each took: corpus (" in said
    assert said.endswith("with --overwrite (or --from ingest), or give another --root")
    options = parser_of("run").parsed(["--config", str(file), "--set", "ingest.overwrite=true"])
    ingest, *others = chain.plan_run(cli._run_config(options))
    assert ingest.config.overwrite
    assert not any(step.config.overwrite for step in others)


def test_status_tells_done_from_missing(pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--root", str(pieces)]) == 0
    out = capsys.readouterr().out
    assert "corpus" in out
    assert "done" in out
    assert "30 passages" in out
    assert "no folder" in refused(capsys, "status", "--root", str(tmp_path / "absent"))
