"""Run the experiments of the RE-AdaptIR paper one after another, each with all seeds."""

import logging

from readapt_ray.outputs import refuse_foreign_results
from readapt_ray.recipes.paper.options import PaperConfig
from readapt_ray.recipes.paper.outcome import write_outcome
from readapt_ray.recipes.paper.reproduction import Reproduction
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")


def run(config: PaperConfig) -> dict[str, str]:
    """Run the paper's experiments. Complete artifacts are not made again.

    Returns:
        The table of each experiment as Markdown, by the experiment's name. It is also written under the root after each
        seed.

    Raises:
        InputError: a model or a corpus cannot be found, or an option is wrong. This is checked before any stage starts.
    """
    reproduction = Reproduction(config)
    root = Location(config.root.rstrip("/"))
    for each in config.experiments:
        refuse_foreign_results(root / f"{each}.json", {"experiment", "seeds", "rows"}, root / f"{each}.md")
    said = {}
    for experiment in config.experiments:
        done: list[int] = []
        for seed in config.seeds:
            for own, variant in reproduction.steps(experiment, seed):
                logger.info("%s, seed %d: %s, %s", experiment, seed, own.name, variant.name)
                reproduction.search(own, variant, seed)
            done.append(seed)
            said[experiment] = write_outcome(reproduction, experiment, tuple(done))
    return said
