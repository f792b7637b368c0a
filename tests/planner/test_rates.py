"""How fast work is: by what was measured before, and by a calibration."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from readapt_ray import artifacts
from readapt_ray.catalog.shapes import model_shape
from readapt_ray.errors import InputError
from readapt_ray.planner import calibration, plan_report, rates
from readapt_ray.planner.cluster_files import read_cluster
from readapt_ray.planner.machines import Cluster, NodeGroup
from readapt_ray.recipes.chain import RunConfig
from readapt_ray.stages.embed import EmbedConfig
from tests.planner.plans import PRICES, make_plan, write
from tests.retrieval.devices import OnCuda


def finished(
    folder: Path,
    run: Path,
    *,
    seconds: float,
    gpus: dict[str, int],
    work: dict[str, float] | None = None,
    cpus_each: int | None = None,
) -> str:
    """A root with the manifest of an embed stage that took so long."""
    root = folder / f"measured-{seconds:.0f}"
    manifest = artifacts.Manifest(
        stage="embed",
        fingerprint="0" * 32,
        config={"retriever": str(run / "retriever"), "num_workers": None, "num_cpus_per_worker": cpus_each},
        inputs={},
        counts={"num_vectors": 1_000_000, "num_tokens": 80_000_000},
        details={} if work is None else {"work": work},
        seconds=seconds,
        created="2026-11-21T00:00:00+00:00",
        versions={},
        hardware={"cluster": {"num_nodes": 1, "num_cpus": 8, "gpus": gpus}},
    )
    (root / "vectors").mkdir(parents=True)
    (root / "vectors" / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    return str(root)


def test_measured_rates_are_used_for_the_device_that_they_were_measured_on(run_file: Path, tmp_path: Path) -> None:
    shape = model_shape(str(run_file / "retriever"))
    root = finished(tmp_path, run_file, seconds=1008.0, gpus={"H100": 4})
    found = make_plan(run_file, measured=(root,))
    expected = 80_000_000 * shape.forward_flops(80) / (4 * 1000)
    assert found.setting.rates.rate_of("embed", "H100", 989e12, is_16_bit=True).value == pytest.approx(expected)
    assert found.setting.rates.rate_of("embed", "L4", 121e12, is_16_bit=True).source == "table"
    assert "measured in vectors" in plan_report.text(found)


def test_a_rate_is_not_that_of_a_gpu_whose_name_only_begins_alike() -> None:
    measured = rates.Rates(
        {("embed", "L4"): (1.0, "l4"), ("embed", "A100"): (2.0, "a"), ("embed", "A100-80GB"): (3.0, "b")}
    )
    sources = {name: measured.rate_of("embed", name, 1e14, is_16_bit=True).source for name in ("L4", "L40S", rates.CPU)}
    assert sources == {"L4": "l4", "L40S": "table", rates.CPU: "table"}
    assert measured.rate_of("embed", "A100-80GB", 1e14, is_16_bit=True).source == "b"
    assert measured.rate_of("embed", "A100-40GB", 1e14, is_16_bit=True).source == "a"


@pytest.mark.parametrize("gpus", [{"H100": 4}, {}])
def test_a_short_stage_that_counted_its_work_tells_a_rate(run_file: Path, tmp_path: Path, gpus: dict[str, int]) -> None:
    encoders = {"encoder_seconds": 30.0, "waiting_share": 0.25, "num_copied": 0}
    root = finished(tmp_path, run_file, seconds=20.0, gpus=gpus, work=encoders, cpus_each=2)
    measured = rates.measure([root], read_cluster("local", PRICES))
    device = "H100" if gpus else rates.CPU
    expected = 80_000_000 * model_shape(str(run_file / "retriever")).forward_flops(80) / (40 if gpus else 80)
    assert measured.rate_of("embed", device, 989e12, is_16_bit=True).value == pytest.approx(expected)


@pytest.mark.parametrize(("counted", "waiting"), [(0.0, 0.0), (7.9, 0.0), (0.1, 1.0)])
def test_a_first_batch_alone_tells_no_rate(run_file: Path, tmp_path: Path, counted: float, waiting: float) -> None:
    encoders = {"encoder_seconds": counted, "waiting_share": waiting, "num_copied": 0}
    root = finished(tmp_path, run_file, seconds=20.0, gpus={"H100": 4}, work=encoders)
    assert rates.measure([root], read_cluster("local", PRICES)).sources == []


def test_vectors_that_were_copied_tell_no_rate(run_file: Path, tmp_path: Path) -> None:
    encoders = {"encoder_seconds": 30.0, "waiting_share": 0.25, "num_copied": 1}
    root = finished(tmp_path, run_file, seconds=1008.0, gpus={"H100": 4}, work=encoders)
    assert not any("vectors" in line for line in make_plan(run_file, measured=(root,)).setting.rates.sources)


def test_work_of_seconds_says_nothing_about_a_rate(run_file: Path, tmp_path: Path) -> None:
    root = finished(tmp_path, run_file, seconds=20.0, gpus={"H100": 4})
    assert not any("vectors" in line for line in make_plan(run_file, measured=(root,)).setting.rates.sources)


def test_a_rate_measured_on_a_part_predicts_the_whole(run_file: Path, tmp_path: Path) -> None:
    """What a run of 80 M tokens took, planned from one of a tenth of it that took a tenth of the working time."""
    cluster = read_cluster("local", PRICES)
    small = json.loads(
        (Path(finished(tmp_path, run_file, seconds=108.0, gpus={})) / "vectors/manifest.json").read_text()
    )
    small["counts"] = {"num_vectors": 100_000, "num_tokens": 8_000_000}
    (tmp_path / "measured-108/vectors/manifest.json").write_text(json.dumps(small))
    measured = rates.measure([str(tmp_path / "measured-108")], cluster)
    work = rates.work_of(artifacts.read_manifest(finished(tmp_path, run_file, seconds=1008.0, gpus={}) + "/vectors"))
    predicted = rates.FIXED_S["embed"] + work / (8 * measured.rate_of("embed", rates.CPU, 0, is_16_bit=False).value)
    assert predicted == pytest.approx(1008.0, rel=0.3)


def test_a_calibration_on_this_machine_prices_the_run(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_SECONDS", 0.2)
    plain, found = make_plan(run_file, cluster="local"), make_plan(run_file, cluster="local", calibrate=True)
    sources = {each.stage: each.rate.source for each in found.stages if each.stage in ("train", "embed")}
    assert sources == {"train": "calibrated on this machine", "embed": "calibrated on this machine"}
    for each in found.stages:
        if each.stage in sources:
            assert 1e3 < each.rate.value < 1e13, "FLOP per second of one core or GPU"
    assert "calibrated on this machine" in plan_report.text(found)
    assert {each.rate.source for each in plain.stages} == {"table"}


def test_a_calibration_on_a_gpu_fills_two_batches(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = set()

    class Counting(OnCuda):
        def encode_ids(self, rows: Any, domains: Any = None) -> Any:  # type: ignore[override]
            counts.add(len(rows))
            return super().encode_ids(rows[:2], domains)

    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (8 * 10**10, 8 * 10**10))
    monkeypatch.setattr("readapt_ray.retrieval.encoder.Encoder", Counting)
    monkeypatch.setattr(calibration, "_SECONDS", 0.01)
    run = RunConfig.parse(yaml.safe_load((run_file / "run.yaml").read_text()))
    config = EmbedConfig(retriever=str(run.retriever), corpus="c", output="o")
    calibration._embed(run, config, 32, torch.float32, torch.device("cpu"))
    assert counts == {2 * 16_384 // 32}


def gpus_here(monkeypatch: pytest.MonkeyPatch, name: str, gigabytes: float) -> None:
    """Two GPUs of a kind in this machine, as torch describes them."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(name))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=gigabytes * 1e9))


