"""`import readapt_ray as ra`: its names, what its functions take and refuse, and what they show."""

import inspect
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import readapt_ray as ra
from readapt_ray import artifacts, log_output
from readapt_ray.python import functions
from readapt_ray.python.retriever import Hit
from readapt_ray.recipes import run_file, running
from readapt_ray.storage import Location
from tests import factories, stub

PACKAGE = Path(ra.__file__).parent


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return done.stdout + done.stderr


def test_importing_loads_few_modules_and_no_other_package() -> None:
    """The number of modules decides the time of an import, and is the same on a busy machine."""
    code = (
        "import sys; before = set(sys.modules); import readapt_ray as ra; new = sys.modules.keys() - before;"
        "print(len(new) < 30, sorted({'torch', 'ray', 'pydantic', 'numpy', 'pyarrow'} & new))"
    )
    assert in_new_process(code) == "True []\n"


def test_the_public_names_are_one_list_that_is_there_and_no_module_hides() -> None:
    assert set(functions.FUNCTIONS) == set(ra._FROM_CONFIGS)
    for name in ra.__all__:
        assert getattr(ra, name) is not None
    assert dir(ra) == sorted(ra.__all__)
    modules = {each.stem for each in PACKAGE.iterdir()}
    assert not modules & set(ra.__all__), "an imported module would take the place of the name"
    wanted = {"run", "embed", "compare", "paper", "tune", "status", "quiet", "Encoder", "Retriever", "ReadaptError"}
    assert wanted <= set(ra.__all__)
    assert ra.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="has no attribute 'embd'; did you mean 'embed'"):
        _ = ra.embd
    assert not hasattr(ra, "__wrapped__")
    assert pickle.loads(pickle.dumps(ra.measure)) is ra.measure


def test_the_signatures_for_editors_are_those_of_the_configs() -> None:
    assert (PACKAGE / "__init__.pyi").read_text() == stub.text(), "an option changed: run `make stub`"


@pytest.mark.parametrize("name", ra._FROM_CONFIGS)
def test_a_function_takes_the_options_of_its_config_and_its_help_explains_each(name: str) -> None:
    function = getattr(ra, name)
    config_class = functions._found(functions.FUNCTIONS[name].config)
    parameters = inspect.signature(function).parameters
    assert set(parameters) == set(config_class.model_fields)
    text = " ".join((inspect.getdoc(function) or "").split())
    for option, field in config_class.model_fields.items():
        assert f"{option}: {' '.join((field.description or '').split())}" in text
        is_required = parameters[option].default is inspect.Parameter.empty
        assert is_required == field.is_required()
    assert " ".join(inspect.cleandoc(config_class.__doc__).split()).endswith(
        text.partition("Options: ")[2].partition(" Returns:")[0]
    )


