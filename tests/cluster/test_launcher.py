"""What the cluster launcher could not start, in one line with what to do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from readapt_ray.cluster import launcher

QUOTA = "An error occurred (VcpuLimitExceeded) when calling the RunInstances operation: You have requested more vCPU capacity"


def told(monkeypatch: pytest.MonkeyPatch, *details: str) -> list[str]:
    failed = [
        SimpleNamespace(ray_node_type_name="gpu", instance_type_name="p5.4xlarge", details=text) for text in details
    ]
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    status: Any = SimpleNamespace(failed_launches=failed)
    monkeypatch.setattr("ray.autoscaler.v2.sdk.get_cluster_status", lambda address: status)
    return launcher.failures()


def test_each_failure_is_told_once_in_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = told(monkeypatch, f"{QUOTA}\nTraceback", QUOTA)
    assert line == f"gpu (p5.4xlarge): {QUOTA}; ask AWS for the quota of its family (Service Quotas, EC2, vCPUs)"


@pytest.mark.parametrize("code", sorted(launcher._ADVICE))
def test_known_codes_have_a_remedy_and_others_are_told_as_they_are(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, f"{code}: no") == [f"gpu (p5.4xlarge): {code}: no; {launcher._ADVICE[code]}"]
    assert told(monkeypatch, "something else") == ["gpu (p5.4xlarge): something else"]


def test_the_reason_is_read_from_the_heads_log_where_the_status_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node = SimpleNamespace(get_logs_dir_path=lambda: str(tmp_path))
    monkeypatch.setattr("ray._private.worker._global_node", node)
    assert "no reason is known here" in told(monkeypatch, "")[0]
    failed = "Failed to launch 8 nodes of type {}: Node Launch Exception ({}): You have requested more"
    lines = [failed.format("gpu", "Old"), failed.format("gpu", "VcpuLimitExceeded"), failed.format("cpu", "Other")]
    (tmp_path / "monitor.log").write_text(
        "".join(f"2026-11-28 INFO node_provider.py:491 -- {line}\n" for line in lines)
    )
    [line] = told(monkeypatch, "")
    assert line.startswith(
        "gpu (p5.4xlarge): Node Launch Exception (VcpuLimitExceeded): You have requested more; ask AWS"
    )


def test_a_cluster_without_a_launcher_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(address: str) -> Any:
        raise RuntimeError("no autoscaler")

    told(monkeypatch)
    monkeypatch.setattr("ray.autoscaler.v2.sdk.get_cluster_status", none)
    assert launcher.failures() == []


def test_asking_starts_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> Any:
        pytest.fail("Ray starts itself when it is asked for its context")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.get_runtime_context", start)
    assert launcher.failures() == []
