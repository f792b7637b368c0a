"""Explain why torch cannot use the GPUs of this machine: no driver, an old driver, no CUDA build, a failed GPU."""

import subprocess
from dataclasses import dataclass

from readapt_ray.errors import PlacementError

LEAST_DRIVER = {12: 525, 13: 580}
"""The oldest Linux driver for each major version of CUDA (NVIDIA, CUDA Toolkit Release Notes, Table 2)."""

_QUERY = "name,driver_version,memory.total,memory.used"
_ANSWERS_S = 10.0


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi describes it; memory in MiB."""

    name: str
    driver: str
    total_mib: int
    """0 if nvidia-smi does not say; so is `used_mib`."""
    used_mib: int


def installed_gpus() -> list[Gpu]:
    """Return the GPUs that nvidia-smi lists, in its order; empty without nvidia-smi or a driver.

    CUDA_VISIBLE_DEVICES does not limit them.

    Raises:
        PlacementError: nvidia-smi did not answer within 10 s.
    """
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWERS_S, check=False)
    except FileNotFoundError:
        return []
    except subprocess.TimeoutExpired:
        raise PlacementError(
            f"nvidia-smi did not answer within {_ANSWERS_S:g} s, so the GPU driver of this machine hangs; restart the machine, "
            f"or take it out of the cluster"
        ) from None
    rows = [line.split(", ") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [
        Gpu(name, driver, int(total) if total.isdecimal() else 0, int(used) if used.isdecimal() else 0)
        for name, driver, total, used in (row for row in rows if len(row) == 4)
    ]


def why_unusable(wanted: int) -> str:
    """Return why torch in this process cannot use `wanted` GPUs, and what to do; an empty text if it can."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count >= wanted:
        return ""
    gpus, cuda = installed_gpus(), torch.version.cuda
    if not gpus:
        return (
            f"Ray gives {wanted} GPUs to workers here and nvidia-smi lists none; install the NVIDIA driver, start the "
            f"container with --gpus all, or start Ray with --num-gpus=0"
        )
    if cuda is None:
        return (
            f"torch {torch.__version__} cannot use GPUs; install a build for CUDA (the image of Containerfile.gpu has one), or "
            f"set CUDA_VISIBLE_DEVICES= to work on CPUs"
        )
    driver, least = gpus[0].driver, LEAST_DRIVER.get(int(cuda.partition(".")[0]), 0)
    if int(driver.partition(".")[0]) < least:
        return (
            f"driver {driver} is too old for torch {torch.__version__} (CUDA {cuda}); install driver {least} or "
            f"newer, or a torch for an older CUDA"
        )
    return (
        f"torch sees {count} of {wanted} GPUs; look with nvidia-smi and `dmesg | grep Xid` for a GPU that failed, and "
        f"start this node again without it"
    )
