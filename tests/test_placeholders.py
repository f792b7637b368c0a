"""Words of the cluster files that a user fills in."""

import re
from pathlib import Path

import pytest

from readapt_ray import cli
from readapt_ray.planner import cluster_files, prices

CLUSTERS = Path(__file__).parent.parent / "clusters"


@pytest.mark.parametrize(
    ("name", "words"),
    [("aws.yaml", "ACCOUNT"), ("gcp.yaml", "PROJECT"), ("kuberay/rayjob.yaml", "BUCKET, REGISTRY")],
)
def test_words_that_are_still_to_be_filled_in_are_named_by_the_plan(name: str, words: str, tmp_path: Path) -> None:
    table = prices.read_prices(None)
    said = cluster_files.read_cluster(str(CLUSTERS / name), table).unfilled
    assert said.endswith(f"{name} still has {words} in it: fill it in before you start the cluster")
    filled = re.sub(r"\b(ACCOUNT|PROJECT|REGISTRY|BUCKET)\b", "ours", (CLUSTERS / name).read_text())
    (tmp_path / "filled.yaml").write_text(filled)
    assert cluster_files.read_cluster(str(tmp_path / "filled.yaml"), table).unfilled == ""


def test_a_plan_ends_with_2_as_long_as_something_is_to_be_filled_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that `readapt plan ... && ray up ...` starts no machine; the figures are printed all the same."""
    options = ["--config", str(CLUSTERS.parent / "jobs" / "e5-mistral.yaml"), "--root", str(tmp_path / "root")]
    options += ["--set", "source=scifact"]
    assert cli.main(["plan", *options, "--cluster", str(CLUSTERS / "aws.yaml")]) == 2
    said = capsys.readouterr()
    assert "for adapter, merge and vectors" in said.out
    assert said.err.splitlines()[-1].endswith(
        "aws.yaml still has ACCOUNT in it: fill it in before you start the cluster"
    )
    (tmp_path / "filled.yaml").write_text((CLUSTERS / "aws.yaml").read_text().replace("ACCOUNT", "123456789012"))
    assert cli.main(["plan", *options, "--cluster", str(tmp_path / "filled.yaml")]) == 0
