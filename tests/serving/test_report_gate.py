"""`serve --require-report`: what a report allows to be served, and what it does not."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from readapt_ray import artifacts
from readapt_ray.errors import ArtifactMissingError, InputError
from readapt_ray.serving.options import ServeConfig
from readapt_ray.serving.report_gate import check_report


def manifest(folder: Path, stage: str, **changes: Any) -> None:
    """An artifact that is its manifest."""
    values = {"fingerprint": f"{stage} itself", "config": {}, "inputs": {}, "counts": {}, "details": {}, "seconds": 1.0}
    made = artifacts.Manifest(stage=stage, created="2026-11-28", versions={}, **{**values, **changes})
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(made)))


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A report of a run that searched the index of `tmp_path/index`; what it requires holds."""
    manifest(tmp_path / "index", "index", inputs={"vectors": "v"})
    required = [{"holds": True, "sentence": "adapted: R@100 >= base holds."}]
    manifest(tmp_path / "report", "evaluate", details={"requirements": required})
    runs = [{"provenance": {"note": "unknown"}}, {"provenance": {"inputs": {"index": "index itself"}}}]
    (tmp_path / "report" / "report.json").write_text(json.dumps({"runs": runs}))
    return tmp_path / "report"


def check(report: Path, index: Path) -> None:
    config = ServeConfig(retriever="r", index=index, require_report=report)
    check_report(str(config.require_report), config.each_version())


def test_a_measured_version_whose_requirements_hold_is_allowed(report: Path, tmp_path: Path) -> None:
    check(report, tmp_path / "index")
    manifest(tmp_path / "index", "index", fingerprint="of the same vectors", inputs={"vectors": "v"})
    (report / "report.json").write_text(json.dumps({"runs": [{"provenance": {"inputs": {"vectors": "v"}}}]}))
    check(report, tmp_path / "index")


def test_another_version_is_refused(report: Path, tmp_path: Path) -> None:
    manifest(tmp_path / "other", "index", fingerprint="other", inputs={"vectors": "w"})
    with pytest.raises(InputError, match=r"did not measure version 'r' \(index .*other'\); evaluate a run of it"):
        check(report, tmp_path / "other")


def test_a_report_that_does_not_hold_or_requires_nothing_is_refused(report: Path, tmp_path: Path) -> None:
    failed = [{"holds": False, "sentence": "adapted: R@100 >= base does not hold."}]
    manifest(report, "evaluate", details={"requirements": failed})
    with pytest.raises(InputError, match="does not allow this version: adapted: R@100 >= base does not hold"):
        check(report, tmp_path / "index")
    manifest(report, "evaluate")
    with pytest.raises(InputError, match="requires nothing; make it with `readapt evaluate --require`"):
        check(report, tmp_path / "index")
    with pytest.raises(ArtifactMissingError):
        check(tmp_path / "absent", tmp_path / "index")