@pytest.mark.parametrize(
    ("name", "gigabytes", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0, "H100"),
        ("NVIDIA A100-SXM4-40GB", 42.3, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 85.1, "A100-80GB"),
        ("NVIDIA L40S", 47.7, "L40S"),
        ("NVIDIA L4", 23.7, "L4"),
        ("Tesla V100-SXM2-16GB", 16.9, "V100"),
        ("NVIDIA H200", 150.0, "H200"),
    ],
)
def test_this_machine_has_the_gpus_that_torch_sees(
    monkeypatch: pytest.MonkeyPatch, name: str, gigabytes: float, kind: str
) -> None:
    gpus_here(monkeypatch, name, gigabytes)
    (node,) = read_cluster("local", PRICES).groups
    assert (node.gpu, node.gpus, node.gpu_memory_bytes) == (kind, 2, gigabytes * 1e9)
    assert node.gpu_flops == PRICES.gpus[kind].tflops * 1e12


def test_a_gpu_that_the_table_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus_here(monkeypatch, "NVIDIA RTX 6000 Ada Generation", 51.0)
    with pytest.raises(InputError, match=r"this machine has the GPU 'NVIDIA RTX 6000 .*it knows T4, V100"):
        read_cluster("local", PRICES)


@pytest.mark.parametrize(
    ("own", "there", "said"),
    [
        ("", "H100", r"this machine is \(CPU\), and the cluster computes with H100"),
        ("L4", "H100", r"this machine is \(L4\), and the cluster computes with H100"),
        ("H100", "", r"this machine is \(H100\), and the cluster computes with CPU"),
    ],
)
def test_a_calibration_that_would_not_count_is_refused_before_models_are_fetched(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, own: str, there: str, said: str
) -> None:
    gpus_here(monkeypatch, own, 80.0)
    node = {"name": "a", "cpus": 8, "memory_gb": 64} | ({"gpu": there, "gpus": 1} if there else {})
    cluster = write(run_file, {"nodes": [node]}, f"to-{own}-{there}.yaml")
    with pytest.raises(InputError, match=said):
        make_plan(run_file, cluster=cluster, calibrate=True)


