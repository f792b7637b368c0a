"""The language-model loss of a retriever's adapter on new passages against kept ones, and what a refresh makes of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import loss_task
from readapt_ray.errors import PlacementError
from readapt_ray.recipes.refreshing import adapting
from readapt_ray.recipes.refreshing.adapting import adapter_loss, adapter_of, compared
from readapt_ray.stages.merge import MergeConfig, merge
from readapt_ray.stages.train import TrainConfig
from readapt_ray.training import withheld_loss
from tests import factories
from tests.recipes.refreshing.root import Root, StandIns

PASSAGES = factories.small_corpus(160)


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Path, Artifact]:
    """A retriever that was merged with an adapter, and that adapter."""
    base = factories.tiny_decoder(tmp_path / "base")
    retriever = factories.write_contract(factories.full_retriever(tmp_path / "retriever", base))
    made = factories.dora_adapter(tmp_path / "made", base)

    def work(workspace: artifacts.Workspace) -> None:
        for file in made.glob("adapter_*"):
            (workspace.location / file.name).write_bytes(file.read_bytes())
        workspace.details["dtype"] = "float32"

    config = TrainConfig(pretrained=str(base), corpus="blocks", output=str(tmp_path / "adapter"), objective="causal_lm")
    adapter = artifacts.produce("train", config, inputs={"pretrained": open_model(base).fingerprint}, work=work)
    options = {"pretrained": str(base), "retriever": str(retriever), "adapter": adapter.uri}
    merge(MergeConfig(**options, output=str(tmp_path / "merged")))
    return tmp_path / "merged", adapter


def losses_here(pretrained: Any, trained: Any, texts: Sequence[str], *, dtype: str, **options: Any) -> Any:
    """What the Ray task computes, in this process."""
    assert dtype == "float32"
    return withheld_loss.losses(pretrained, trained, texts, dtype=torch.float32, device=torch.device("cpu"), **options)


def test_the_gap_is_what_the_adapter_gains_less_on_new_passages() -> None:
    draw = np.random.default_rng(0)
    before, noise = draw.normal(3.0, 0.5, 64), draw.normal(0, 0.01, 64)
    kept = np.stack([before, before - 0.3 + noise])
    new = np.stack([before + 1, before + 1 - 0.1 + noise])  # harder for any model, and less was learnt
    found = compared(new, kept)
    assert found is not None
    assert found.gap == pytest.approx(0.2, abs=1e-9) and found.plus_minus < 0.01
    assert found.new - found.kept == pytest.approx(1.2)
    assert compared(np.full((2, 5), np.nan), kept) is None


def test_the_adapter_of_a_merged_retriever_is_found_and_measured(
    merged: tuple[Path, Artifact], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    retriever, adapter = merged
    assert adapter_of(str(retriever)) == adapter
    assert adapter_of(str(retriever.parent / "retriever")) is None, "nothing was merged"
    texts = [each.text for each in PASSAGES]
    monkeypatch.setattr(loss_task, "measure_losses", losses_here)
    same = adapter_loss(str(retriever), texts[:30], texts[:30])
    assert same is not None and same.gap == 0 and same.new == same.kept > 1

    def no_room(*_: Any, **__: Any) -> None:
        raise PlacementError("no CPU")

    monkeypatch.setattr(loss_task, "measure_losses", no_room)
    assert adapter_loss(str(retriever), texts, texts) is None
    assert "was not measured: no CPU" in caplog.text
    (adapter.location / "manifest.json").delete()
    assert adapter_of(str(retriever)) is None, "it is gone"


def test_a_refresh_says_how_to_train_the_adapter_on_what_is_new(
    merged: tuple[Path, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "readapt_ray")
    StandIns(monkeypatch)
    given: list[tuple[int, int]] = []

    def measured(_: str, new: list[str], kept: list[str]) -> adapting.AdapterLoss:
        given.append((len(new), len(kept)))
        return adapting.AdapterLoss(new=3.0, kept=2.0, gap=0.4, plus_minus=0.1)

    monkeypatch.setattr("readapt_ray.recipes.refreshing.refresh.adapter_loss", measured)
    root = Root(tmp_path, merged[0])
    root.holds(PASSAGES[:100])
    first = root.refresh()
    root.holds(PASSAGES)
    made = root.refresh(loss_sample=55)
    assert given == [(55, 55)]
    assert made.signals["loss_gap"] == 0.4 and made.signals["loss_new"] == 3.0
    assert "the adapter lowers the language-model loss 0.40 nats per token less than on the others" in made.advice
    folders = [generation.folder(root.location, "corpus") for generation in (made, first)]
    assert caplog.messages[-1].endswith(
        f"readapt train --pretrained {tmp_path}/base --continue-from {merged[1].uri} --corpus {folders[0]} "
        f"--new-since {folders[1]} --output {root.uri}/adapter-2"
    )
    root.holds(PASSAGES[:100])
    assert "loss_gap" not in root.refresh(loss_sample=0).signals
