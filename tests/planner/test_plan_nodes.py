"""On which nodes a stage is planned, with what memory, and what GPUs that it takes for a part of its time cost."""

from dataclasses import replace
from pathlib import Path

import pytest

from readapt_ray.planner import stages
from readapt_ray.planner.cost import START_S, cost_of
from readapt_ray.recipes.chain import Step
from readapt_ray.stages.search import SearchConfig
from tests.planner.plans import PRICES, launcher, make_plan, stage, stage_named, write


def test_an_index_takes_the_memory_of_its_shards_on_nodes_that_stay(run_file: Path, tmp_path: Path) -> None:
    gpu_nodes = launcher(max_workers=9, cpu=(1, 1), gpu=8)
    values = {"cluster": write(tmp_path, gpu_nodes), "num_passages": 10_000_000}
    wide = {"embed": {"dimensions": 48, "vector_dtype": "float16"}}
    flat, graph = (make_plan(run_file, wide | {"index": {"kind": kind}}, **values) for kind in ("flat", "hnsw"))
    memory = stage(flat, "index").memory
    assert memory is not None and memory.parts["shard"] == pytest.approx(512 << 20, rel=0.2)
    assert memory.where == "a share of 1 CPU of cpu", "nodes with GPUs are gone when an index is made"
    memory = stage(graph, "index").memory
    assert memory is not None and memory.parts["shard"] == pytest.approx(1e7 / 3 * (4 * 48 + 8 * 32), rel=0.01)
    assert memory.where == "a share of 13 CPUs of cpu", "4 million vectors at most, a CPU for each 262,144"
    short = make_plan(run_file, wide | {"index": {"kind": "auto", "memory_gb": 0.001}}, **values)
    assert any("memory_gb = 0.001 is too little" in each for each in short.problems)


def test_a_cluster_without_gpus_is_planned_without_its_idle_head(run_file: Path, tmp_path: Path) -> None:
    values = launcher(max_workers=4, cpu=(4, 4))
    del values["available_node_types"]["gpu"]
    values["available_node_types"]["head"] = {"node_config": {"InstanceType": "m7i.4xlarge"}, "resources": {"CPU": 0}}
    found = make_plan(run_file, cluster=write(tmp_path, values), num_passages=1_000_000)
    assert stage(found, "train").workers == 4, "a worker per node that takes tasks"
    head, nodes = PRICES.machines["m7i.4xlarge"].on_demand, 8 * PRICES.machines["m7i.4xlarge"].on_demand
    cell = found.grid[1_000_000][8]
    assert cell.usd == pytest.approx(cell.seconds / 3600 * (head + nodes))


def test_a_search_pays_for_the_gpus_that_encode_its_queries(run_file: Path, tmp_path: Path) -> None:
    cluster = write(tmp_path, launcher(max_workers=9, cpu=(1, 1), gpu=8))
    few, many = (make_plan(run_file, cluster=cluster, num_queries=number) for number in (1000, 100_000))
    one, other = (stage_named(found, "runs/adapted.trec") for found in (few, many))
    assert (one.device, one.first_gpus, other.first_gpus) == ("CPU", 2, 8), "512 queries each"
    assert 0 < one.first_gpus_s < other.first_gpus_s < other.seconds
    apart = [replace(one, seconds=7200.0), replace(one, seconds=7200.0)]
    together = cost_of(apart, few.setting.cluster, lambda each: each.seconds)
    assert together.seconds == 2 * (7200 + START_S), "GPU nodes ended as idle, and start again for the second"
    vectors = replace(few.setting.corpus, num_passages=1_000_000)
    config = SearchConfig(retriever="m", vectors="v", queries="q", output="r.trec")
    step = Step("general/runs/adapted.trec", "search", config)
    exact = stages.estimate_stage(step, step.name, replace(few.setting, general=vectors))
    assert exact is not None and exact.device == "L4", "vectors are compared on GPUs"
