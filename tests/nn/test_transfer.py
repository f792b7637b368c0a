"""What is copied to a GPU comes from pinned memory and is not waited for."""

from typing import Any

import numpy as np
import pytest
import torch

from readapt_ray.nn.transfer import to_device


def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: done.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *given, **named: done.append((given, named)) or tensor)
    to_device(np.arange(3), torch.device("cuda"))
    assert done == ["pinned", ((torch.device("cuda"),), {"non_blocking": True})]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_numbers_arrive(device: str) -> None:
    found = to_device(np.arange(5, dtype=np.int32), torch.device(device))
    assert found.device.type == device and found.dtype == torch.int32 and found.tolist() == [0, 1, 2, 3, 4]
