"""Words of the cluster files that a user fills in."""

import re
from pathlib import Path

import pytest

from readapt_ray.planner import machines, prices

CLUSTERS = Path(__file__).parent.parent / "clusters"


@pytest.mark.parametrize(
    ("name", "words"),
    [("aws.yaml", "ACCOUNT"), ("gcp.yaml", "PROJECT"), ("kuberay/rayjob.yaml", "BUCKET, REGISTRY")],
)
def test_words_that_are_still_to_be_filled_in_are_named_by_the_plan(
    name: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = prices.read_prices(None)
    machines.read_cluster(str(CLUSTERS / name), table)
    assert f"{name} still has {words} in it: fill it in before you start the cluster" in caplog.text
    caplog.clear()
    filled = re.sub(r"\b(ACCOUNT|PROJECT|REGISTRY|BUCKET)\b", "ours", (CLUSTERS / name).read_text())
    (tmp_path / "filled.yaml").write_text(filled)
    machines.read_cluster(str(tmp_path / "filled.yaml"), table)
    assert not caplog.records
