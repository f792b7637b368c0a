"""What workers on several nodes wait for each other, against counts by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from readapt_ray.catalog.retrievers import target_modules
from readapt_ray.catalog.shapes import shape_of
from readapt_ray.cluster.optimization import adapter_shape
from readapt_ray.planner.cluster_files import read_cluster
from readapt_ray.planner.exchange import Steps, waiting_s
from readapt_ray.planner.machines import Cluster, NodeGroup
from readapt_ray.planner.quantities import quantity
from readapt_ray.stages.train import TrainConfig
from readapt_ray.training.memory import num_trained
from tests.planner.plans import PRICES, make_plan, stage, write

H100 = 0.35 * 989e12
MISTRAL = shape_of(
    {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "model",
    "causal_lm",
)


def config(**options: Any) -> TrainConfig:
    return TrainConfig(pretrained="m", corpus="c", output="o", **options)


def cluster(nodes: int, gbit: float, gpus: int = 1) -> Cluster:
    group = NodeGroup(
        name="gpu", count=nodes, cpus=8, memory_bytes=1e11, gpu="H100", gpus=gpus, gpu_flops=989e12, network_gbit=gbit
    )
    return Cluster(name="c", groups=(replace(group, name="head", count=1, gpus=0, network_gbit=1.0), group))


def waited(nodes: int, gbit: float, *, gpus: int = 1, **options: Any) -> tuple[float, float]:
    """Seconds of a step of 4 passes of 4,096 tokens that are waited for, and that are computed, on H100s."""
    given = config(**options)
    adapter = adapter_shape(given, target_modules("mistral"))
    trained = num_trained(MISTRAL, adapter)
    work_s = 16_384 * 4 * MISTRAL.num_matrix_parameters / H100
    steps = Steps(num_steps=1, num_workers=nodes * gpus, worker_tokens=16_384, work_s=work_s, num_trained=trained)
    return waiting_s(given, MISTRAL, cluster(nodes, gbit, gpus), steps), work_s


@pytest.mark.parametrize(("gpus", "gbit"), [(1, 25), (8, 25), (8, 100)])
def test_an_adapters_gradients_wait_for_their_last_bucket(gpus: int, gbit: float) -> None:
    """230 MB leave each of 8 nodes nearly twice, in less time than the last backward pass; 26 MB are left at its end."""
    each = 32 * (4096 + 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    each -= 32 * (4096 + 14336)  # gate_proj has no adapter
    gradients = 4 * 32 * (each + 4096 + 2 * 1024 + 14336 + 4096)
    assert gradients == 229_638_144
    found, work_s = waited(8, gbit, gpus=gpus)
    s_per_byte = 2 * 7 / 8 / (0.7 * gbit / 8 * 1e9)
    assert gradients * s_per_byte == pytest.approx((0.135 if gbit == 25 else 0.034) * work_s, rel=0.05)
    assert found == pytest.approx((25 << 20) * s_per_byte)
    assert found < 0.02 * work_s < 0.03


def test_on_one_node_nothing_is_waited_for() -> None:
    assert waited(1, 10, gpus=8)[0] == waited(1, 10, gpus=8, zero_stage=3)[0] == 0


def test_on_a_slow_network_what_is_longer_than_the_backward_pass_is_waited_for() -> None:
    found, work_s = waited(8, 10)
    assert found == pytest.approx(229_638_144 * 2 * 7 / 8 / (0.7 * 1.25e9) - work_s / 4 / 2)
    assert found > 0.15 * work_s


def test_partitioned_gradients_are_sent_after_each_pass_and_weights_before_each() -> None:
    s_per_byte = 7 / 8 / (0.7 * 100 / 8 * 1e9)
    bucket_s, moved_s = 2 * (25 << 20) * s_per_byte, 229_638_144 * s_per_byte
    assert waited(8, 100, zero_stage=1)[0] == pytest.approx(bucket_s + moved_s)
    assert waited(8, 100, zero_stage=2)[0] == pytest.approx(4 * bucket_s + moved_s)
    found, work_s = waited(8, 100, zero_stage=3)
    fetched_s = 2 * MISTRAL.num_parameters * s_per_byte
    assert found == pytest.approx(4 * (2 * fetched_s + moved_s) - work_s)
    assert found > 5 * work_s, "a reason not to partition weights over such nodes"


def test_a_plan_tells_what_is_waited_for(run_file: Path) -> None:
    """The slower the network between nodes, the longer training takes."""
    nodes: dict[str, Any] = {"name": "gpu", "cpus": 8, "memory_gb": 200, "gpu": "H100", "gpus": 1, "count": 4}
    found = []
    for gbit in (0.01, 100.0):
        write(run_file, {"nodes": [nodes | {"network_gbit": gbit}]})
        found.append(stage(make_plan(run_file, {"train": {"batch_size": 64}}, num_passages=100_000), "train"))
    slow, fast = found
    assert slow.seconds > fast.seconds and slow.high_s > fast.high_s
    assert "of it waiting for the network between nodes" in slow.note
    assert "network" not in fast.note


def test_each_kind_of_file_can_say_how_fast_its_network_is(tmp_path: Path) -> None:
    limits = {"cpu": 8, "memory": "64Gi", "nvidia.com/gpu": 1}
    annotations = {"readapt.dev/gpu": "L4", "readapt.dev/network-gbit": "40"}
    pod = {
        "metadata": {"annotations": annotations},
        "spec": {"containers": [{"resources": {"limits": limits}}]},
    }
    head = {"template": {"spec": {"containers": [{"resources": {"limits": {"cpu": 2, "memory": "8Gi"}}}]}}}
    kuberay = {"kind": "RayCluster", "spec": {"headGroupSpec": head, "workerGroupSpecs": [{"template": pod}]}}
    assert [each.network_gbit for each in read_cluster(write(tmp_path, kuberay), PRICES).groups] == [10, 40]
    table = {"nodes": [{"name": "a", "machine": "p5.4xlarge"}, {"name": "b", "cpus": 1, "memory_gb": 4}]}
    assert [each.network_gbit for each in read_cluster(write(tmp_path, table), PRICES).groups] == [100, 10]
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --gpus-per-node=h100:8\n#READAPT memory_gb=1000 network_gbit=400\n"
    )
    assert read_cluster(str(script), PRICES).groups[0].network_gbit == 400
    assert quantity("64Gi") == 64 * 2**30
