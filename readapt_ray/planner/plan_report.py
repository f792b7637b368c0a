"""Format a plan as text for people and as JSON values for programs."""

from typing import Any

from readapt_ray import progress
from readapt_ray.evaluation.tables import aligned_table
from readapt_ray.planner import Plan, scaling
from readapt_ray.planner.cost import stage_usd
from readapt_ray.planner.estimates import StageEstimate

_NUMBERS = ("", "K", "M", "B", "T")
_SI = ("", "K", "M", "G", "T", "P", "E")


def text(plan: Plan) -> str:
    """Format the whole plan as text for the terminal: stages, memory, sizes, other scales, limits and assumptions."""
    parts = [_heading(plan), _stages(plan), _memory(plan), _sizes(plan), _grid(plan), _limits(plan), _basis(plan)]
    return "\n\n".join(part for part in parts if part)


def values(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values, in seconds, bytes and USD.

    Stages, limits and problems are lists; `grid` has keys of text: number of passages, then number of GPUs or nodes.
    """
    low, mid, high = plan.costs
    corpus, cluster = plan.setting.corpus, plan.setting.cluster
    return {
        "corpus": vars(corpus),
        "cluster": {"name": cluster.name, "num_gpus": cluster.num_gpus, "usd_per_hour": cluster.usd_per_hour},
        "seconds": {"low": low.seconds, "expected": mid.seconds, "high": high.seconds},
        "usd": {
            "low": low.usd,
            "expected": mid.usd,
            "high": high.usd,
            "expected_on_demand": plan.on_demand_usd(plan.stages),
        },
        "prices": plan.price_sources,
        "waiting_usd": mid.waiting_usd,
        "assumptions": plan.assumptions,
        "out_bytes": plan.out_bytes,
        "stages": [
            {
                "name": each.name,
                "stage": each.stage,
                "work": each.work,
                "unit": each.unit,
                "workers": each.workers,
                "seconds": {"low": each.low_s, "expected": each.seconds, "high": each.high_s},
                "out_bytes": each.out_bytes,
                "worker_bytes": each.memory.needed if each.memory else None,
                "measured": each.rate.is_measured,
            }
            for each in plan.stages
        ],
        "grid": {
            str(size): {str(workers): vars(cell) for workers, cell in row.items()} for size, row in plan.grid.items()
        },
        "limits": {
            "passages": [vars(limit) for limit in plan.passage_limits],
            "workers": [vars(limit) for limit in plan.worker_limits],
        },
        "problems": plan.problems,
        "unfilled": cluster.unfilled,
    }


def _heading(plan: Plan) -> str:
    corpus, cluster = plan.setting.corpus, plan.setting.cluster
    return "\n".join(
        [
            f"corpus   {corpus.note}",
            f"         {corpus.text_bytes:,.0f} bytes, {corpus.train_tokens:.1f} tokens to train on and {corpus.embed_tokens:.1f} to "
            f"embed a passage (+-{100 * corpus.error:.0f}%): {count(corpus.num_passages * corpus.train_tokens)} and "
            f"{count(corpus.num_passages * corpus.embed_tokens)} tokens",
            *([f"general  {plan.setting.general.note}"] if plan.setting.general else []),
            f"models   {count(plan.setting.pretrained.num_parameters)} parameters, vectors of {plan.setting.dimension}",
            f"cluster  {cluster.describe()}",
            f"in all   {_cost(plan, plan.stages, f', {size(plan.out_bytes)} on disk')}",
            f"of it    {_cost(plan, plan.model_stages, ' for adapter, merge and vectors')}",
        ]
    )


def _cost(plan: Plan, stages: list[StageEstimate], more: str) -> str:
    low, mid, high = plan.costs_of(stages)
    on_demand = f"; {_usd(plan.on_demand_usd(stages))} if no node is on spot" if plan.setting.cluster.has_spot else ""
    waiting = f", {_usd(mid.waiting_usd)} of it while GPU nodes start and idle" if mid.waiting_usd else ""
    return (
        f"{duration(mid.seconds)} ({duration(low.seconds)} to {duration(high.seconds)}){more}, "
        f"{_usd(mid.usd)} ({_usd(low.usd)} to {_usd(high.usd)}){waiting}{on_demand}"
    )


def _stages(plan: Plan) -> str:
    rows = [("artifact", "work", "on", "time", "range", "USD", "leaves", "")]
    for each in plan.stages:
        beside = "beside the next" if each.is_beside_next else ""
        note = "; ".join(filter(None, [each.note, beside, "" if each.rate.is_measured else "rate not measured"]))
        rows.append(
            (
                each.name,
                f"{_scaled(each.work, _SI) if each.unit == 'FLOP' else count(each.work)} {each.unit}",
                f"{each.workers} x {each.device}",
                duration(each.seconds),
                f"{duration(each.low_s)} to {duration(each.high_s)}",
                _usd(stage_usd(each, plan.setting.cluster)),
                size(each.out_bytes),
                note,
            )
        )
    return aligned_table(rows)


def _memory(plan: Plan) -> str:
    lines = ["memory of a worker"]
    for each in plan.stages:
        if each.memory is not None:
            lines.append(f"  {'fits  ' if each.memory.fits else 'TOO BIG'} {each.name}: {each.memory.arithmetic()}")
    return "\n".join(lines)


def _sizes(plan: Plan) -> str:
    storage = plan.prices.storage
    kinds = ", ".join(f"{name} {size(each)}" for name, each in plan.index_bytes.items())
    month = plan.out_bytes / 1e9 * storage.usd_per_gb_month
    return f"an index in memory: {kinds}\nkeeping the artifacts: {_usd(month)} a month in an object store"


def _grid(plan: Plan) -> str:
    kind = "GPU" if plan.setting.cluster.num_gpus else "node"
    rows = [
        ("passages", *(f"{workers:,} {kind}{'s' * (workers > 1)}" for workers in scaling.WORKERS), "first to break")
    ]
    for num_passages, cells in plan.grid.items():
        broken = [limit.what for limit in plan.passage_limits if limit.at < num_passages]
        shown = (duration(cell.seconds) + (f", {_usd(cell.usd)}" if cell.usd else "") for cell in cells.values())
        rows.append((count(num_passages), *shown, broken[0] if broken else ""))
    return "at other sizes\n" + aligned_table(rows)


def _limits(plan: Plan) -> str:
    kind = "GPUs" if plan.setting.cluster.num_gpus else "nodes"
    lines = ["what breaks, in this order"]
    lines += [f"  from {count(limit.at)} passages: {limit.what}; {limit.advice}" for limit in plan.passage_limits]
    lines += [
        f"  from {progress.amount(round(limit.at), kind)}: {limit.what}; {limit.advice}" for limit in plan.worker_limits
    ]
    return "\n".join(lines)


def _basis(plan: Plan) -> str:
    sources = plan.setting.rates.sources
    measured = (
        "\n".join(f"  {line}" for line in sources)
        if sources
        else "  none: run a part of the corpus first, and plan again"
    )
    assumed = "\n".join(f"  {line}" for line in plan.assumptions)
    prices = "\n".join(f"  {line}" for line in plan.price_sources)
    return f"measured rates\n{measured}\nassumed\n{assumed}\nprices, in USD an hour of one node\n{prices}"


def duration(seconds: float) -> str:
    """Format seconds as text: as `progress.duration` below three days, then "12.5 days"; from 1,000 days "3 years"."""
    days = seconds / 86_400
    if days < 3:
        return progress.duration(seconds)
    return f"{days:,.1f} days" if days < 100 else f"{days:,.0f} days" if days < 1000 else f"{days / 365:,.0f} years"


def count(value: float) -> str:
    """Format a number with a unit: 950, 12.9 K, 8.84 M, 1.2 B, 3 T."""
    return _scaled(value, _NUMBERS)


def size(num_bytes: float) -> str:
    """Format bytes with a unit, in powers of 1,000: 950 B, 12.9 KB, 8.84 GB."""
    return f"{_scaled(num_bytes, _SI)}B" if num_bytes >= 999.5 else f"{num_bytes:.0f} B"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}".strip()
        value /= 1000
    return f"{value:,.0f} {units[-1]}" if value >= 999.5 else f"{value:.3g} {units[-1]}"


def _usd(value: float) -> str:
    return f"{value:,.2f} USD" if value < 100 else f"{value:,.0f} USD"
