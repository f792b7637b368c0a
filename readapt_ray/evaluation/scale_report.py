"""Write the report of a search over scales, as Markdown and as one HTML page.

In: the result of `scale_search.describe_search`.

The page is self-contained. Its plot has the knowledge scale as axis, and shows the paired difference from the unchanged
retriever with intervals, one line per readapter scale.
"""

from collections.abc import Mapping
from typing import Any

from readapt_ray.evaluation import plots
from readapt_ray.evaluation.report import page_template
from readapt_ray.evaluation.report import verdict as sentence_of
from readapt_ray.evaluation.significance import Comparison
from readapt_ray.evaluation.tables import markdown_table, signed, value


def verdict(result: Mapping[str, Any]) -> str:
    """Summarise the search in a sentence, with figures from the half of the queries that did not choose the scales.

    If the unchanged retriever is best, the sentence says so, without figures.

    Args:
        result: from `scale_search.describe_search`.
    """
    best = result["best"]
    pair = f"readapter_scale {best['readapter_scale']:g}, knowledge_scale {best['knowledge_scale']:g}"
    if (best["readapter_scale"], best["knowledge_scale"]) == (1.0, 0.0):
        return f"No pair of scales is better than the retriever as it is ({pair})."
    sentence = sentence_of(Comparison(**result["reported"]))["sentence"]
    return f"Best is {pair}. On the {result['num_reporting']:,} queries that did not choose it: {sentence}"


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the report as Markdown: the best pair, the method, and a table of all pairs; `result` as in `verdict`."""
    lines = ["# Scales", "", verdict(result), "", _method(result), ""]
    rows = [
        [
            f"{cell['readapter_scale']:g}",
            f"{cell['knowledge_scale']:g}",
            value(cell["tuning"]),
            signed(cell["difference"]),
            _interval(cell),
            value(cell["reporting"]),
        ]
        for cell in result["grid"]
    ]
    measure = result["measure"]
    header = [
        "readapter",
        "knowledge",
        f"{measure}, tuning half",
        "difference",
        "95% interval",
        f"{measure}, other half",
    ]
    return "\n".join([*lines, *markdown_table(header, rows)]) + "\n"


def to_html(result: Mapping[str, Any]) -> str:
    """Return the report as one self-contained HTML page; `result` is as in `verdict`."""
    by_readapter: dict[float, list[plots.Point]] = {}
    for cell in result["grid"]:
        low, high = cell["interval"] or (cell["difference"], cell["difference"])
        point = plots.Point(cell["knowledge_scale"], cell["difference"], low, high)
        by_readapter.setdefault(cell["readapter_scale"], []).append(point)
    drawing = plots.scale_plot(
        {f"readapter {scale:g}": points for scale, points in sorted(by_readapter.items())},
        axis="knowledge scale",
        description=f"Difference in {result['measure']} from the retriever as it is, over the knowledge scale",
    )
    return page_template("tune.html").render(
        result=result, drawing=drawing, verdict=verdict(result), method=_method(result), interval=_interval
    )


def _method(result: Mapping[str, Any]) -> str:
    caution = (
        " These queries are made from the passages themselves: they compare scales, and say nothing of how good the "
        "retriever is."
        if result["queries"].startswith("pseudo")
        else ""
    )
    layers = result.get("layer_scales")
    by_layer = f" Knowledge scales are multiplied by a factor in the layers {', '.join(layers)}." if layers else ""
    return (
        f"Measured on {result['queries']}.{by_layer} {result['num_tuning']:,} of them chose the pair; the other "
        f"{result['num_reporting']:,} did not. Differences are from the retriever as it is, on the tuning half, with 95% "
        f"bootstrap intervals over its queries.{caution}"
    )


def _interval(cell: Mapping[str, Any]) -> str:
    return f"{signed(cell['interval'][0])} to {signed(cell['interval'][1])}" if cell["interval"] else "one query only"
