"""What `readapt status` says of finished, running, stopped and missing stages, and what they cost."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from readapt_ray import cli, leases, root_status
from readapt_ray.storage import Location
from tests import factories

NOW_S = 1_800_000_000.0


@pytest.fixture(autouse=True)
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time goes by between a heartbeat and a look at it."""
    monkeypatch.setattr(time, "time", lambda: NOW_S)


def building(folder: Path, **changes: Any) -> None:
    """A heartbeat of this process, half an hour into its work, changed as asked."""
    progress = {"done": 250, "total": 1000, "unit": "passages", "rate": 5.0}
    values = {"stage": "embed", **leases.owner(), "heartbeat": time.time(), "seconds": 1800.0, "progress": progress}
    folder.mkdir(parents=True)
    (folder / "building.json").write_text(json.dumps(values | changes))


def only(root: Path, **options: Any) -> dict[str, Any]:
    (row,) = root_status.rows(Location(str(root)), **options)
    return row


def test_a_stage_of_another_live_host_is_running_with_rate_and_eta(tmp_path: Path) -> None:
    building(tmp_path / "vectors", host="elsewhere", boot="other")
    row = only(tmp_path)
    assert (row["state"], row["stage"], row["seconds"]) == ("running", "embed", 1800.0)
    assert row["what"] == "250 of 1,000 passages (25%), 5 passages/s, ETA 2 min 30 s"


def test_a_stage_whose_heartbeat_ended_is_stopped_and_says_where(tmp_path: Path) -> None:
    building(tmp_path / "vectors", host="elsewhere", boot="other", heartbeat=time.time() - 120)
    row = only(tmp_path)
    assert row["state"] == "stopped"
    assert row["what"].endswith("last heartbeat 2 min 00 s ago on elsewhere")


def test_a_stage_whose_process_died_on_this_machine_is_stopped_at_once(tmp_path: Path) -> None:
    building(tmp_path / "vectors", pid=2**22 - 1, host=socket.gethostname())
    assert only(tmp_path)["state"] == "stopped"


def test_cost_is_hours_times_the_clusters_price(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    building(tmp_path / "root/vectors", host="elsewhere", boot="other")
    assert only(tmp_path / "root", usd_per_hour=lambda stage: {"ingest": 4.0}.get(stage, 8.0))["usd"] == pytest.approx(
        4.0
    )
    cluster = tmp_path / "cluster.yaml"
    node = {"name": "a", "count": 2, "cpus": 4, "memory_gb": 16, "usd_per_hour": 4.0}
    cluster.write_text(yaml.safe_dump({"nodes": [node]}))
    assert cli.main(["status", "--root", str(tmp_path / "root"), "--cluster", str(cluster)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["artifact", "stage", "state", "time", "USD"]
    assert lines[-1].split() == ["0", "of", "1", "done", "30", "min", "00", "s", "4.00"]


def test_what_lies_inside_an_artifact_is_not_listed(tmp_path: Path) -> None:
    factories.ingest_artifact(tmp_path / "run" / "corpus", factories.small_corpus(5))
    building(tmp_path / "run" / "corpus" / "passages" / "odd", host="elsewhere", boot="other")
    assert [row["artifact"] for row in root_status.rows(Location(str(tmp_path)))] == ["run/corpus"]


def test_a_manifest_or_lease_of_another_program_makes_no_artifact(tmp_path: Path) -> None:
    """A web page's folder and a map of houses, with a run inside the first one."""
    factories.ingest_artifact(tmp_path / "site" / "run" / "corpus", factories.small_corpus(5))
    (tmp_path / "site" / "manifest.json").write_text('{"name": "app", "icons": []}')
    (tmp_path / "site" / "run" / "x.trec.manifest.json").write_text("[]")
    (tmp_path / "map").mkdir()
    (tmp_path / "map" / "building.json").write_text('{"owner": "ACME", "height_m": 300}')
    assert [(row["artifact"], row["state"]) for row in root_status.rows(Location(str(tmp_path)))] == [
        ("site/run/corpus", "done")
    ]


def test_one_broken_manifest_without_a_plan_spoils_one_line(tmp_path: Path) -> None:
    for name in ("a", "b"):
        factories.ingest_artifact(tmp_path / name, factories.small_corpus(5))
    (tmp_path / "a/manifest.json").write_text("{")
    states = {row["artifact"]: row["state"] for row in root_status.rows(Location(str(tmp_path)))}
    assert states == {"a": "unreadable", "b": "done"}


@pytest.mark.parametrize("changes", [{"seconds": None}, {"seconds": "4"}, {"stage": 4}, {"counts": None}])
def test_a_manifest_with_values_of_other_types_spoils_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        factories.ingest_artifact(tmp_path / name, factories.small_corpus(5))
    file = tmp_path / "a/manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert [line.split()[:2] for line in root_status.status_table(Location(str(tmp_path))).splitlines()[1:3]] == [
        ["a", "unreadable"],
        ["b", "ingest"],
    ]


@pytest.mark.parametrize("failed", ["a text", {"output": "vectors"}, {"output": "vectors", "error": "e", "host": "h"}])
def test_a_failure_that_is_noted_in_part_is_left_out(failed: Any, tmp_path: Path) -> None:
    record = {"steps": [{"stage": "embed", "output": "vectors"}], "failed": failed}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert only(tmp_path)["state"] == "missing"


@pytest.mark.parametrize(
    "content",
    [
        "not JSON",
        "[]",
        '{"steps": 3}',
        '{"steps": [{"run": "make"}]}',
        '{"steps": [{"stage": "ingest", "output": 3}]}',
        "{}",
    ],
)
def test_a_plan_of_another_program_is_none(content: str, tmp_path: Path) -> None:
    factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(5))
    (tmp_path / "run.json").write_text(content)
    assert [row["artifact"] for row in root_status.rows(Location(str(tmp_path)))] == ["corpus"]


def test_planned_steps_that_have_not_begun_are_missing(tmp_path: Path) -> None:
    steps = [{"stage": "ingest", "output": "corpus"}, {"stage": "embed", "output": "vectors"}]
    (tmp_path / "run.json").write_text(json.dumps({"steps": steps}))
    building(tmp_path / "vectors", host="elsewhere", boot="other")
    assert [(row["artifact"], row["state"]) for row in root_status.rows(Location(str(tmp_path)))] == [
        ("corpus", "missing"),
        ("vectors", "running"),
    ]
