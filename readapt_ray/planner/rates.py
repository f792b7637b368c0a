"""Estimate how fast a stage is per GPU or CPU: measured in finished roots, else from a table.

The table's CPU rates were measured on a Xeon with AMX (2026-11-22, the quickstart); its GPU rates are the share of the
data sheet's peak that such models are known to reach, and wide. A root that was measured narrows them.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from readapt_ray import artifacts
from readapt_ray.artifacts import Manifest
from readapt_ray.catalog.shapes import model_shape
from readapt_ray.errors import ModelError
from readapt_ray.planner.machines import Cluster
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

CPU: Final = "CPU"
ROWS_PER_FILE: Final = 65_536
WORK_UNITS: Final = {
    "ingest": "bytes of text",
    "pack": "tokens",
    "train": "FLOP",
    "merge": "bytes of weights",
    "embed": "FLOP",
    "index": "bytes of vectors",
    "search": "FLOP",
    "evaluate": "query evaluations",
}
"""What the work of each stage is counted in."""
_MEASURED_SPREAD: Final = 1.3
_TELLING_TIMES: Final = 4.0
"""A rate counts where the work took this many times what a stage takes without work; below, it says nothing."""
_WARM_UP_S: Final = 0.5
"""What the first step or batch of a device takes more than others, where seconds are counted from there on."""


@dataclass(frozen=True)
class Rate:
    """Work per second of one GPU or CPU, and the factor by which it may be slower or faster."""

    value: float
    slower: float
    faster: float
    source: str

    @property
    def is_measured(self) -> bool:
        """Whether a finished root gave this rate."""
        return self.source != "table"


_GPU_SHARE: Final = {"train": (0.35, 2.5, 1.3), "embed": (0.45, 2.0, 1.25), "search": (0.05, 3.0, 2.0)}
"""Share of a GPU's peak: usual, and the factors by which it may be slower or faster."""
_CPU_RATES: Final = {
    "ingest": (8e6, 2.0, 2.0),
    "pack": (3e5, 2.0, 2.0),
    "train": (8.0e10, 2.0, 1.3),
    "embed": (1.6e11, 2.0, 1.3),
    "merge": (2.5e8, 2.0, 3.0),
    "index": (1.0e8, 2.0, 3.0),
    "search": (1.5e10, 2.0, 2.5),
    "evaluate": (1.1e4, 2.0, 2.0),
}
"""Work per second of one CPU, in the units of WORK_UNITS."""
FIXED_S: Final = {
    "ingest": 1.0,
    "pack": 8.0,
    "train": 15.0,
    "merge": 0.2,
    "embed": 8.0,
    "index": 2.0,
    "search": 6.0,
    "evaluate": 1.5,
}
"""Seconds before and after the work: processes start, models are loaded, results are committed."""


def describe_gpu_share(stage: str) -> str:
    """Say which share of a GPU's peak a stage is planned with if nothing was measured."""
    share, slower, faster = _GPU_SHARE[stage]
    return f"{stage} at {share:.0%} of a GPU's peak, {faster:g} times as fast to {slower:g} times as slow"


class Rates:
    """The rates of a plan."""

    def __init__(self, measured: dict[tuple[str, str], tuple[float, str]]) -> None:
        self._measured = measured

    def with_measured(self, measured: dict[tuple[str, str], tuple[float, str]]) -> "Rates":
        """Return rates of which these take the place of others for the same stage and device."""
        return Rates(self._measured | measured)

    @property
    def sources(self) -> list[str]:
        """Return every measured rate as a line."""
        return [
            f"{stage} on {device}: {value:.3g} {WORK_UNITS[stage]}/s ({source})"
            for (stage, device), (value, source) in sorted(self._measured.items())
        ]

    def of(self, stage: str, device: str, peak_flops: float, *, is_low: bool) -> Rate:
        """Return the rate of one GPU (its name and peak) or CPU; a rate measured on an A100 also serves for an
        A100-80GB.

        Args:
            is_low: whether products are in bfloat16 or float16, which a CPU with matrix units does faster.
        """
        parts = device.split("-")
        for kind in ("-".join(parts[:length]) for length in range(len(parts), 0, -1)):
            if (stage, kind) in self._measured:
                value, source = self._measured[stage, kind]
                return Rate(value, _MEASURED_SPREAD, _MEASURED_SPREAD, source)
        if device != CPU:
            share, slower, faster = _GPU_SHARE[stage]
            return Rate(peak_flops * share, slower, faster, "table")
        value, slower, faster = _CPU_RATES[stage]
        if stage in ("train", "embed") and not is_low:
            value /= 2.5
        return Rate(value, slower, faster, "table")


def measure(roots: list[str], planned: Cluster) -> Rates:
    """Measure the rates of all complete artifacts under these roots.

    Args:
        roots: folders or URIs; one that is not there has no rates.
        planned: taken as the cluster that made an artifact, where its manifest does not say.
    """
    work: dict[tuple[str, str], float] = defaultdict(float)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    fixed: dict[tuple[str, str], float] = defaultdict(float)
    where: dict[tuple[str, str], list[str]] = defaultdict(list)
    for root in roots:
        location = Location(root)
        for name in artifacts.names_under(location):
            place = location if name == "." else location / name
            manifest = artifacts.read_manifest(place)
            if manifest is None or manifest.stage not in WORK_UNITS or _is_copied(manifest):
                continue
            try:
                done = work_of(manifest)
            except (ModelError, KeyError, TypeError) as error:
                logger.info("plan: no rate from %s: %s", place, error)
                continue
            device, units = _units(manifest, planned)
            key = manifest.stage, device
            counted_s = _counted_s(manifest, place, units)
            work[key] += done
            where[key].append(name)
            seconds[key] += units * _working_s(manifest) if counted_s is None else counted_s
            fixed[key] += units * (FIXED_S[manifest.stage] if counted_s is None else _WARM_UP_S)
    telling = [key for key in work if seconds[key] >= _TELLING_TIMES * fixed[key]]
    return Rates({key: (work[key] / seconds[key], f"measured in {', '.join(where[key])}") for key in telling})


