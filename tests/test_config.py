"""What configs take: lists in one text, whichever way they come in."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from readapt_ray import cli, flags
from readapt_ray.comma_lists import split_list
from readapt_ray.command_parsers import parser_of
from readapt_ray.config import Config
from readapt_ray.errors import InputError
from readapt_ray.planner import PlanConfig
from readapt_ray.recipes import chain
from readapt_ray.recipes.compare_plan import NOT_IN_A_COMPARISON, CompareConfig
from readapt_ray.recipes.paper.options import PaperConfig
from readapt_ray.serving.options import ServeConfig
from readapt_ray.stages import STAGES
from readapt_ray.stages.evaluate import EvaluateConfig
from readapt_ray.stages.ingest import IngestConfig
from readapt_ray.stages.merge import MergeConfig
from readapt_ray.stages.pack import PackConfig
from readapt_ray.stages.tune import TuneConfig
from readapt_ray.yaml_files import parse_yaml

GAINS = "nDCG(gains={0:0,1:1,2:5})@10"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        (" , ,", []),
        ("a", ["a"]),
        (" a , b,", ["a", "b"]),
        (f"{GAINS},R@5", [GAINS, "R@5"]),
        ("a(b=[1,{2,3}],c=2)@3,d", ["a(b=[1,{2,3}],c=2)@3", "d"]),
        ('"my,run.trec",other.trec', ["my,run.trec", "other.trec"]),
        ('docs="python-docs:a,b",c', ["docs=python-docs:a,b", "c"]),
        ("it's/a.trec,b's.trec", ["it's/a.trec", "b's.trec"]),
        ('5" disk,b', ['5" disk', "b"]),
        ('"a,b', ['"a', "b"]),
        ("run(1.trec,b).trec", ["run(1.trec,b).trec"]),
        ("run(1.trec,b.trec", ["run(1.trec", "b.trec"]),
        ("a],b", ["a]", "b"]),
        ("a),(b,c),d", ["a)", "(b,c)", "d"]),
    ],
)
def test_a_list_is_split_outside_brackets_and_quotes(text: str, parts: list[str]) -> None:
    assert split_list(text) == parts


def test_a_list_is_split_alike_on_the_command_line_in_a_file_and_in_python() -> None:
    wanted = (GAINS, "R@5")
    text = ",".join(wanted)
    shared = {"runs": '"a,b.trec",c.trec', "qrels": "q", "output": "o"}
    given = [part for name, value in {**shared, "measures": text}.items() for part in (f"--{name}", value)]
    from_flags = flags.parse("evaluate", "", EvaluateConfig, given)
    from_file = EvaluateConfig.parse(yaml.safe_load(yaml.safe_dump({**shared, "measures": text})))
    in_python = EvaluateConfig(**shared, measures=text)
    assert from_flags == from_file == in_python
    assert (in_python.measures, in_python.runs) == (wanted, ("a,b.trec", "c.trec"))


def test_an_empty_item_between_others_is_refused() -> None:
    shared = {"qrels": "q", "output": "o"}
    with pytest.raises(InputError, match=r"x: --runs = 'a,,b': an item between commas is empty"):
        EvaluateConfig.parse({**shared, "runs": "a,,b"}, where="x", flags=True)
    assert EvaluateConfig.parse({**shared, "runs": "a,b, ,", "names": ""}).runs == ("a", "b")


def test_items_of_a_list_are_taken_as_they_are() -> None:
    assert EvaluateConfig(runs=["a,b.trec"], qrels="q", output="o").runs == ("a,b.trec",)
    assert CompareConfig(retrievers=["x/a,b"], corpus="c", output="o").retrievers == ("x/a,b",)


def test_set_takes_lists_as_flags_do(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("source: a\npretrained: b\nretriever: c\n")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--set", f"evaluate.measures={GAINS},R@500"]
    arguments += ["--set", 'evaluate.names="a,b",c', "--set", "train.target_modules=[q_proj, k_proj]"]
    steps = {step.name: step.config for step in chain.plan_run(_run_config(arguments))}
    assert steps["report"].measures == (GAINS, "R@500")
    assert steps["report"].names == ("a,b", "c")
    assert steps["runs/adapted.trec"].top_k == 500
    assert steps["adapter"].target_modules == ("q_proj", "k_proj")


def _run_config(arguments: list[str]) -> chain.RunConfig:
    return cli._run_config(parser_of("run").parsed(arguments))


def test_several_adapters_and_scales_are_lists_too() -> None:
    shared = {"pretrained": "p", "retriever": "r", "output": "o"}
    one = MergeConfig(**shared, adapter="a", knowledge_scale="0.25")
    assert (one.adapters, one.knowledge_scale) == (("a",), 0.25)
    quoted = MergeConfig(**shared, adapter='"a,b",c', knowledge_scale="0.25,1", accept="config,base")
    assert (quoted.adapters, quoted.knowledge_scale, quoted.accept) == (("a,b", "c"), (0.25, 1.0), ("config", "base"))
    with pytest.raises(InputError, match="one adapter"):
        MergeConfig.parse({**shared, "adapter": ","})
    tune = TuneConfig(**shared, adapter="a", corpus="c", accept="vocabulary", knowledge_scales="0,0.5")
    assert (tune.accept, tune.knowledge_scales) == (("vocabulary",), (0.0, 0.5))


@pytest.mark.parametrize(
    ("text", "corpora"),
    [
        ("docs=python-docs:deepspeed,huggingface_hub", ("docs=python-docs:deepspeed,huggingface_hub",)),
        ("docs=python-docs:a,b,nfcorpus,own=/x", ("docs=python-docs:a,b", "nfcorpus", "own=/x")),
        ('docs="python-docs:a,nfcorpus",scifact', ("docs=python-docs:a,nfcorpus", "scifact")),
        ("own=/x,nosuch", ("own=/x", "nosuch")),
    ],
)
def test_the_packages_of_a_corpus_stay_together(text: str, corpora: tuple[str, ...]) -> None:
    assert PaperConfig.parse({"corpora": text}).corpora == corpora


def test_text_options_are_not_split() -> None:
    class Plain(Config):
        text: str = ""
        words: tuple[str, ...] | None = None

    assert Plain(text="a,b", words="a,b") == Plain(text="a,b", words=("a", "b"))


CONFIGS = [*(chain.stage_parts(stage)[0] for stage in STAGES), CompareConfig, PaperConfig, PlanConfig]
CONFIGS += [ServeConfig, chain.RunConfig]
ODD = [
    "",
    "foo",
    "-1",
    "1e400",
    "nan",
    -1,
    0,
    1.5,
    1e30,
    [],
    ["a", "a"],
    [1],
    [None],
    [["a"]],
    {},
    {"a": 1},
    None,
    True,
    b"x",
]


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda each: each.__name__)
def test_no_message_shows_the_words_of_the_validator(config_class: type[Config]) -> None:
    required = {name: "x" for name, field in config_class.model_fields.items() if field.is_required()}
    for name in config_class.model_fields:
        for value in ODD:
            try:
                config_class.parse({**required, name: value}, flags=True)
            except InputError as error:
                assert not re.search(r"[Ii]nput should|valid |pattern|tuple\[|\.str\b|function-|validator", str(error))
                assert "\n" not in str(error)


def test_a_missing_option_is_explained_as_its_help_explains_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--config", "jobs/e5-mistral.yaml"]) == 2
    said = capsys.readouterr().err
    assert "readapt plan: option --cluster is required and was not given (The cluster: a file of `ray up`, a " in said
    with pytest.raises(InputError, match=r"'output' is required and was not given \(Folder[^.]*\); .*'corpus'"):
        PackConfig.parse({"pretrained": "m"})


def test_what_is_allowed_is_said() -> None:
    with pytest.raises(InputError, match='--mode = "foo": must be one of passage, packed'):
        PackConfig.parse({"pretrained": "p", "corpus": "c", "output": "o", "mode": "foo"}, flags=True)
    with pytest.raises(InputError, match="PackConfig: mode = 3: must be one of passage, packed"):
        PackConfig.parse({"pretrained": "p", "corpus": "c", "output": "o", "mode": 3})
    with pytest.raises(InputError, match=r"^MergeConfig: adapter = 3: must be text or a list$"):
        MergeConfig.parse({"pretrained": "p", "retriever": "r", "adapter": 3, "output": "o"})
    with pytest.raises(InputError, match=r"unknown option 'a'; .*; unknown option 'b'; .*"):
        EvaluateConfig.parse({"runs": "a", "qrels": "q", "output": "o", "a": 1, "b": 1})
    with pytest.raises(InputError, match="encoding = 3: must be a file, or a section of options by name"):
        MergeConfig.parse({"pretrained": "p", "retriever": "r", "adapter": "a", "output": "o", "encoding": 3})


@pytest.mark.parametrize("command", [*STAGES, "serve", "compare", "paper", "plan"])
def test_help_shows_no_empty_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "(default: )" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        (
            "ingest",
            "--source s --split-tokens 64 --tokenizer t --max-passage-chars 500",
            "--max-passage-chars does nothing with --split-tokens, which splits text files, too; leave one out",
        ),
        ("ingest", "--source s --overlap 8", "--overlap does nothing without --split-tokens; give both, or neither"),
        ("ingest", "--source s --tokenizer m", "--tokenizer does nothing without --split-tokens"),
        (
            "train",
            "--pretrained m --corpus c --method full --lora-rank 8",
            "--lora-rank does nothing with --method = 'full'",
        ),
        ("finetune", "--model m --corpus c --num-negatives 3", "--num-negatives does nothing without --negatives"),
        ("index", "--vectors v --code-bytes 8", "--code-bytes does nothing with --kind = 'flat', only with ivf-pq"),
        ("index", "--vectors v --kind hnsw --no-refine", "only with ivf-pq or rabitq; leave one out"),
        ("index", "--vectors v --memory-gb 3", "--memory-gb does nothing with --kind = 'flat', only with auto"),
        (
            "index",
            "--vectors v --kind auto --storage int8",
            "--storage does nothing with --kind = 'auto', which chooses it; leave one out",
        ),
        (
            "index",
            "--vectors v --kind auto --depth 8",
            "--depth does nothing with --kind = 'auto', which chooses it; leave one out",
        ),
        (
            "index",
            "--vectors v --depth 8",
            "--depth does nothing with --kind = 'flat', which compares every vector; leave one out",
        ),
        (
            "index",
            "--vectors v --factory IVF9,Flat --storage int8",
            "--storage does nothing with --factory, which is used unchanged; leave one out",
        ),
        (
            "index",
            "--vectors v --factory IVF9,PQ8 --kind ivf-pq --code-bytes 4",
            "--code-bytes does nothing with --factory, which is used unchanged; leave one out",
        ),
        ("merge", "--num-cpus-per-worker 2 --bundle b", "--num-cpus-per-worker does nothing without --num-workers"),
        (
            "compare",
            "--retrievers a --corpus c --queries-only",
            "--queries-only does nothing without --readapt, --finetune or --synthesize",
        ),
        (
            "compare",
            "--retrievers a --corpus c --bridge",
            "--bridge does nothing without --readapt, --finetune or --synthesize",
        ),
        (
            "train",
            "--pretrained m --corpus c --num-workers 2 --min-workers 4",
            "--min-workers = 4 is more than --num-workers = 2; lower it",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    command: str, options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, *options.split(), "--output", "o"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--num-replicas 4 --max-replicas 2", "--max-replicas = 2 is less than --num-replicas = 4; raise it"),
        ("--max-index-replicas 2 --index-replicas 3", "--max-index-replicas = 2 is less than --index-replicas = 3"),
        ("--max-domain-bytes 5", "--base, --knowledge-scale and --max-domain-bytes are for --domains; give these"),
        (
            "--update --write-config f",
            "--update changes a running server, and --write-config starts none; leave one out",
        ),
    ],
)
def test_options_of_a_server_that_would_do_nothing_are_refused(
    options: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["serve", "--retriever", "r", *options.split()]) == 2
    assert said in capsys.readouterr().err


def test_the_name_of_one_version_is_not_given_beside_several() -> None:
    with pytest.raises(
        InputError, match="name is of the only version, and versions have names of their own; leave one"
    ):
        ServeConfig.parse({"versions": {"a": {"retriever": "r"}}, "name": "b"})


@pytest.mark.parametrize(
    ("option", "value", "allowed"), [("num_passages", 0, "1 or more"), ("num_queries", -1, "0 or")]
)
def test_a_plan_is_of_a_number_that_can_be(option: str, value: int, allowed: str) -> None:
    with pytest.raises(InputError, match=f"{option} = {value}: must be {allowed}"):
        PlanConfig.parse({"cluster": "local", option: value})


@pytest.mark.parametrize("options", ["overlap: 0", "split_tokens: 64\ntokenizer: m\noverlap: 8", "tokenizer:"])
def test_options_that_are_used_or_have_their_defaults_are_taken(options: str) -> None:
    assert IngestConfig.parse({"source": "s", "output": "o", **yaml.safe_load(options)}).source == "s"


@pytest.mark.parametrize("section", ["merge", "finetune"])
def test_a_comparison_refuses_queries_only_in_a_section(section: str) -> None:
    refused = NOT_IN_A_COMPARISON[section]["queries_only"]
    assert refused == "set queries_only of the comparison, which compares models for queries beside the others"


@pytest.mark.parametrize("value", [True, False])
def test_a_switch_is_no_number(value: bool) -> None:
    """YAML reads `yes` as true, and pydantic would take that for 1."""
    with pytest.raises(
        InputError, match=f'^ServeConfig: num_replicas = "{str(value).lower()}": must be a whole number$'
    ):
        ServeConfig.parse({"retriever": "r", "num_replicas": value})
    with pytest.raises(InputError, match=r"num_gpus_per_replica = .*: must be a number$"):
        ServeConfig.parse({"retriever": "r", "num_gpus_per_replica": value})
    assert ServeConfig.parse({"retriever": "r", "truncate": value}).truncate is value


def test_an_array_in_place_of_a_text_is_refused_by_its_option() -> None:
    with pytest.raises(InputError, match="exclude"):
        PackConfig.parse({"pretrained": "m", "corpus": "c", "output": "o", "exclude": np.array(["a", "b"])})


def test_an_empty_text_is_no_way_to_leave_an_option_out() -> None:
    with pytest.raises(InputError, match="PackConfig: exclude is empty, as one from a variable that is not set"):
        PackConfig.parse({"pretrained": "p", "corpus": "c", "output": "o", "exclude": ""})
    assert PackConfig.parse({"pretrained": "p", "corpus": "c", "output": "o", "exclude": None}).exclude is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2024-02-31", "'2024-02-31' is no valid timestamp; write text in quotes in line 2, column 4"),
        ("b: {c: [2024-13-01]}", "'2024-13-01' is no valid timestamp"),
        ("b: 0x_", "'0x_' is no valid int"),
        ("b: !!int x", "'x' is no valid int"),
        ("b: !!bool x", "'x' is no valid bool"),
        ("b: !!timestamp x", "'x' is no valid timestamp"),
        ("b: " + "1" * 5000, "1' is no valid int"),
        ("[" * 1000, "is nested too deeply to be read"),
    ],
    ids=lambda text: text[:20],
)
def test_a_value_that_yaml_cannot_make_is_named(text: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        parse_yaml(text, "'f.yaml'")
