from pathlib import Path
from types import SimpleNamespace

import pytest

from readapt_ray import hardware
from readapt_ray.cluster import connection, nodes
from readapt_ray.python import retriever


@pytest.mark.parametrize(
    ("capabilities", "has_units"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_bfloat16_units_are_amx_or_avx512_bf16(capabilities, has_units, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert hardware.has_bfloat16_units() is has_units


def _in_group(own: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Put this process into a control group with these files."""
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        file = tmp_path / "cgroups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    monkeypatch.setattr(hardware, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path / "cgroups")


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/", {"cpu.max": "800000 100000"}, 8),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "20000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, 192),
        ("0::/pods/a", {"pods/cpu.max": "400000 100000", "pods/a/cpu.max": "max 100000"}, 4),
        ("0::/pods/a", {"pods/cpu.max": "400000 100000", "pods/a/cpu.max": "300000 100000"}, 3),
        ("0::/pods/unseen", {"cpu.max": "600000 100000"}, 6),
        ("4:memory:/x\n3:cpu,cpuacct:/x", {"cpu,cpuacct/x/cpu.cfs_quota_us": "700000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 7),
        ("3:cpu,cpuacct:/docker/1", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 192),
        ("0::/", {"cpu.max": "what is this"}, 192),
        ("", {}, 192),
    ],
)  # fmt: skip
def test_cores_are_no_more_than_the_containers_quota(
    own: str, files: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _in_group(own, files, monkeypatch, tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(192)))
    assert hardware.num_cores() == cores


def _limited(folder: str, limit: object, *, v1: bool = False) -> dict[str, str]:
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if v1
        else ("memory.max", "memory.current", "inactive_file")
    )
    return {
        f"{folder}/{names[0]}": str(limit),
        f"{folder}/{names[1]}": "1000000",
        f"{folder}/memory.stat": f"anon 5\n{names[2]} 400000",
    }


@pytest.mark.parametrize(
    ("own", "files", "limit_and_left"),
    [
        ("0::/", _limited(".", 3_000_000), (3_000_000, 2_400_000)),
        ("0::/", _limited(".", "max"), None),
        ("0::/pods/a", _limited("pods", 3_000_000) | _limited("pods/a", "max"), (3_000_000, 2_400_000)),
        ("0::/pods/a", _limited("pods", 3_000_000) | _limited("pods/a", 2_000_000), (2_000_000, 1_400_000)),
        ("0::/pods/unseen", _limited(".", 3_000_000), (3_000_000, 2_400_000)),
        ("4:memory:/x\n3:cpu:/y", _limited("memory/x", 3_000_000, v1=True), (3_000_000, 2_400_000)),
        ("4:memory:/x", _limited("memory/x", 9_223_372_036_854_771_712, v1=True), None),
        ("", {}, None),
    ],
)
def test_memory_is_no_more_than_the_containers_limit(
    own: str,
    files: dict[str, str],
    limit_and_left: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import psutil

    _in_group(own, files, monkeypatch, tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10**9, available=10**8))
    assert (hardware.memory_bytes(), hardware.free_memory_bytes()) == (limit_and_left or (10**9, 10**8))


def test_pyarrow_torch_and_faiss_take_no_more_threads_than_the_quota_gives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On two cores of a large host: with a quota of one each takes one; a smaller number that was set before stays."""
    import faiss
    import pyarrow as pa
    import torch

    def threads() -> tuple[int, int, int]:
        return pa.cpu_count(), torch.get_num_threads(), faiss.omp_get_max_threads()

    def set_threads(*numbers: int) -> None:
        for setter, number in zip(
            (pa.set_cpu_count, torch.set_num_threads, faiss.omp_set_num_threads), numbers, strict=True
        ):
            setter(number)

    before = threads()
    (tmp_path / "own").write_text("0::/")
    monkeypatch.setattr(hardware, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    try:
        for quota, asked, expected in ((200_000, 64, 2), (200_000, 1, 1), (100_000, 64, 1)):
            (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
            set_threads(asked, asked, asked)
            hardware.limit_threads()
            assert threads() == (expected, expected, expected)
    finally:
        set_threads(*before)


@pytest.mark.parametrize("entrance", ["connect", "Encoder"])
def test_threads_are_limited_where_ray_is_joined_and_where_an_encoder_runs_without_it(
    entrance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LimitedError(Exception):
        pass

    def limited() -> None:
        raise LimitedError

    for module in (hardware, retriever):
        monkeypatch.setattr(module, "limit_threads", limited)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(connection, "_nodes_that_came", lambda _: [])
    with pytest.raises(LimitedError):
        connection.connect() if entrance == "connect" else retriever.Encoder("e5-mistral")


def test_processes_share_the_cores_of_the_node_that_they_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "num_cores", lambda: 16)
    monkeypatch.setattr(nodes, "alive", lambda: [{"Resources": {"CPU": count}} for count in (0, 16, 16, 16, 16)])
    assert [nodes.cores_per_process(count) for count in (1, 4, 5, 8, 100)] == [16, 16, 8, 8, 1]
