"""What clusters have, by each kind of file that describes one."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from readapt_ray.errors import InputError
from readapt_ray.planner import PlanConfig
from readapt_ray.planner.cluster_files import read_cluster
from readapt_ray.planner.prices import read_prices
from tests.planner.plans import CLUSTER, PRICES, launcher, write


def pods(*, price: Any = "1.5", memory: Any = "64Gi", is_scaled: bool = True, **values: Any) -> dict[str, Any]:
    """A RayCluster with a head that takes no task and a group of pods with two GPUs."""
    limits = {"cpu": "7500m", "memory": memory, "nvidia.com/gpu": 2}
    template = {
        "metadata": {"annotations": {"readapt.dev/gpu": "L4", "readapt.dev/usd-per-hour": price}},
        "spec": {"containers": [{"resources": {"limits": limits}}]},
    }
    head_pod = {"containers": [{"resources": {"limits": {"cpu": "4", "memory": "16G"}}}]}
    workers = {"groupName": "gpu", "replicas": 1, "maxReplicas": 4, "template": template} | values
    spec = {
        "enableInTreeAutoscaling": is_scaled,
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": {"spec": head_pod}},
        "workerGroupSpecs": [workers],
    }
    return {"kind": "RayCluster", "spec": spec}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (4, 0)),
        ({"is_scaled": False}, (1, 1)),
        ({"is_scaled": False, "replicas": 3}, (3, 3)),
        ({"minReplicas": 2, "numOfHosts": 2}, (8, 4)),
        ({"maxReplicas": None}, (1, 0)),
    ],
)
def test_pods_are_those_that_the_autoscaler_may_start(
    tmp_path: Path, values: dict[str, Any], expected: tuple[int, int]
) -> None:
    cluster = read_cluster(write(tmp_path, pods(**values)), PRICES)
    head, group = cluster.groups
    assert (group.count, group.num_always_up) == expected
    assert (head.cpus, group.cpus, group.gpus) == (0, 7, 2), "a head of num-cpus 0 takes no task"
    assert cluster.num_cpus == 7 * expected[0]


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
    spec = {"enableInTreeAutoscaling": True, "headGroupSpec": group("4", "16G"), "workerGroupSpecs": [workers]}
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
        ({"max_workers": 8, "cpu": (2, 2), "gpu": 8}, {"head": 1, "cpu": 2, "gpu": 6}),
        ({"max_workers": None, "cpu": 1, "gpu": 8}, {"head": 1, "gpu": 2}),
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
        ({"kind": "Deployment"}, "does not describe a cluster; give a file of `ray up`"),
        (
            {"cluster_name": "x", "provider": {"type": "azure"}},
            "provider type 'azure'; only aws and gcp can be read; .* `nodes: ",
        ),
        ({"nodes": [{"name": "a", "machine": "m99.huge"}]}, "no machine 'm99.huge'; it has "),
        ({"nodes": [{"name": "a", "cpus": 2, "memory_gb": 4, "gpu": "H1000", "gpus": 1}]}, "GPU 'H1000'"),
        ({"nodes": [{"name": "a"}]}, "neither its machine nor its cpus"),
        ({"nodes": [{"name": "a", "cpus": 2, "memory_gb": 4, "count": 0}]}, "has no node"),
        ({"nodes": [{"name": "a", "cpuz": 2}]}, "unknown option 'cpuz'"),
        ({"nodes": [{"name": "a", "cpus": 2, "memory_gb": 4, "count": -1}]}, "count = -1: must be 0 or more"),
        ({"nodes": [{"name": "a", "cpus": 2, "memory_gb": 4, "gpus": 8}]}, "must say both gpu, its kind, and gpus"),
        ({"nodes": [{"name": "a", "cpus": 2, "memory_gb": 4, "gpu": "H100"}]}, "must say both gpu, its kind, and gpus"),
        (
            {"nodes": [{"name": "a", "machine": "p5.4xlarge", "usd_per_hour": 1}]},
            "'p5.4xlarge' and usd_per_hour; .* leave",
        ),
        ({"nodes": [{"name": "a", "machine": "p5.4xlarge"}], "nodse": 1}, "'nodse' beside nodes"),
        (launcher(head_node_type="haed"), "head_node_type = 'haed' is not in .*; did you mean 'head'"),
        (launcher(available_node_types=None), "the types are none"),
        (launcher(available_node_types=["head"]), r"available_node_types = \['head'\]: must be a section"),
        (launcher(provider="aws"), "provider = 'aws': must be a section of options by name"),
        (launcher(max_workers="two"), "max_workers = 'two': must be a number of 0 or more"),
        (launcher(max_workers=2.5), "max_workers = 2.5: must be a whole number"),
        (launcher(idle_timeout_minutes=True), "idle_timeout_minutes = True: must be a number of 0 or more"),
        (pods(price="cheap"), "group 'gpu': readapt.dev/usd-per-hour = 'cheap': must be a number"),
        (pods(memory="64GiB"), "group 'gpu': '64GiB' is not a Kubernetes quantity"),
        (pods(memory=None), "group 'gpu' sets no limit or request of memory for its first container; add"),
        (pods(maxReplicas=-1), "group 'gpu': maxReplicas = -1: must be a number of 0 or more"),
        ({**pods(), "spec": {"workerGroupSpecs": {"a": 1}}}, "workerGroupSpecs must be a list of groups"),
        ([1, 2], "holds no options by name"),
    ],
)
def test_what_is_no_cluster_is_refused_by_name(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_cluster(write(tmp_path, values), PRICES)


def test_the_list_of_nodes_that_help_and_errors_show_is_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        read_cluster(write(tmp_path, {"kind": "Deployment"}), PRICES)
    for text in (str(refused.value), PlanConfig.model_fields["cluster"].description or ""):
        shown = re.search(r"`(nodes: [^`]+)`", " ".join(text.split()))
        assert shown, text
        (group,) = read_cluster(write(tmp_path, yaml.safe_load(shown[1]), "shown.yaml"), PRICES).groups
        assert (group.count, group.cpus, group.gpu, group.gpus, group.usd_per_hour) == (2, 16, "H100", 1, 3)


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
        ("-N 4\n#SBATCH -c8 --gpus-per-node=l4:2 # all\n#SBATCH --mem=64G", (4, 2, "L4", 8, 64.0)),
        ("-N2 -G l4:8\n#SBATCH --mem-per-cpu=4G -c 16", (2, 4, "L4", 16, 64.0)),
        ("--ntasks=8 --ntasks-per-node=4 --gpus-per-task=l4 -c 2 --mem-per-gpu=8G", (2, 4, "L4", 8, 32.0)),
        ("--gres=shard:2,gpu:l4:4 --mem=8G", (1, 4, "L4", 1, 8.0)),
        ("--gres=gpu --mem=8G\n#READAPT gpu=L4", (1, 1, "L4", 1, 8.0)),
        ("--gpus-per-node=l4 --mem=8G\nsrun true\n#SBATCH --nodes=9", (1, 1, "L4", 1, 8.0)),
    ],
)
def test_options_of_slurm_are_read(tmp_path: Path, lines: str, expected: tuple[Any, ...]) -> None:
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n#SBATCH {lines}\nsrun true\n")
    (group,) = read_cluster(str(script), read_prices(None)).groups
    found = (group.count, group.gpus, group.gpu, group.cpus, group.memory_bytes / 1e9)
    assert found == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("--nodes=two", "#SBATCH --nodes=two: must be a whole number"),
        ("--gpus-per-node=l4:many --mem=8G", "#SBATCH --gpus-per-node=many: must be a whole number"),
        ("--nodes=2\n#READAPT memory_gb=1TB", "#READAPT memory_gb=1TB: must be a number, such as memory_gb=1000"),
        ("--mem=8G\n#READAPT usd_per_hour=cheap", "#READAPT usd_per_hour=cheap: must be a number"),
    ],
)
def test_a_number_of_a_slurm_script_that_is_none_is_named(tmp_path: Path, lines: str, message: str) -> None:
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n#SBATCH {lines}\nsrun true\n")
    with pytest.raises(InputError, match=message):
        read_cluster(str(script), PRICES)


def test_a_slurm_script_that_does_not_say_enough_is_told_what_to_add(tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --gpus-per-node=2\n#SBATCH --mem=0\n")
    with pytest.raises(
        InputError, match=r"does not say the gpu and memory_gb of its nodes; add a line such as #READAPT gpu="
    ):
        read_cluster(str(script), read_prices(None))
