"""Plan a run whose corpus has no queries: replace search and evaluate by `drift`.

`drift` measures what needs no queries. A few passages are withheld from training, so that the language-model loss can be
measured on them.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from readapt_ray import artifacts
from readapt_ray.errors import CorpusError
from readapt_ray.recipes.chain import ADAPTED, BASE, DRIFT, RunConfig, Step, stage_parts
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

MAX_WITHHELD = 200
_ONE_IN = 20
"""At most one passage in 20 is withheld."""


def steps_for_corpus(config: RunConfig, steps: Sequence[Step]) -> list[Step]:
    """Return the steps of a run, adapted to whether its corpus has queries. Unchanged if there is no corpus yet.

    Without queries, the steps that need them are replaced by `drift`, and pack withholds one passage in 20 (at most
    200), unless section train sets withhold, exclude or only. If passages were withheld by an earlier run, they stay
    withheld. So a run that gets queries later does not train again.

    Args:
        config: the options of the run.
        steps: all steps, in order. Steps with wrong options may be missing.

    Raises:
        CorpusError: the corpus has only one of queries and qrels, or requirements are given but cannot be checked.
    """
    corpus = next((artifacts.read_manifest(step.config.output) for step in steps if step.name == "corpus"), None)
    if corpus is None:
        return list(steps)
    is_labelled = has_judgements(config, steps)
    chosen = len({"withhold", "exclude", "only"} & config.train.keys()) == 0
    if chosen:
        usual = 0 if is_labelled else min(MAX_WITHHELD, corpus.counts["num_passages"] // _ONE_IN)
        steps = [_withholding(step, usual) if step.stage == "pack" else step for step in steps]
    if is_labelled:
        return list(steps)
    return [step for step in steps if not step.needs_judgements] + _drift(config, steps)


def has_judgements(config: RunConfig, steps: Sequence[Step]) -> bool:
    """Return whether queries and qrels exist for search and evaluate; True if `steps` lacks evaluate (wrong options).

    Raises:
        CorpusError: only one of them exists, a file that the user gave is missing, or `evaluate.require` needs them.
    """
    evaluation: Any = next((step.config for step in steps if step.name == "report"), None)
    if evaluation is None:
        return True
    there = _there(evaluation)
    if all(there.values()):
        return True
    if evaluation.require:
        raise CorpusError(
            f"section 'evaluate': require = {', '.join(evaluation.require)!r}, and the corpus has no queries and qrels of the split "
            f"{config.split!r} to tell it by; give them with --set queries=FILE --set qrels=FILE, or leave require out"
        )
    if any(there.values()) or config.queries or config.qrels:
        absent = next(name for name, present in there.items() if not present)
        raise CorpusError(
            f"no {absent} at {getattr(evaluation, absent)!r}; evaluation needs queries and qrels: give both, or a split that the source has"
        )
    return False


def check_general(config: RunConfig, steps: Sequence[Step]) -> None:
    """Check, after its ingest, that the general corpus of the run has queries and qrels.

    Args:
        config: the options of the run.
        steps: its steps. The step evaluate of the general corpus must be among them.

    Raises:
        CorpusError: one of them is missing.
    """
    evaluation = next(step.config for step in steps if step.is_general and step.stage == "evaluate")
    absent = [name for name, is_there in _there(evaluation).items() if not is_there]
    if config.general and absent:
        raise CorpusError(
            f"section 'general': {config.general.source!r} has no {' and no '.join(absent)} of the split {config.general.split!r}; give "
            f"general.split, or general.queries and general.qrels"
        )


def _there(evaluation: Any) -> dict[str, bool]:
    return {name: Location(getattr(evaluation, name)).exists() for name in ("queries", "qrels")}


def log_missing_queries(config: RunConfig) -> None:
    """Log what a run without queries measures, and how to get retrieval measures."""
    logger.info(
        "the corpus has no queries and qrels of the split %r, so search and evaluate are left out, and loss, vectors and "
        "neighbours are compared instead; --set queries=FILE --set qrels=FILE would give numbers, and so would `readapt "
        "tune`, which takes the queries of another split, or makes pseudo-queries from the passages",
        config.split,
    )


def _withholding(step: Step, usual: int) -> Step:
    manifest = artifacts.read_manifest(step.config.output)
    record = dataclasses.asdict(manifest) if manifest else artifacts.read_lease(step.config.output)
    withhold = ((record or {}).get("config") or {}).get("withhold", usual)
    return dataclasses.replace(step, config=step.config.model_copy(update={"withhold": withhold}))


def _drift(config: RunConfig, steps: Sequence[Step]) -> list[Step]:
    """Return the step `drift` as a list; an empty list if a step that it reads is missing."""
    outputs = {step.name: step.config.output for step in steps}
    vectors = [outputs.get(f"vectors/{name}") for name in (BASE, ADAPTED)]
    if "adapter" not in outputs or None in vectors:
        return []
    config_class, _ = stage_parts("drift")
    options = {"adapter": outputs["adapter"], "vectors": vectors, "output": (Location(config.root) / DRIFT).uri}
    overwrites = any(step.stage == "evaluate" and step.config.overwrite for step in steps)
    return [Step(DRIFT, "drift", config_class.parse({**options, "overwrite": overwrites}))]
