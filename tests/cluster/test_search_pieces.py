"""Into how many tasks an exact search is cut."""

from pathlib import Path

import numpy as np
import pytest

from readapt_ray.cluster import search_pieces
from tests.stages.test_index import vectors_artifact

NUM_VECTORS, WIDTH = 200, 4


@pytest.mark.parametrize(
    ("shard_vectors", "on_gpus", "num_pieces"), [(10, False, 20), (10, True, 8), (1000, False, 2), (1000, True, 2)]
)
def test_a_gpu_has_few_tasks_however_many_vectors_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_vectors: int, on_gpus: bool, num_pieces: int
) -> None:
    """Two GPUs or CPUs; each vector is in one piece."""
    monkeypatch.setattr(search_pieces, "SHARD_BYTES", shard_vectors * 4 * WIDTH)
    artifact = vectors_artifact(tmp_path / "vectors", np.ones((NUM_VECTORS, WIDTH), np.float32))
    found = search_pieces.vector_pieces(artifact, 2, on_gpus=on_gpus)
    assert len(found) == num_pieces
    assert sum(each.num_rows for content in found for each in content) == NUM_VECTORS  # type: ignore[union-attr]
