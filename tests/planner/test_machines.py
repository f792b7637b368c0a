"""What clusters have, by each kind of file that describes one."""

from pathlib import Path
from typing import Any

import pytest

from readapt_ray.errors import InputError
from readapt_ray.planner.machines import read_cluster
from readapt_ray.planner.prices import read_prices
from tests.planner.plans import CLUSTER, PRICES, launcher, write


def test_a_list_of_nodes_is_a_cluster(tmp_path: Path) -> None:
    cluster = read_cluster(write(tmp_path, CLUSTER), PRICES)
    assert (cluster.num_gpus, cluster.num_cpus, cluster.num_nodes) == (16, 2 * 192 + 8, 3)
    assert cluster.usd_per_hour == pytest.approx(2 * PRICES.machines["p5.48xlarge"].spot + 0.4)
    assert cluster.gpu_groups[0].gpu_flops == 989e12


def test_kubernetes_quantities_are_read(tmp_path: Path) -> None:
    def group(cpu: str, memory: str, gpus: int = 0) -> dict[str, Any]:
        limits: dict[str, Any] = {"cpu": cpu, "memory": memory} | ({"nvidia.com/gpu": gpus} if gpus else {})
        metadata = {"annotations": {"readapt.dev/gpu": "L4", "readapt.dev/usd-per-hour": "1.5"}}
        return {"template": {"metadata": metadata, "spec": {"containers": [{"resources": {"limits": limits}}]}}}

    workers = {"groupName": "gpu", "replicas": 1, "maxReplicas": 4, **group("7500m", "64Gi", 2)}
    spec = {"headGroupSpec": group("4", "16G"), "workerGroupSpecs": [workers]}
    for kind, field in (("RayCluster", None), ("RayJob", "rayClusterSpec"), ("RayService", "rayClusterConfig")):
        values = {"kind": kind, "spec": {field: spec} if field else spec}
        cluster = read_cluster(write(tmp_path, values), PRICES)
        assert [(g.name, g.count, g.cpus, g.gpus) for g in cluster.groups] == [("head", 1, 4, 0), ("gpu", 4, 7, 2)]
        assert cluster.groups[1].memory_bytes == 64 * 2**30
        assert cluster.usd_per_hour == 5 * 1.5


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ({"max_workers": 10, "cpu": 4, "gpu": 4}, {"head": 1, "cpu": 4, "gpu": 4}),
        ({"max_workers": 6, "cpu": 4, "gpu": 4}, {"head": 1, "cpu": 2, "gpu": 4}),
        ({"max_workers": 4, "cpu": 4, "gpu": 4}, {"head": 1, "gpu": 4}),
        ({"max_workers": 3, "cpu": 1}, {"head": 1, "gpu": 3}),
        ({}, {"head": 1, "gpu": 2}),
    ],
)
def test_a_launcher_never_has_more_workers_than_the_whole_cluster_may(
    tmp_path: Path, values: dict[str, Any], counts: dict[str, int]
) -> None:
    cluster = read_cluster(write(tmp_path, launcher(**values)), PRICES)
    assert {group.name: group.count for group in cluster.groups} == counts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "Deployment"}, "of no kind of cluster that is known"),
        ({"cluster_name": "x", "provider": {"type": "azure"}}, "provider type 'azure'; known are aws and gcp"),
        ({"nodes": [{"name": "a", "machine": "m99.huge"}]}, "no machine 'm99.huge'; it has "),
        ({"nodes": [{"name": "a", "cpus": 2, "memory_gb": 4, "gpu": "H1000", "gpus": 1}]}, "GPU 'H1000'"),
        ({"nodes": [{"name": "a"}]}, "neither its machine nor its cpus"),
        ({"nodes": [{"name": "a", "cpus": 2, "memory_gb": 4, "count": 0}]}, "has no node"),
        ({"nodes": [{"name": "a", "cpuz": 2}]}, "unknown option 'cpuz'"),
        ([1, 2], "holds no options by name"),
    ],
)
def test_what_is_no_cluster_is_refused_by_name(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_cluster(write(tmp_path, values), PRICES)


def test_every_file_in_clusters_is_a_cluster_or_says_what_to_give() -> None:
    prices = read_prices(None)
    folder = Path(__file__).parent.parent.parent / "clusters"
    slurm = read_cluster(str(folder / "slurm.sh"), prices)
    assert (slurm.num_nodes, slurm.num_gpus, slurm.num_cpus) == (2, 8, 64)
    assert slurm.gpu_groups[0].gpu == "H100"
    for name in ("aws.yaml", "gcp.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "kuberay/rayservice.yaml"):
        assert read_cluster(str(folder / name), prices).num_nodes
    with pytest.raises(
        InputError, match=r"kuberay' is a folder; give one of its files: .*raycluster\.yaml, rayjob\.yaml"
    ):
        read_cluster(str(folder / "kuberay"), prices)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "--nodes=4\n#SBATCH --gres=gpu:h100:8\n#SBATCH --mem=500G\n#SBATCH --cpus-per-task 16",
            (4, 8, "H100", 16, 500.0),
        ),
        ("--nodes=1-3\n#SBATCH --cpus-per-task=8\n#SBATCH --mem=64000", (3, 0, "", 8, 64.0)),
        ("--gpus-per-node=2\n#READAPT gpu=L4 memory_gb=100 usd_per_hour=1.5", (1, 2, "L4", 1, 100.0)),
    ],
)
def test_options_of_slurm_are_read(tmp_path: Path, lines: str, expected: tuple[Any, ...]) -> None:
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n#SBATCH {lines}\nsrun true\n")
    (group,) = read_cluster(str(script), read_prices(None)).groups
    found = (group.count, group.gpus, group.gpu, group.cpus, group.memory_bytes / 1e9)
    assert found == expected


def test_a_slurm_script_that_does_not_say_enough_is_told_what_to_add(tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --gpus-per-node=2\n#SBATCH --mem=0\n")
    with pytest.raises(
        InputError, match=r"does not say the gpu and memory_gb of its nodes; add a line such as #READAPT gpu="
    ):
        read_cluster(str(script), read_prices(None))