def test_paths_are_annotated_and_taken_wherever_a_path_is(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("readapt_ray.stages.evaluate.evaluate", given.append)
    ra.evaluate(runs=[Path("a,b.trec"), "c.trec"], qrels=Path("q"), output=Path("o"))
    ra.evaluate(runs=Path("a,b.trec"), qrels="q", output="o")
    ra.evaluate(ra.EvaluateConfig(runs="a.trec,b.trec", qrels=Path("q"), output=Path("o")))
    assert [(each.runs, each.qrels, each.output) for each in given] == [
        (("a,b.trec", "c.trec"), "q", "o"),
        (("a,b.trec",), "q", "o"),
        (("a.trec", "b.trec"), "q", "o"),
    ]
    parameters = inspect.signature(ra.evaluate).parameters
    assert parameters["output"].annotation == str | Path
    assert parameters["seed"].annotation is int
    assert Path in inspect.signature(ra.train).parameters["only"].annotation.__args__


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: ra.embed(retreiver="a", corpus="b", output="c"),
            r"ra\.embed: .*'retreiver'; did you mean 'retriever'\?",
        ),
        (lambda: ra.embed(retriever="a", corpus="b"), r"ra\.embed: option 'output' is required"),
        (lambda: ra.embed("a", "b"), r"ra\.embed: 'a' has no name; give each option by its name"),
        (lambda: ra.index(vectors="a", output="b", kind="hsnw"), "kind = .*did you mean 'hnsw'"),
        (lambda: ra.search(retriever="a", index="b", queries="c", output="d.trec", top_k=0), "top_k = 0: .*1 or more"),
        (lambda: ra.IngestConfig(sorce="x", output="y"), "IngestConfig: .*'sorce'; did you mean 'source'"),
        (lambda: ra.IngestConfig(source=3, output="y"), "IngestConfig: source = 3: must be text"),
        (
            lambda: setattr(ra.IngestConfig(source="x", output="y"), "format", "tsv"),
            "format = 'tsv': .*cannot be changed",
        ),
        (
            lambda: ra.EmbedConfig(retriever="a", corpus="b", output="c", encoding={"poolin": "mean"}),
            "unknown option 'encoding.poolin'; did you mean 'pooling'",
        ),
        (lambda: ra.Encoding("mean"), r"Encoding: 'mean' has no name; give each option by its name, such as "),
        (lambda: ra.IngestConfig("notes/", "run"), r"IngestConfig: 'notes/' has no name"),
        (lambda: ra.Encoding(pooling="men", add_bos=True, add_eos=True), "pooling = .*did you mean 'mean'"),
        (
            lambda: ra.run("absent.yaml"),
            r"no file 'absent.yaml'; give a run's options, one per line \(source, pretrained, ",
        ),
        (lambda: ra.run("a.yaml", overides={}), r"ra\.run: unknown option 'overides'; did you mean 'overrides'"),
        (lambda: ra.Retriever(retreiver="a", index="b"), r"ra\.Retriever: .*'retreiver'; did you mean 'retriever'"),
        (lambda: ra.Retriever("a", "b"), r"ra\.Retriever: .*by name: retriever=\.\.\., index=\.\.\."),
        (lambda: ra.Retriever.search(None, "x", k=2), r"ra\.Retriever\.search: .*'k'; did you mean 'top_k'"),
        (lambda: ra.Retriever.search(None, "x", topk=2), "'topk'; did you mean 'top_k'"),
        (lambda: ra.Retriever.search(None, "x", top_k="3"), "top_k = '3': must be a whole number"),
        (lambda: ra.Retriever.search(None, "x", top_k=True), "top_k = True: must be a whole number"),
        (lambda: ra.Retriever.search_all(None, "x"), "queries = 'x': must be a list of text"),
        (lambda: ra.run("a.yaml", overrides="a=b"), r"ra\.run: overrides = 'a=b': must be a dict or None"),
        (lambda: ra.run("a.yaml", overrides=["a=b"]), r"overrides = \['a=b'\]: must be a dict"),
        (lambda: ra.run({"source": "x"}), "config = {'source': 'x'}: must be text or a path or a RunConfig"),
        (lambda: ra.plan_run("a.yaml"), r"ra\.plan_run: config = 'a.yaml': must be a RunConfig"),
        (lambda: ra.open_model(None), r"ra\.open_model: name = None: must be text or a path"),
        (lambda: ra.open_model(Path("absent")), "no model 'absent'"),
        (lambda: ra.measure(Path("no.trec"), Path("no.tsv"), "nDCG@10"), "'no.tsv'"),
        (lambda: ra.measure({"q": ["d"]}, {"q": {"d": 1}}, "nDCG@10"), r"run\['q'\] = \['d'\]: must be a dict"),
        (lambda: ra.measure({"q": {"d": "x"}}, {}, "nDCG@10"), r"run\['q'\]\['d'\] = 'x': must be a number"),
        (lambda: ra.measure({}, {"q": {"d": 0.5}}, "nDCG@10"), r"qrels\['q'\]\['d'\] = 0.5: must be a whole number"),
        (lambda: ra.measure({}, {}, 3), "measures = 3: must be text or a list of text"),
        (lambda: ra.measure({}, qrel={}, measures="AP"), r"ra\.measure: .*'qrel'; did you mean 'qrels'"),
        (lambda: ra.quiet(3), r"ra\.quiet: too many positional"),
        (lambda: ra.status(None), r"ra\.status: root = None: must be text or a path"),
        (lambda: ra.Retriever(retriever="a"), r"ra\.Retriever: missing a required .*'index'"),
        (lambda: ra.Encoder("quickstart-retriever", dtyp="x"), r"ra\.Encoder: .*'dtyp'; did you mean 'dtype'"),
        (lambda: ra.Encoder("quickstart-retriever", dtype="float8"), "dtype = 'float8': must be one of"),
        (lambda: ra.Encoder("quickstart-retriever", device="gpu"), "device = 'gpu' is not on this machine; .*cpu"),
        (lambda: ra.Encoder("quickstart-retriever", device="cuda:99"), "device = 'cuda:99' is not on this machine"),
        (lambda: ra.Encoder("quickstart-retriever", batch_tokens="x"), "batch_tokens = 'x': must be a whole number"),
        (lambda: ra.Encoder(None), r"ra\.Encoder: retriever = None: must be text or a path or an Artifact"),
        (lambda: ra.Encoder("quickstart-retriever", encoding={"poolin": "mean"}), "'poolin'; did you mean 'pooling'"),
        (
            lambda: ra.Encoder("quickstart-retriever").encode(None, "query"),
            "texts = None: must be text or a list of text",
        ),
        (
            lambda: ra.Encoder("quickstart-retriever").encode(["a", 3], "query"),
            r"ra\.Encoder\.encode: texts\[1\] = 3: must be text",
        ),
        (
            lambda: ra.Encoder("quickstart-retriever").encode(["a"], "passage", titles=[3]),
            r"titles\[0\] = 3: must be text",
        ),
        (lambda: ra.Encoder("quickstart-retriever").encode(["a"]), r"ra\.Encoder\.encode: missing .*'kind'"),
        (lambda: ra.Encoder("quickstart-retriever").encode(["a"], kind="qery"), "kind = .*did you mean 'query'"),
        (lambda: ra.Encoder("quickstart-retriever").encode([3], kind="query"), "texts\\[0\\]|string|text"),
        (lambda: ra.status("absent"), "no folder 'absent'"),
        (lambda: ra.open_artifact("absent"), "'absent' does not exist; give the output folder of a stage"),
        (lambda: ra.Encoder("quickstart-retreiver"), "no model .*did you mean 'quickstart-retriever'"),
    ],
)
def test_what_a_user_gets_wrong_is_an_error_of_ours_that_names_it(call: Any, said: str) -> None:
    with pytest.raises(ra.ReadaptError, match=said):
        call()


