"""Inputs that a stage finds by the manifest of another artifact, or continues from, and that are not what they were."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from readapt_ray import artifacts
from readapt_ray.cluster import loss_task
from readapt_ray.config import StageConfig
from readapt_ray.errors import FingerprintMismatchError
from readapt_ray.retrieval.index_kinds import index_spec
from readapt_ray.stages import drift
from readapt_ray.stages import index as index_stage
from tests import factories

PASSAGES = factories.small_corpus(40)


class Made(StageConfig):
    """Options of stages of which only the manifest is needed."""

    corpus: str = "-"
    """An input."""
    pretrained: str = "-"
    """A model."""
    objective: str = "causal_lm"
    """Of training."""
    block_tokens: int = 64
    """Of packing."""
    storage: str = "float32"
    """Of an index."""

    inputs: ClassVar[frozenset[str]] = frozenset({"corpus", "pretrained"})


def made(stage: str, folder: Path, details: dict[str, Any], of: artifacts.Artifact | None = None) -> artifacts.Artifact:
    config = Made(output=str(folder), **({"corpus": of.uri} if of else {}))
    inputs = {"corpus": of.fingerprint} if of else {}
    return artifacts.produce(stage, config, inputs=inputs, work=lambda workspace: workspace.details.update(details))


@pytest.mark.parametrize("changed", ["corpus", "blocks"])
def test_drift_refuses_withheld_passages_of_another_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setattr(loss_task, "measure_losses", lambda *_, **__: pytest.fail("other passages were measured"))
    corpus = factories.ingest_artifact(tmp_path / "corpus", PASSAGES)
    blocks = made("pack", tmp_path / "blocks", {"withheld": [3, 4]}, corpus)
    adapter = made("train", tmp_path / "adapter", {}, blocks)
    (tmp_path / changed).rename(tmp_path / "gone")
    other = factories.ingest_artifact(tmp_path / ("corpus" if changed == "corpus" else "c2"), PASSAGES[::-1])
    if changed == "blocks":
        made("pack", tmp_path / "blocks", {"withheld": [3, 4]}, other)
    config = drift.DriftConfig(adapter=adapter.uri, vectors=("a", "b"), output=str(tmp_path / "drift"), dtype="float32")
    with pytest.raises(FingerprintMismatchError, match=rf"/{changed}' is not what '.*' was made of"):
        drift._loss_change(config, adapter, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "is_same"), [({}, True), ({"code_bytes": 8}, False), ({"refine": False}, False), ({"depth": 9}, True)]
)
def test_an_index_of_other_codes_is_not_continued(tmp_path: Path, options: dict[str, Any], is_same: bool) -> None:
    def config(**more: Any) -> Any:
        return index_stage.IndexConfig(vectors="-", output="-", kind="ivf-pq", **more)

    def options_of(given: Any) -> Any:
        return index_stage.index_options(given, 20_000, 64, "float32")

    encoder = {"fingerprint": "f", "model": "m"}
    factory = index_spec(options_of(config()), 90_000, 64).factory
    details = {"encoder": encoder, "kind": "ivf-pq", "storage": "float32", "shards": [{"factory": factory}]}
    made("index", tmp_path / "before", details)
    now = config(previous=str(tmp_path / "before"), **options)
    spec = index_spec(options_of(now), 20_000, 64)
    if is_same:
        assert index_stage._open_previous(now, encoder, options_of(now), spec) is not None
    else:
        with pytest.raises(FingerprintMismatchError, match=r"is 'IVF.*PQ.*', and this index would be 'IVF.*PQ"):
            index_stage._open_previous(now, encoder, options_of(now), spec)
