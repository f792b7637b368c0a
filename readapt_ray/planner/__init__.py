"""Estimate time, memory, bytes and cost of a run before it starts, and how they grow (`readapt plan`).

In: a run's config, a cluster's file, and rates that were measured in finished roots. Out: a `Plan`, which
`plan_report.text` formats. It reads a sample of the corpus and the configs of models. It reads no weights (except with
`calibrate`), and does not start Ray.
"""

import functools
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from readapt_ray.catalog.shapes import longest_text, model_shape, pretrained_shape
from readapt_ray.config import Config
from readapt_ray.planner import calibration, cluster_files, estimates, index_stages, judged, rates, scaling
from readapt_ray.planner.corpus import Corpus, encoding_of, measure_corpus
from readapt_ray.planner.cost import START_S, Cost, Duration, cost_of
from readapt_ray.planner.estimates import Setting, StageEstimate
from readapt_ray.planner.machines import Cluster
from readapt_ray.planner.prices import PriceTable, read_prices
from readapt_ray.planner.rates import Rates
from readapt_ray.planner.scaling import Cell, Limit
from readapt_ray.recipes import chain
from readapt_ray.recipes.chain import RunConfig, Step


class PlanConfig(Config):
    """Options of `readapt plan`, in addition to those of the run."""

    cluster: str
    """The cluster: a file of `ray up`, a KubeRay manifest, a Slurm script, `local` for this machine, or a YAML file such as
    `nodes: [{name: a, count: 2, cpus: 16, memory_gb: 200, gpu: H100, gpus: 1, usd_per_hour: 3}]`."""
    prices: str | None = None
    """YAML file of machines, GPUs and prices. If omitted, the table of this package."""
    measured: tuple[str, ...] = ()
    """Roots of finished runs whose measured rates are used, separated by commas. The root of the run itself is always
    used."""
    calibrate: bool = False
    """Measure for a few seconds on this machine how fast the run's models embed and train, and plan with these rates.
    Use it on a node of the cluster, or on a machine with the same GPU. Missing models are downloaded."""
    num_passages: int | None = Field(default=None, ge=1)
    """Number of passages of the corpus. Give it if you have only a part of the corpus."""
    num_queries: int | None = Field(default=None, ge=0)
    """Number of queries to evaluate with. Give it if you do not have the queries yet."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The estimates of a run: time, cost, memory and bytes of its stages, and limits of its growth."""

    setting: Setting
    prices: PriceTable
    stages: list[StageEstimate]
    index_bytes: dict[str, float]
    """Bytes in memory of each kind of index, with the run's options."""
    passage_limits: list[Limit]
    """What breaks as the corpus grows, in ascending order of passages."""
    worker_limits: list[Limit]
    """Why a larger cluster is no faster, in ascending order of GPUs (of nodes, if there is no GPU)."""
    grid: dict[int, dict[int, Cell]]
    """Estimates of the run by number of passages, then by number of GPUs (of nodes, if there is no GPU)."""

    @property
    def costs(self) -> tuple[Cost, Cost, Cost]:
        """Return time and cost of the whole run: low, expected and high, with the time in which nodes start or idle."""
        return self.costs_of(self.stages)

    def costs_of(self, stages: list[StageEstimate]) -> tuple[Cost, Cost, Cost]:
        """Return time and cost of some stages: low, expected and high, as if only these ran, in this order."""
        durations: tuple[Duration, ...] = (lambda each: each.low_s, lambda each: each.seconds, lambda each: each.high_s)
        low, mid, high = (cost_of(stages, self.setting.cluster, duration) for duration in durations)
        return low, mid, high

    def on_demand_usd(self, stages: list[StageEstimate]) -> float:
        """Return the expected cost of some stages in USD if no node is a spot instance."""
        return cost_of(stages, self.setting.cluster.on_demand(self.prices), lambda each: each.seconds).usd

    @property
    def price_sources(self) -> list[str]:
        """Return one line per group of nodes: price of a node in USD per hour, and its source.

        A group of spot nodes has two lines: the spot price and the price on demand.
        """
        lines = []
        for group in self.setting.cluster.groups:
            if not group.machine_type:
                lines.append(f"{group.name}, {group.usd_per_hour:.2f}: as the cluster's file says, 0 if it does not")
                continue
            machine = self.prices.machines[group.machine_type]
            for spot in (True, False) if group.is_spot else (False,):
                price = f"{machine.spot:.2f} on spot" if spot else f"{machine.on_demand:.2f} on demand"
                source = self.prices.source_of(group.machine_type, spot=spot)
                lines.append(f"{group.name}, {group.machine_type}, {price}: {source}")
        return lines

    @property
    def model_stages(self) -> list[StageEstimate]:
        """Return the stages that make models and vectors: all train, merge and embed stages, in order."""
        return [each for each in self.stages if each.stage in ("train", "merge", "embed")]

    @property
    def assumptions(self) -> list[str]:
        """Return the assumptions of the figures, besides measured rates; one sentence each."""
        cluster = self.setting.cluster
        rated = {each.stage for each in self.stages if each.needs_gpus and not each.rate.is_measured}
        lines = [rates.describe_gpu_share(stage) for stage in sorted(rated)]
        lines += [f"weights are read at {estimates.LOAD_BYTES_PER_S / 1e9:g} GB/s, each model once per node"]
        if cluster.autoscaled_usd_per_hour:
            lines += [
                f"GPU nodes start in {START_S / 60:.0f} minutes, all at once, and end after {cluster.idle_timeout_s / 60:g} idle "
                f"minutes; their prices run from the start",
                "no spot node is taken away; each one that is costs a data shard, or up to five minutes of training",
            ]
        return lines

    @property
    def out_bytes(self) -> float:
        """Return the total size of all artifacts in bytes."""
        return sum(each.out_bytes for each in self.stages)

    @property
    def problems(self) -> list[str]:
        """Return why stages cannot run (memory, options, size of the corpus), one sentence each; empty if all can."""
        short = [f"{each.name} cannot run: {each.problem}" for each in self.stages if each.problem]
        short += [
            f"{each.stage} cannot be made of {self.setting.corpus.num_passages:,} passages: {each.what}, from {each.at:,.0f} on; take "
            f"{each.advice}"
            for each in self.passage_limits
            if each.stage and each.at < self.setting.corpus.num_passages
        ]
        return short + [
            f"{each.name} cannot run: a worker needs {each.memory.arithmetic()}; {each.memory.advice}"
            for each in self.stages
            if each.memory is not None and each.memory.is_checked and not each.memory.fits
        ]