def test_a_path_that_may_not_be_read_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr("readapt_ray.stages.index.index", refuse)
    with pytest.raises(ra.InputError, match="'/secret'; give a path that may be read"):
        ra.index(vectors="a", output="b")


def test_an_encoder_encodes_one_text_or_several_as_the_package_does() -> None:
    encoder = ra.Encoder("quickstart-retriever")
    several = encoder.encode(["split a tensor", "join threads"], kind="query")
    assert several.shape == (2, encoder.dimension)
    assert encoder.encode("split a tensor", kind="query") == pytest.approx(several[0], abs=1e-6)
    passages = encoder.encode(["a text"], "passage", titles=["a title"])
    assert not np.allclose(passages, encoder.encode(["a text"], "passage"))
    assert repr(encoder) == "Encoder('quickstart-retriever'): 256 dimensions, cpu"
    assert len(encoder.fingerprint) == 32


def test_values_of_numpy_and_paths_and_an_encoding_as_a_dict_are_taken(tmp_path: Path) -> None:
    as_dict = ra.Encoder("quickstart-retriever").encoding.model_dump()
    encoder = ra.Encoder(Path("quickstart-retriever"), encoding=as_dict)
    vectors = encoder.encode(np.array(["a text", "another"]), "passage", titles=("a", "b"))
    assert vectors.shape == (2, encoder.dimension)
    run, qrels = tmp_path / "a.trec", tmp_path / "qrels.tsv"
    run.write_text("q Q0 d 1 0.5 x\n")
    qrels.write_text("q\td\t1\n")
    of_files = ra.measure(run, qrels, ["RR@10"])
    of_numbers = ra.measure({"q": {"d": np.float32(0.5), "e": 0}}, {"q": {"d": np.int64(1)}}, "RR@10")
    assert of_files.means == of_numbers.means == {"RR@10": 1.0}


