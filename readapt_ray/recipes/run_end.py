"""Make the closing text of a run: where its artifacts and report are, and the next commands."""

import shlex
from collections.abc import Mapping

from readapt_ray.artifacts import Artifact
from readapt_ray.recipes.chain import ADAPTED, DRIFT, GENERAL, RunConfig
from readapt_ray.storage import Location

GENERAL_REPORT = f"{GENERAL}/report"


def closing(config: RunConfig, made: Mapping[str, Artifact]) -> str:
    """Return the closing text of a run: its artifacts, the path of the report, and the next commands, ready to paste.

    The next command is `serve`, unless a requirement of evaluate does not hold; and `tune`, if no retriever was
    measured.

    Args:
        config: the options of the run.
        made: its artifacts, by their folder under the root.
    """
    width = max(map(len, made), default=0)
    lines = [f"{name:{width}} {artifact.uri}" for name, artifact in made.items()]
    for name, what in (("report", "report"), (DRIFT, "report"), (GENERAL_REPORT, "report on general queries")):
        if name in made:
            lines += ["", f"{what}: {made[name].location / 'report.html'}"]
    if "report" not in made and "adapter" in made:
        lines += [
            "",
            "No retrieval was measured: there are no queries and qrels. Numbers from other splits or pseudo-queries:",
        ]
        models = {"pretrained": config.pretrained, "retriever": config.retriever, "adapter": made["adapter"].uri}
        if ADAPTED in made and (layers := made[ADAPTED].manifest.details.get("layer_scales")):
            models["layer_scales"] = ",".join(layers)
        lines.append(
            _command("tune", **models, corpus=made["corpus"].uri, output=(Location(config.root) / "scales").uri)
        )
    required = made["report"].manifest.details.get("requirements", ()) if "report" in made else ()
    if f"index/{ADAPTED}" in made and all(each["holds"] for each in required):
        places = {"retriever": made[ADAPTED].uri, "index": made[f"index/{ADAPTED}"].uri, "corpus": made["corpus"].uri}
        lines += [
            "",
            "Next:",
            _command("serve", **places),
            """  curl http://127.0.0.1:8000/v1/search -H "Content-Type: application/json" -d '{"query": "...", "top_k": 3}'""",
        ]
    return "\n".join(lines)


def _command(command: str, **options: str) -> str:
    return "  " + shlex.join(
        [
            "readapt",
            command,
            *(word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)),
        ]
    )
