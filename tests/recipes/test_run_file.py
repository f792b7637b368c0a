"""Changes of single options: what `--set NAME=VALUE` means, and what an empty value does."""

from pathlib import Path
from typing import Any

import pytest

from readapt_ray import cli
from readapt_ray.errors import InputError
from readapt_ray.recipes.run_file import parse_change


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("1.5", 1.5),
        ("true", True),
        ("no", False),
        ("", ""),
        (" ", ""),
        ("null", None),
        ("~", None),
        ("#2.jsonl", "#2.jsonl"),
        ("1e-4", "1e-4"),
        ("[1, 2]", [1, 2]),
        ("{lora_rank: 4}", {"lora_rank": 4}),
        ('"2024"', "2024"),
        ("'no'", "no"),
        ("2024-01-01", "2024-01-01"),
        ("2024-02-31", "2024-02-31"),
        ("0x_", "0x_"),
        ("!!int x", "!!int x"),
        ("my notes #2.jsonl", "my notes #2.jsonl"),
        ("query: {text}", "query: {text}"),
        ("a: b", "a: b"),
        ("- a", "- a"),
        (" s3://bucket/run ", "s3://bucket/run"),
        ('"a,b",c', '"a,b",c'),
        ("nDCG@10 >= base - 0.005", "nDCG@10 >= base - 0.005"),
    ],
)
def test_the_value_of_set_is_yaml_or_the_text_that_was_given(text: str, value: Any) -> None:
    assert parse_change(f"train.option={text}") == ("train.option", value)


def test_a_list_or_section_of_set_that_is_no_yaml_says_why() -> None:
    with pytest.raises(InputError, match=r"'\{a: 1, a: 2\}' is not a whole YAML list or section: 'a' is given twice"):
        parse_change("train={a: 1, a: 2}")
    with pytest.raises(InputError, match="not a whole YAML list or section: expected"):
        parse_change("train.adapter=[a")


@pytest.mark.parametrize("change", ["--set=train.exclude=", "--set=queries=", "--set=train.exclude= "])
def test_a_change_to_nothing_is_refused_since_its_variable_may_not_be_set(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    text = "queries: q\ntrain: {exclude: held-out.tsv}"
    file.write_text(f"source: {tmp_path}/absent\nroot: {tmp_path}/mine\npretrained: p\nretriever: r\n{text}\n")
    assert cli.main(["run", "--config", str(file), change]) == InputError.exit_code
    assert "is empty, as one from a variable that is not set; give a value, or leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["root", "encoding"])
def test_an_option_of_a_run_that_is_given_empty_does_not_fall_back_to_the_file(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"source: {tmp_path}/absent\nroot: {tmp_path}/mine\npretrained: p\nretriever: r\n")
    assert cli.main(["run", "--config", str(file), f"--{option}", ""]) == InputError.exit_code
    assert "is empty, as one from a variable that is not set" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