def test_overrides_are_names_with_dots_or_sections_and_win_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "my.yaml"
    values = {"source": "a", "pretrained": "b", "retriever": "c", "train": {"lora_rank": 8, "seed": 3}}
    file.write_text(yaml.safe_dump(values))
    given: list[Any] = []
    monkeypatch.setattr(running, "run", lambda config, **_: given.append(config) or {})
    dotted = {"train.lora_rank": 4, "merge.knowledge_scale": 0.25}
    nested = {"train": {"lora_rank": 4}, "merge": {"knowledge_scale": 0.25}}
    for overrides in (dotted, nested):
        assert ra.run(file, root=tmp_path / "root", overrides=overrides) == {}
    ra.run(run_file.read_run(str(file), {}), root=tmp_path / "root", overrides=dotted)
    assert given[0] == given[1] == given[2]
    assert given[0].train == {"lora_rank": 4, "seed": 3}
    assert given[0].root == str(tmp_path / "root")
    monkeypatch.undo()
    for wrong, said in (
        ({"trian.seed": 1}, "'trian'; did you mean 'train'"),
        ({"source.x": 1}, "'source' is not a section"),
    ):
        with pytest.raises(ra.InputError, match=said):
            ra.run(file, root="r", overrides=wrong)


def test_progress_shows_without_any_set_up_and_not_when_quiet_or_where_logging_is_set_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = (
        "import readapt_ray as ra; {}"
        "from readapt_ray.stages import index; import logging;"
        "index.index = lambda _: [logging.getLogger('readapt_ray').log(level, level) for level in (20, 30)];"
        "ra.index(vectors='a', output='b'); ra.index(vectors='a', output='b')"
    )
    said = in_new_process(code.format("")).split("\n")
    assert [line.rpartition(" ")[2] for line in said] == ["20", "30", "20", "30", ""]
    said = in_new_process(code.format("ra.quiet(); ")).split("\n")
    assert [line.rpartition(" ")[2] for line in said] == ["30", "30", ""]
    own = "import logging; logging.basicConfig(level=20, format='own %(message)s'); "
    assert in_new_process(code.format(own)) == "own 20\nown 30\n" * 2
    monkeypatch.setenv("READAPT_LOG_LEVEL", "WARNING")
    log_output.write_to_terminal()
    assert not logging.getLogger("readapt_ray").isEnabledFor(logging.INFO)


@pytest.mark.parametrize(("name", "is_said"), [("Encoder", False), ("run", False), ("__version__", True)])
def test_a_notebook_without_ipywidgets_is_not_asked_for_it(name: str, is_said: bool) -> None:
    code = (
        "import sys, types; shell = types.ModuleType('ipykernel.zmqshell'); sys.modules['ipykernel.zmqshell'] = shell;"
        "import ray; from ray.widgets import util; import readapt_ray as ra; ra.{};"
        "util._has_missing(('no_such_package', '1'), message='Run pip');"
        "sys.modules['IPython'] = types.SimpleNamespace(get_ipython=lambda: shell); sys.modules['ipywidgets'] = None;"
        "del sys.modules['tqdm.autonotebook'], sys.modules['tqdm.auto']; import tqdm.auto"
    )
    said = in_new_process(code.format(name))
    assert ("IProgress not found" in said) == is_said
    assert ("Run pip" in said) == is_said


def test_status_prints_as_a_table(tmp_path: Path) -> None:
    factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(3))
    shown = ra.status(tmp_path)
    assert "corpus" in repr(shown)
    assert "1 of 1 done" in repr(shown)
    assert shown.rows[0]["state"] == "done"
    assert list(shown.to_pandas()["artifact"]) == ["corpus"]
    assert shown._repr_html_().startswith("<pre>")


def test_a_stage_returns_an_artifact_that_stands_for_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(3))
    made = artifacts.open_artifact(str(tmp_path / "corpus"), "ingest")
    given: list[Any] = []
    monkeypatch.setattr("readapt_ray.stages.ingest.ingest", lambda _: made)
    monkeypatch.setattr("readapt_ray.stages.embed.embed", given.append)
    corpus = ra.ingest(source="x", output=tmp_path / "corpus")
    assert isinstance(corpus, ra.Artifact)
    ra.embed(retriever="a", corpus=corpus, output="b")
    assert given[0].corpus == str(tmp_path / "corpus") == Location(given[0].corpus).uri


def test_a_hit_shows_the_beginning_of_its_text():
    hit = Hit("d1", 0.51234, "Arrays", "a" * 100)
    assert repr(hit) == f"Hit(doc_id='d1', score=0.5123, title='Arrays', text='{'a' * 80}...')"
    kept = hit._replace(text="short", columns={"year": 2020})
    assert repr(kept) == "Hit(doc_id='d1', score=0.5123, title='Arrays', text='short', columns={'year': 2020})"
