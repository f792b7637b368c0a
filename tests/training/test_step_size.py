"""What a step takes where batch_size is auto."""

import math

import pytest

from readapt_ray.training.step_size import MIN_STEPS, PackedSize, choose_step_size

MS_MARCO = PackedSize(num_blocks=720_000, num_passages=8_841_823, num_tokens=700_000_000)


@pytest.mark.parametrize("num_workers", [1, 3, 8, 64])
def test_each_worker_of_a_large_corpus_has_enough_tokens(num_workers: int) -> None:
    step = choose_step_size(MS_MARCO, num_workers=num_workers)
    assert step.num_workers == num_workers
    assert 16_384 * num_workers <= step.num_tokens < 16_384 * num_workers + 1024
    assert MS_MARCO.num_blocks / step.batch_size >= MIN_STEPS


@pytest.mark.parametrize("num_blocks", [1, 499, 1_200, 9_000, 30_000, 64_123])
def test_a_small_corpus_takes_500_steps_on_fewer_workers_and_says_so(num_blocks: int) -> None:
    size = PackedSize(num_blocks=num_blocks, num_passages=12 * num_blocks, num_tokens=1000 * num_blocks)
    step = choose_step_size(size, num_workers=8)
    assert num_blocks / step.batch_size >= min(MIN_STEPS, num_blocks)
    assert step.num_workers == 1 or step.num_tokens / step.num_workers >= 16_384
    assert 1 <= step.num_workers < 8 and step.batch_size >= step.num_workers
    assert "the corpus is small for 8 workers" in step.describe(8)


def test_the_learning_rate_grows_with_the_root_of_the_passages_and_no_further_than_fivefold() -> None:
    size = PackedSize(num_blocks=1000 * MIN_STEPS, num_passages=1000 * MIN_STEPS, num_tokens=100.0 * 1000 * MIN_STEPS)
    factors = {count: choose_step_size(size, num_workers=1, batch_size=count).rate_factor for count in (2, 4, 16, 400)}
    assert factors == {2: 1.0, 4: 1.0, 16: 2.0, 400: 5.0}


def test_workers_that_were_asked_for_all_take_part() -> None:
    size = PackedSize(num_blocks=600, num_passages=600, num_tokens=6_000)
    step = choose_step_size(size, num_workers=4, least_workers=4)
    assert (step.num_workers, step.batch_size) == (4, 4)


def test_a_run_that_goes_on_with_more_workers_keeps_its_steps() -> None:
    begun = choose_step_size(MS_MARCO, num_workers=2)
    later = choose_step_size(MS_MARCO, num_workers=8, batch_size=begun.batch_size)
    assert (later.batch_size, later.num_workers, later.rate_factor) == (begun.batch_size, 2, begun.rate_factor)
    assert math.isclose(later.num_tokens, begun.num_tokens)
