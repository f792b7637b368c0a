"""Estimate how fast a stage is per GPU or CPU: measured in finished roots, else from a table.

CPU rates of the table were measured on a Xeon with AMX (2026-11-22, the quickstart). GPU rates of the table are the
share of the data sheet's peak that such models usually reach, with wide bounds. Rates of finished roots are more exact.
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
"""Unit of each stage's work."""
_MEASURED_SPREAD: Final = 1.3
_TELLING_TIMES: Final = 4.0
"""A measured rate is used only if the work took at least this many times the stage's fixed seconds."""
_WARM_UP_S: Final = 0.5
"""Additional seconds of the first step or batch on a device, for stages that count the seconds of their work."""


@dataclass(frozen=True)
class Rate:
    """The speed of one GPU or CPU at a stage, with bounds."""

    value: float
    """Work per second, in the unit of WORK_UNITS."""
    slower: float
    """Factor by which it may be slower."""
    faster: float
    """Factor by which it may be faster."""
    source: str
    """Says where the rate is from; "table" if it was not measured."""

    @property
    def is_measured(self) -> bool:
        """Return whether the rate was measured, in a finished root or by calibration."""
        return self.source != "table"


_GPU_SHARE: Final = {"train": (0.35, 2.5, 1.3), "embed": (0.45, 2.0, 1.25), "search": (0.05, 3.0, 2.0)}
"""Usual share of a GPU's peak FLOPs, and the factors by which it may be slower and faster."""
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
"""Work per second of one CPU in the units of WORK_UNITS, and the factors by which it may be slower and faster."""
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
"""Fixed seconds before and after the work: processes start, models are loaded, results are committed."""


def describe_gpu_share(stage: str) -> str:
    """Describe the share of a GPU's peak that an unmeasured stage is planned with, and how far off it may be.

    Such as `train at 35% of a GPU's peak, 1.3 times as fast to 2.5 times as slow`.

    Args:
        stage: train, embed or search; others raise KeyError.
    """
    share, slower, faster = _GPU_SHARE[stage]
    return f"{stage} at {share:.0%} of a GPU's peak, {faster:g} times as fast to {slower:g} times as slow"


class Rates:
    """The rates of a plan: measured ones by (stage, device), else from the table."""

    def __init__(self, measured: dict[tuple[str, str], tuple[float, str]]) -> None:
        self._measured = measured

    def with_measured(self, measured: dict[tuple[str, str], tuple[float, str]]) -> "Rates":
        """Return a copy in which these measured rates replace others of the same stage and device.

        Args:
            measured: by (stage, device): work per second of one device, and a text that says where the rate is from.
        """
        return Rates(self._measured | measured)

    @property
    def sources(self) -> list[str]:
        """Return one line of text per measured rate, with value, unit and source; empty if nothing was measured."""
        return [
            f"{stage} on {device}: {value:.3g} {WORK_UNITS[stage]}/s ({source})"
            for (stage, device), (value, source) in sorted(self._measured.items())
        ]

    def rate_of(self, stage: str, device: str, peak_flops: float, *, is_16_bit: bool) -> Rate:
        """Return the rate of a stage on one GPU or CPU: the measured one, else the table's (see `Rate.is_measured`).

        Args:
            stage: the stage; on a GPU without a measured rate only train, embed or search.
            device: `CPU`, or a kind of GPU; a rate that was measured on an A100 is also used for an A100-80GB.
            peak_flops: peak FLOP per second of the GPU; unused for CPUs.
            is_16_bit: whether products are in bfloat16 or float16. Without, the table's rates of train and embed on
                CPUs are 2.5 times lower.
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
        if stage in ("train", "embed") and not is_16_bit:
            value /= 2.5
        return Rate(value, slower, faster, "table")


def measure(roots: list[str], planned: Cluster) -> Rates:
    """Compute the rates of stages from the manifests of complete artifacts under these roots.

    The rate of a stage on a device is the work of all its artifacts, divided by their seconds. It is left out if the
    stage ran too short to tell, compared with its start. Artifacts are skipped if their model cannot be found, or if
    they copied earlier vectors.

    Args:
        roots: folders or URIs; one that does not exist gives no rates.
        planned: cluster that is assumed to have made an artifact if its manifest does not say.
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
    """Return the work of a complete artifact, in the unit of its stage in WORK_UNITS.

    Raises:
        ModelError: its model cannot be found.
        KeyError, TypeError: its manifest lacks a figure, for example since an older release wrote it.
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
    """Return the seconds of the work itself, summed over devices, if the stage counted them; else None."""
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
    """Return whether vectors were copied from an earlier corpus: copies take no time, so they give no rate."""
    return bool(manifest.details.get("work", {}).get("num_copied"))


def _working_s(manifest: Manifest) -> float:
    """Return the seconds of an artifact less the fixed seconds of its stage; at least a third of all seconds."""
    return max(manifest.seconds - FIXED_S[manifest.stage], manifest.seconds / 3)


def _units(manifest: Manifest, planned: Cluster) -> tuple[str, float]:
    """Return the kind of device that did the work, and how many there were."""
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
