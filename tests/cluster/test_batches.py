"""Batches that feed every worker; where workers would be placed is made up, so no Ray is started."""

from pathlib import Path

import pytest

from readapt_ray.cluster import batches, placement
from readapt_ray.errors import PlacementError
from readapt_ray.stages.finetune import FinetuneConfig
from readapt_ray.stages.train import TrainConfig
from readapt_ray.storage import Location
from readapt_ray.training.step_size import PackedSize

SIZE = PackedSize(num_blocks=100_000, num_passages=1_000_000, num_tokens=100_000_000)


def offer(monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    monkeypatch.setattr(placement, "num_training_workers", lambda asked, cpus: asked or num_workers)


def config(**options: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {"pretrained": "p", "corpus": "c", "output": "o", "batch_size": "auto", **options}
    )


def test_an_output_keeps_the_batch_size_and_rate_of_its_first_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = Location(str(tmp_path))
    offer(monkeypatch, 4)
    first = batches.with_batch_size(config(min_workers=3), SIZE, output)
    assert (first.batch_size, first.num_workers, first.min_workers, first.learning_rate) == (66, 4, 3, 1e-3)
    offer(monkeypatch, 1)
    again = batches.with_batch_size(config(min_workers=3), SIZE, output)
    assert (again.batch_size, again.num_workers, again.min_workers, again.learning_rate) == (66, 1, 1, 1e-3)


@pytest.mark.parametrize("options", [{"num_workers": 8}, {"zero_stage": 3}])
def test_workers_that_were_asked_for_or_that_share_a_model_are_all_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, int]
) -> None:
    offer(monkeypatch, 8)
    small = PackedSize(num_blocks=1000, num_passages=1000, num_tokens=100_000)
    fed = batches.with_batch_size(config(**options), small, Location(str(tmp_path)))
    assert (fed.batch_size, fed.num_workers) == (8, 8)


def test_a_batch_smaller_than_the_workers_is_refused_with_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, 8)
    pairs = FinetuneConfig(model="m", corpus="c", output="o", batch_size=6)
    with pytest.raises(PlacementError, match="6 pairs cannot feed 8 workers: give batch_size 8 or more, or"):
        batches.check_batch_feeds(pairs, 6, "pairs")
    with pytest.raises(PlacementError, match="7 pairs cannot feed 8 workers"):
        batches.check_batch_feeds(pairs, 7, "pairs")
    batches.check_batch_feeds(config(num_workers=6), 6, "blocks")
