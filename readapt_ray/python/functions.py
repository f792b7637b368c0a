"""Make the functions of `import readapt_ray as ra` from the configs of stages, runs and comparisons.

They take the same options as the commands, raise the same errors, and show progress without any set-up of logging.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from readapt_ray import artifacts, log_output
from readapt_ray.config import Config
from readapt_ray.errors import UNREADABLE, InputError, unreadable
from readapt_ray.python.artifact import Artifact, Results, for_notebook
from readapt_ray.python.signatures import docstring_of, signature_of
from readapt_ray.recipes.chain import RunConfig
from readapt_ray.stages import STAGES
from readapt_ray.storage import Location


class Work(NamedTuple):
    """One row of FUNCTIONS: a function whose arguments are the options of a config."""

    summary: str
    """First line of its docstring."""
    config: str
    """Module and name of the config class, such as `stages.embed:EmbedConfig`."""
    function: str
    """Module and name of the function that takes a config."""
    returns: type[Artifact] | type[Results] | None = Artifact
    """What the public function returns: an artifact, a table, or nothing."""


FUNCTIONS: dict[str, Work] = {
    **{
        name: Work(stage.summary, f"stages.{name}:{stage.config}", f"stages.{name}:{name}")
        for name, stage in STAGES.items()
    },
    "train": Work(STAGES["train"].summary, "stages.train:TrainConfig", "recipes.chain:train_on_passages"),
    "compare": Work(
        "compare retrievers on one corpus", "recipes.compare_plan:CompareConfig", "recipes.compare:compare", Results
    ),
    "paper": Work(
        "reproduce the paper's experiments",
        "recipes.paper.options:PaperConfig",
        "recipes.paper.experiments:run",
        Results,
    ),
    "refresh": Work(
        "bring vectors, index and export to what a source holds now",
        "recipes.refreshing.options:RefreshConfig",
        "recipes.refreshing.refresh:refresh",
        Results,
    ),
    "find": Work(
        "find a passage in all artifacts of a root",
        "recipes.refreshing.options:FindConfig",
        "recipes.refreshing.find:find",
        Results,
    ),
    "clean": Work(
        "remove earlier generations of a root, and what is left of deleted passages",
        "recipes.refreshing.options:CleanConfig",
        "recipes.refreshing.clean:clean",
        Results,
    ),
    "serve": Work(
        "serve a retriever and its index over HTTP until interrupted",
        "serving.options:ServeConfig",
        "serving.server:serve",
        None,
    ),
}
"""The functions that are made from configs; `run`, `status` and `quiet` are defined below."""
_RETURNS = {
    Artifact: "Returns:\n    The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.",
    Results: "Returns:\n    The rows: they print as a table; `.rows`, `.to_pandas()`.",
    None: "Returns:\n    Nothing.",
}


@functools.cache
def function_of(name: str) -> Callable[..., Any]:
    """Make a public function, such as `ra.embed`, from its row in FUNCTIONS; the same function at each call.

    It takes the options of the config by name, or one config object. Its signature and docstring come from the config.
    Its result is an `Artifact`, a `Results`, or None.

    Args:
        name: a key of FUNCTIONS; another name raises a KeyError.
    """
    work = FUNCTIONS[name]
    config_class: type[Config] = _found(work.config)

    def call(*given: Any, **options: Any) -> Any:
        with _user_errors_and_progress():
            config = _config(name, config_class, given, options)
            return _presented(name, _found(work.function)(config), config)

    call.__name__ = call.__qualname__ = name
    call.__module__ = "readapt_ray"
    call.__doc__ = docstring_of(work.summary, config_class, _RETURNS[work.returns])
    call.__signature__ = signature_of(config_class, work.returns)  # type: ignore[attr-defined]
    return call


def _found(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"readapt_ray.{module}"), name)


def _config(name: str, config_class: type[Config], given: tuple[Any, ...], options: dict[str, Any]) -> Config:
    """Make a config from the arguments of a call: options by name, or one config.

    Raises:
        InputError: an option is unknown, missing or wrong, or was given without its name.
    """
    if not given:
        return config_class.parse(options, where=f"ra.{name}")
    if len(given) == 1 and isinstance(given[0], config_class) and not options:
        return given[0]
    raise InputError(
        f"ra.{name}: {given[0]!r} has no name; give each option by its name, such as "
        f"{next(iter(config_class.model_fields))}=..., or one {config_class.__name__} and nothing else"
    )


def _presented(name: str, result: Any, config: Any) -> Any:
    """Wrap artifacts and tables so that they print well in a notebook."""
    if isinstance(result, artifacts.Artifact):
        return for_notebook(result)
    return Results(*_TABLES[name](result, config)) if name in _TABLES else None


def _of_compare(result: Any, _: Any) -> tuple[list[dict[str, Any]], str]:
    from readapt_ray.recipes.compare import to_markdown

    return result["rows"], to_markdown(result)


def _of_paper(result: Any, _: Any) -> tuple[list[dict[str, Any]], str]:
    return [{"experiment": name, "outcome": text} for name, text in result.items()], "\n".join(result.values())


def _of_refresh(_: Any, config: Any) -> tuple[list[dict[str, Any]], str]:
    from readapt_ray.recipes.refreshing import history

    return history.history(Location(config.root)), history.as_text(Location(config.root))


def _of_find(result: Any, config: Any) -> tuple[list[dict[str, Any]], str]:
    from readapt_ray.recipes.refreshing.find import as_text

    return result, as_text(result, config.doc_id, config.root)


def _of_clean(result: Any, _: Any) -> tuple[list[dict[str, Any]], str]:
    return result.rows, result.text()


_TABLES: dict[str, Callable[[Any, Any], tuple[list[dict[str, Any]], str]]] = {
    "compare": _of_compare,
    "paper": _of_paper,
    "refresh": _of_refresh,
    "find": _of_find,
    "clean": _of_clean,
}
"""For each function that returns a table: makes rows and text from its result and config."""


@contextlib.contextmanager
def _user_errors_and_progress() -> Iterator[None]:
    """Show progress, and replace errors about unreadable paths by an InputError, while the block runs.

    Raises:
        InputError: a path cannot be read.
    """
    log_output.show_progress()
    try:
        yield
    except UNREADABLE as error:
        raise unreadable(error) from error


def run(
    config: str | Path | RunConfig,
    *,
    root: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    from_stage: str | None = None,
) -> dict[str, Artifact]:
    """Run all stages of a run file: adapt a retriever to a corpus, embed the corpus again, and evaluate.

    Complete artifacts are not made again. An artifact that was made with other options or from other inputs is stale:
    it is an error, unless `overwrite` or `from_stage` allows to make it again.

    Args:
        config: path of a YAML file, or a RunConfig.
        root: folder or URI for all artifacts. If omitted, the root in the config.
        overrides: options that replace the config's: {"train.lora_rank": 16}, or {"train": {"lora_rank": 16}}.
        overwrite: make all stale artifacts again.
        from_stage: make stale artifacts again, but only of this stage and the stages after it; "train" includes "pack".

    Returns:
        All artifacts of the run, new and old, by folder under the root: corpus, adapter, adapted, report ...

    Raises:
        InputError: an option is unknown or wrong, or an input cannot be used. All problems that are found before the
            first stage are in one message. A stage may raise its own error later.
    """
    from readapt_ray.recipes import run_file, running
    from readapt_ray.recipes.problems import Problems

    with _user_errors_and_progress():
        problems = Problems()
        changes = {**(overrides or {}), **({} if root is None else {"root": root})}
        if not isinstance(config, RunConfig):
            config = run_file.read_run(str(config), changes, problems)
        elif changes:
            config = run_file.changed(config.model_dump(exclude_unset=True), changes, problems, where="ra.run")
        made = running.run(config, overwrite=overwrite, from_stage=from_stage, problems=problems)
        return {name: for_notebook(each) for name, each in made.items()}


def status(root: str | Path) -> Results:
    """Return the state of each artifact under a root, as `readapt status` shows it.

    The states are done, stale (the run has other options or inputs now), running, stopped, failed, unreadable and
    missing. Each row has `artifact` (the folder), `stage`, `state`, `seconds` and `what` (a summary).

    Args:
        root: folder or URI of a run, or of any artifacts.

    Raises:
        InputError: there is no such folder.
    """
    from readapt_ray import root_status

    with _user_errors_and_progress():
        rows = root_status.rows(Location(str(root)))
        return Results(rows, root_status.as_table(rows, str(root)))


def quiet() -> None:
    """Show only warnings and errors of this process from now on, without progress.

    The environment variable READAPT_LOG_LEVEL=WARNING does the same, if it is set before the first call.
    """
    log_output.quiet()
