"""What changed between two outputs of ingest, if parts that both share have other names on the two sides."""

from pathlib import Path

import pytest

from readapt_ray.cluster.corpus_comparison import compare_corpora
from readapt_ray.records import Passage
from tests.cluster.test_earlier_plan import corpus, passage

PASSAGES = [passage(number) for number in range(100)]
"""Five parts of twenty."""


@pytest.mark.parametrize(
    ("now", "counts"),
    [
        (PASSAGES[:20] + PASSAGES[40:], (0, 0, 20, 80)),
        (PASSAGES[20:], (0, 0, 20, 80)),
        ([*(passage(number) for number in range(200, 220)), *PASSAGES], (20, 0, 0, 100)),
        (PASSAGES[20:40] + PASSAGES[60:] + [passage(5, 1)], (0, 1, 39, 60)),
    ],
)
def test_whole_parts_that_left_or_came_are_counted(
    tmp_path: Path, now: list[Passage], counts: tuple[int, int, int, int]
) -> None:
    before = corpus(tmp_path / "before", PASSAGES, None)
    after = corpus(tmp_path / "after", now, tmp_path / "before")
    changes = compare_corpora(before, after)
    assert (changes.added, changes.changed, changes.deleted, changes.kept) == counts
    assert not changes.is_empty