def plan(run: RunConfig, options: PlanConfig) -> Plan:
    """Estimate time, cost, memory and bytes of a run on a cluster, without starting it.

    Stages that cannot run do not raise; see `Plan.problems`. No artifact is written.

    Args:
        run: config of the run. Finished artifacts under its root give measured rates, but are planned as if not done.
        options: the cluster, prices and measured rates.

    Raises:
        InputError: an option, the cluster or the price table cannot be used, or the corpus cannot be read. With
            `calibrate` also: this machine has another device than the cluster.
        ModelError: the size of a model is not known.
    """
    prices = read_prices(options.prices)
    cluster = cluster_files.read_cluster(options.cluster, prices)
    steps = [(step.name, step) for step in chain.plan_run(run)]
    device_name = calibration.check_device(cluster_files.own_gpu(prices), cluster) if options.calibrate else ""
    setting = _setting(run, options, steps, cluster, device_name)
    return Plan(
        setting=setting,
        prices=prices,
        stages=scaling.estimates(steps, setting),
        index_bytes=index_stages.index_bytes(_first(steps, "index"), setting),
        passage_limits=scaling.passage_limits(steps, setting),
        worker_limits=scaling.worker_limits(steps, setting),
        grid=scaling.grid(steps, setting),
    )


def _setting(
    run: RunConfig, options: PlanConfig, steps: list[tuple[str, Step]], cluster: Cluster, device_name: str
) -> Setting:
    ingest, pack, train, embed = (_first(steps, stage) for stage in ("ingest", "pack", "train", "embed"))
    encoding = embed.encoding or encoding_of(run.retriever)
    retriever = model_shape(run.retriever)
    measure = functools.partial(
        measure_corpus,
        pretrained=run.pretrained,
        retriever=run.retriever,
        encoding=encoding,
        block_tokens=min(pack.block_tokens, longest_text(run.pretrained) or pack.block_tokens),
    )
    corpus = measure(
        ingest,
        num_passages=options.num_passages,
        num_queries=options.num_queries if options.num_queries is not None else judged.num_given(run),
        split=run.split,
    )
    general: Corpus | None = None
    if run.general is not None:
        given: Any = next(step.config for _, step in steps if step.is_general)
        num_queries = judged.num_given(run.general)
        general = measure(given, num_passages=None, num_queries=num_queries, split=run.general.split)
    measured: Rates = rates.measure([run.root, *options.measured], cluster)
    if options.calibrate:
        configs = {"embed": embed, "train": train}
        lengths = {"embed_tokens": corpus.embed_tokens, "train_tokens": corpus.train_tokens}
        own = calibration.calibrate(run, configs, **lengths, device_name=device_name)
        measured = measured.with_measured(own)
    return Setting(
        corpus=corpus,
        cluster=cluster,
        rates=measured,
        pretrained=pretrained_shape(run.pretrained, train.objective),
        retriever=retriever,
        dimension=embed.dimensions or encoding.dimensions or retriever.hidden,
        vector_dtype=embed.vector_dtype,
        general=general,
    )


def _first(steps: list[tuple[str, Step]], stage: str) -> Any:
    """Return the options of the first step of a stage."""
    return next(step.config for _, step in steps if step.stage == stage)
