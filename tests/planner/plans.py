"""Plans of a small run, for tests."""

from pathlib import Path
from typing import Any

import yaml

from readapt_ray import planner
from readapt_ray.planner.estimates import StageEstimate
from readapt_ray.planner.prices import read_prices
from readapt_ray.recipes.chain import RunConfig

PRICES = read_prices(None)


REPOSITORY = Path(__file__).parent.parent.parent


CLUSTER = {
    "nodes": [
        {"name": "gpu", "machine": "p5.48xlarge", "spot": True, "count": 2},
        {"name": "head", "cpus": 8, "memory_gb": 32, "usd_per_hour": 0.4},
    ]
}


def write(folder: Path, values: Any, name: str = "cluster.yaml") -> str:
    (folder / name).write_text(yaml.safe_dump(values))
    return str(folder / name)


def launcher(**values: Any) -> dict[str, Any]:
    """A launcher file with a head, workers without GPUs and workers with one: at most so many, or at least and at most."""
    types: dict[str, dict[str, Any]] = {
        name: {"node_config": {"InstanceType": kind}} for name, kind in MACHINES.items()
    }
    for name in ("cpu", "gpu"):
        given = values.pop(name, None)
        least, most = given if isinstance(given, tuple) else (None, given)
        types[name] |= {"min_workers": least, "max_workers": most}
    kept = {name: {key: value for key, value in each.items() if value is not None} for name, each in types.items()}
    return {
        "cluster_name": "x",
        "provider": {"type": "aws"},
        "head_node_type": "head",
        "available_node_types": kept,
    } | values


MACHINES = {"head": "m7i.xlarge", "cpu": "m7i.4xlarge", "gpu": "g6.xlarge"}


def make_plan(folder: Path, sections: dict[str, Any] | None = None, **options: Any) -> planner.Plan:
    run = RunConfig.parse(yaml.safe_load((folder / "run.yaml").read_text()) | (sections or {}))
    return planner.plan(run, planner.PlanConfig(**{"cluster": str(folder / "cluster.yaml"), **options}))


def stage(found: planner.Plan, name: str) -> StageEstimate:
    return next(each for each in found.stages if each.stage == name)


def stage_named(found: planner.Plan, name: str) -> StageEstimate:
    return next(each for each in found.stages if each.name == name)
