"""Adapt an LLM retriever to a private corpus from unlabelled text alone, re-embed it and serve it, on Ray.

Each stage is a function of its config and returns the artifact that it made:

    import readapt_ray as ra

    corpus = ra.ingest(ra.IngestConfig(source="notes/", output="run/corpus"))
    adapter = ra.train(ra.TrainConfig(pretrained="mistralai/Mistral-7B-v0.1", corpus=corpus.uri, output="run/adapter"))

Ray is joined where `RAY_ADDRESS` names a cluster or a notebook has started it, and started on this
machine otherwise. The core floors (`sources`, `training`, `weights`, `retrieval`) are plain functions.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from readapt_ray.artifacts import Artifact, Manifest, open_artifact
    from readapt_ray.catalog.encoding import Encoding
    from readapt_ray.catalog.models import open_model
    from readapt_ray.errors import InputError, ReadaptError
    from readapt_ray.evaluation.measures import Measurement, measure
    from readapt_ray.recipes.chain import RunConfig, plan_run, run
    from readapt_ray.recipes.chain import train_on_passages as train
    from readapt_ray.retrieval.encoder import Encoder
    from readapt_ray.serving.options import ServeConfig
    from readapt_ray.serving.server import serve
    from readapt_ray.stages.embed import EmbedConfig, embed
    from readapt_ray.stages.evaluate import EvaluateConfig, evaluate
    from readapt_ray.stages.finetune import FinetuneConfig, finetune
    from readapt_ray.stages.index import IndexConfig, index
    from readapt_ray.stages.ingest import IngestConfig, ingest
    from readapt_ray.stages.merge import MergeConfig, merge
    from readapt_ray.stages.pack import PackConfig, pack
    from readapt_ray.stages.search import SearchConfig, search
    from readapt_ray.stages.train import TrainConfig
    from readapt_ray.stages.tune import TuneConfig, tune
    from readapt_ray.weights.reference import readapted_weight

_HOMES: dict[str, str] = {
    **dict.fromkeys(("Artifact", "Manifest", "open_artifact"), "artifacts"),
    "open_model": "catalog.models",
    "Encoding": "catalog.encoding",
    **dict.fromkeys(("InputError", "ReadaptError"), "errors"),
    **dict.fromkeys(("Measurement", "measure"), "evaluation.measures"),
    **dict.fromkeys(("RunConfig", "plan_run", "run"), "recipes.chain"),
    "Encoder": "retrieval.encoder",
    "readapted_weight": "weights.reference",
    "ServeConfig": "serving.options",
    "serve": "serving.server",
    "train": "recipes.chain:train_on_passages",
    "TrainConfig": "stages.train",
    **dict.fromkeys(("EmbedConfig", "embed"), "stages.embed"),
    **dict.fromkeys(("EvaluateConfig", "evaluate"), "stages.evaluate"),
    **dict.fromkeys(("FinetuneConfig", "finetune"), "stages.finetune"),
    **dict.fromkeys(("IndexConfig", "index"), "stages.index"),
    **dict.fromkeys(("IngestConfig", "ingest"), "stages.ingest"),
    **dict.fromkeys(("MergeConfig", "merge"), "stages.merge"),
    **dict.fromkeys(("PackConfig", "pack"), "stages.pack"),
    **dict.fromkeys(("SearchConfig", "search"), "stages.search"),
    **dict.fromkeys(("TuneConfig", "tune"), "stages.tune"),
}

__all__ = [
    "Artifact",
    "EmbedConfig",
    "Encoder",
    "Encoding",
    "EvaluateConfig",
    "FinetuneConfig",
    "IndexConfig",
    "IngestConfig",
    "InputError",
    "Manifest",
    "Measurement",
    "MergeConfig",
    "PackConfig",
    "ReadaptError",
    "RunConfig",
    "SearchConfig",
    "ServeConfig",
    "TrainConfig",
    "TuneConfig",
    "embed",
    "evaluate",
    "finetune",
    "index",
    "ingest",
    "measure",
    "merge",
    "open_artifact",
    "open_model",
    "pack",
    "plan_run",
    "readapted_weight",
    "run",
    "search",
    "serve",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import a name where it is first used, so that `import readapt_ray` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'readapt_ray' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"readapt_ray.{module}"), attribute or name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