def work_of(manifest: Manifest) -> float:
    """Count the work of a complete artifact, in the units of its stage.

    Raises:
        ModelError: its model cannot be found.
    """
    if manifest.stage in _WORK:
        return float(_WORK[manifest.stage](manifest))
    return float(manifest.counts.get("num_bytes", 0)) * (3 if manifest.stage == "merge" else 1)


def _trained(manifest: Manifest) -> float:
    from readapt_ray.training import speed
    from readapt_ray.training.dora import AdapterShape

    counts, config = manifest.counts, manifest.config
    adapter = None
    if config["method"] != "full":
        adapter = AdapterShape(
            method=config["method"],
            rank=config["lora_rank"],
            alpha=config["lora_alpha"],
            dropout=config["lora_dropout"],
            targets=tuple(config["target_modules"]),
        )
    return speed.run_flops(
        model_shape(config["pretrained"], config["objective"]),
        adapter,
        num_tokens=counts["num_tokens"],
        num_passages=counts["num_passages"],
        num_steps=counts["num_steps"],
        gradient_checkpointing=bool(config.get("gradient_checkpointing", False)),
    )


def _embedded(manifest: Manifest) -> float:
    counts = manifest.counts
    shape = model_shape(manifest.config.get("domain") or manifest.config["retriever"])
    return float(counts["num_tokens"] * shape.forward_flops(counts["num_tokens"] / counts["num_vectors"]))


def _searched(manifest: Manifest) -> float:
    num_vectors, dimension = manifest.details["num_vectors"], manifest.details["encoder"]["dimension"]
    return float(2 * manifest.counts["num_queries"] * num_vectors * dimension)


_WORK: Final[dict[str, Callable[[Manifest], float]]] = {
    "pack": lambda manifest: manifest.counts["num_tokens"],
    "train": _trained,
    "embed": _embedded,
    "index": lambda manifest: 4.0 * manifest.counts["num_vectors"] * manifest.details["encoder"]["dimension"],
    "search": _searched,
    "evaluate": lambda manifest: manifest.counts["num_queries"] * manifest.counts["num_runs"],
}


def _counted_s(manifest: Manifest, place: Location, units: float) -> float | None:
    """Return the seconds of all devices together that the work itself took, if the stage counted them."""
    steps = place / "metrics.jsonl"
    if manifest.stage == "train" and steps.is_file():
        lines = steps.read_text().splitlines()
        counted = sum(json.loads(line)["seconds"] for line in lines)
        if len(lines) == manifest.counts["num_steps"] and 0 < counted <= manifest.seconds:
            return units * float(counted)
    encoders = manifest.details.get("work")
    if manifest.stage == "embed" and encoders and encoders["waiting_share"] < 1:
        gpus = manifest.hardware.get("cluster", {}).get("gpus")
        cpus_each = 1 if gpus else manifest.config.get("num_cpus_per_worker") or 1
        return float(encoders["encoder_seconds"] / (1 - encoders["waiting_share"]) * cpus_each)
    return None


def _is_copied(manifest: Manifest) -> bool:
    """Return whether vectors were copied from an earlier corpus: they took no time, so they tell no rate."""
    return bool(manifest.details.get("work", {}).get("num_copied"))


def _working_s(manifest: Manifest) -> float:
    """Return the seconds without those that an empty corpus would take, too; at least a third of all."""
    return max(manifest.seconds - FIXED_S[manifest.stage], manifest.seconds / 3)


def _units(manifest: Manifest, planned: Cluster) -> tuple[str, float]:
    """Return the kind of device that did the work, and how many of them."""
    cluster: dict[str, Any] = manifest.hardware.get("cluster") or {
        "num_cpus": planned.num_cpus,
        "gpus": {group.gpu: group.count * group.gpus for group in planned.gpu_groups},
    }
    gpus = {str(name): int(count) for name, count in cluster["gpus"].items() if count}
    if manifest.stage in ("merge", "evaluate"):
        return CPU, 1.0
    if manifest.stage in ("train", "embed") and gpus:
        device = max(gpus, key=lambda name: gpus[name])
        return device, float(manifest.config.get("num_workers") or sum(gpus.values()))
    cpus = float(cluster["num_cpus"])
    each = manifest.config.get("num_cpus_per_worker")
    asked = manifest.config.get("num_workers")
    if manifest.stage == "train":
        return CPU, min(cpus, float(asked or 1) * float(each or cpus / float(asked or 1)))
    if manifest.stage == "embed":
        return CPU, min(cpus, float(each or 1) * float(asked or cpus))
    return CPU, min(cpus, _pieces(manifest))


def _pieces(manifest: Manifest) -> float:
    """Return the number of tasks that the work was split into."""
    if manifest.stage == "pack":
        return max(1.0, -(-manifest.counts["num_passages"] // ROWS_PER_FILE))
    if manifest.stage == "index":
        return float(manifest.counts["num_shards"])
    if manifest.stage == "ingest":
        return float(manifest.details.get("num_pieces", 1))
    return 1.0
