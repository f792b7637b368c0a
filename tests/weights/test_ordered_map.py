import threading
import time

import pytest
import torch

from readapt_ray.weights.ordered_map import Budget, ordered_map


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_results_come_in_order_whatever_takes_long(num_threads):
    def work(number):
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number * number

    assert list(ordered_map(work, range(20), num_threads=num_threads)) == [number * number for number in range(20)]


def test_no_more_is_begun_than_may_wait():
    begun, taken = [], []
    for result in ordered_map(begun.append, range(30), num_threads=2, num_waiting=3):
        taken.append(result)
        assert len(begun) <= len(taken) + 5
        time.sleep(0.002)
    assert len(taken) == 30


def test_the_first_error_ends_the_work():
    done = []

    def work(number):
        if number == 3:
            raise ValueError("three")
        done.append(number)

    with pytest.raises(ValueError, match="three"):
        list(ordered_map(work, range(1000), num_threads=2))
    assert len(done) < 10


def test_each_thread_computes_by_itself_and_torch_is_left_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert set(ordered_map(lambda _: torch.get_num_threads(), range(8), num_threads=2)) == {1}
        assert torch.get_num_threads() == 2
        seen = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [2]
    finally:
        torch.set_num_threads(before)


def test_a_budget_is_never_exceeded_and_a_large_request_is_met():
    budget, used, most, lock = Budget(10), [0], [0], threading.Lock()

    def work(size):
        with budget.use(size):
            with lock:
                used[0] += min(size, 10)
                most[0] = max(most[0], used[0])
            time.sleep(0.005)
            with lock:
                used[0] -= min(size, 10)
        return size

    sizes = [4, 4, 4, 25, 1, 9, 3] * 3
    assert list(ordered_map(work, sizes, num_threads=6)) == sizes
    assert 4 < most[0] <= 10