def test_a_rate_of_one_a100_counts_for_the_other() -> None:
    group = NodeGroup(name="a", count=1, cpus=8, memory_bytes=1e11, gpu="A100-80GB", gpus=1)
    assert calibration.check_device("A100-40GB", Cluster(name="c", groups=(group,))) == "A100"


def test_a_rate_is_work_over_the_time_without_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, lengths = [0.0], iter([9.0, *[0.5] * 20])

    def work() -> None:
        now_s[0] += next(lengths)

    monkeypatch.setattr(calibration, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    assert calibration._rounds_per_second(work) == pytest.approx(2.0)


@pytest.mark.parametrize(("num_pieces", "cpus"), [(60, 8), (3, 3), (None, 1)])
def test_an_ingest_on_many_cpus_gives_the_rate_of_one(tmp_path: Path, num_pieces: int | None, cpus: int) -> None:
    """By hand: 8 GB in 100 s beside the one second that an empty source takes, by as many CPUs as it had pieces for."""
    manifest = artifacts.Manifest(
        stage="ingest",
        fingerprint="0" * 32,
        config={},
        inputs={},
        counts={"num_bytes": 8_000_000_000, "num_passages": 20_000_000},
        details={} if num_pieces is None else {"num_pieces": num_pieces},
        seconds=101.0,
        created="2026-11-28T00:00:00+00:00",
        versions={},
        hardware={"cluster": {"num_nodes": 2, "num_cpus": 8, "gpus": {}}},
    )
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    rate = rates.measure([str(tmp_path)], read_cluster("local", PRICES)).rate_of(
        "ingest", rates.CPU, 0, is_16_bit=False
    )
    assert rate.value == pytest.approx(80_000_000 / cpus)
