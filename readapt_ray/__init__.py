"""Adapt an LLM retriever to a private corpus without labelled queries, embed the corpus again, and serve it, on Ray.

Each stage is a function that returns the artifact it made. `run` runs all stages and returns their artifacts by name:

    import readapt_ray as ra

    made = ra.run("my-run.yaml", root="run", overrides={"train.lora_rank": 16})
    corpus = ra.ingest(source="notes/", output="run/corpus")
    adapter = ra.train(pretrained="mistralai/Mistral-7B-v0.1", corpus=corpus, output="run/adapter")

If `RAY_ADDRESS` names a cluster, or the notebook has already started Ray, that Ray is used. Otherwise Ray is started on
this machine. The lower packages (`sources`, `training`, `weights`, `retrieval`) are plain functions without Ray.
"""

import importlib
from typing import Any

_FROM_CONFIGS = (
    *(
        "ingest",
        "pack",
        "train",
        "synthesize",
        "finetune",
        "merge",
        "embed",
        "bridge",
        "index",
        "search",
        "evaluate",
        "drift",
        "tune",
        "export",
    ),
    *("compare", "paper", "serve", "refresh", "find", "clean"),
)
"""Public functions whose parameters are the options of a config class."""
_HOMES: dict[str, str] = {
    **dict.fromkeys(_FROM_CONFIGS, "python.functions"),
    **dict.fromkeys(("run", "status", "quiet"), "python.functions"),
    **dict.fromkeys(("Artifact", "Results", "open_artifact"), "python.artifact"),
    **dict.fromkeys(("Encoder", "Hit", "Retriever"), "python.retriever"),
    **dict.fromkeys(("InputError", "ReadaptError"), "errors"),
    "Manifest": "artifacts",
    "Encoding": "catalog.encoding",
    "open_model": "catalog.models",
    **dict.fromkeys(("Measurement", "measure"), "evaluation.measures"),
    **dict.fromkeys(("RunConfig", "plan_run"), "recipes.chain"),
    "CompareConfig": "recipes.compare_plan",
    "PaperConfig": "recipes.paper.options",
    "readapted_weight": "weights.reference",
    "ServeConfig": "serving.options",
    **dict.fromkeys(("RefreshConfig", "FindConfig", "CleanConfig"), "recipes.refreshing.options"),
    "IngestConfig": "stages.ingest",
    "PackConfig": "stages.pack",
    "TrainConfig": "stages.train",
    "SynthesizeConfig": "stages.synthesize",
    "FinetuneConfig": "stages.finetune",
    "MergeConfig": "stages.merge",
    "EmbedConfig": "stages.embed",
    "BridgeConfig": "stages.bridge",
    "IndexConfig": "stages.index",
    "SearchConfig": "stages.search",
    "EvaluateConfig": "stages.evaluate",
    "DriftConfig": "stages.drift",
    "TuneConfig": "stages.tune",
    "ExportConfig": "stages.export",
}
"""The module of each public name. `make stub` generates `__init__.pyi` from this table."""

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import readapt_ray` is fast."""
    if name == "__version__":
        from importlib.metadata import version

        return version("readapt-ray")
    if name not in _HOMES:
        import difflib

        close = difflib.get_close_matches(name, __all__, n=1)
        hint = f"; did you mean {close[0]!r}?" if close and not name.startswith("_") else ""
        raise AttributeError(f"module 'readapt_ray' has no attribute {name!r}{hint}")
    importlib.import_module("readapt_ray.library_logs").hush_notebooks()
    module = importlib.import_module(f"readapt_ray.{_HOMES[name]}")
    if name in _FROM_CONFIGS:
        return module.function_of(name)
    found = getattr(module, name)
    return found if isinstance(found, type) else importlib.import_module("readapt_ray.python.signatures").public(found)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
