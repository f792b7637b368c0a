"""Check that the GPUs of this machine can be used: the driver, torch's build, and the number that Ray was told."""

import subprocess
from dataclasses import dataclass

from readapt_ray.cluster.doctor.findings import Finding, Problem

LEAST_DRIVER = {12: 525, 13: 580}
"""The oldest Linux driver for each major version of CUDA (NVIDIA, CUDA Toolkit Release Notes, Table 2)."""

_QUERY = "name,driver_version,memory.total,memory.used"
_ANSWERS_S = 10.0
_BUSY_MIB = 1024
"""A GPU that nobody uses holds less: driver and context of a process that is ending."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi describes it."""

    name: str
    driver: str
    total_mib: int
    used_mib: int


def check_gpus(num_wanted: int | None) -> Finding:
    """Compare the GPUs that the driver, torch and Ray see.

    Args:
        num_wanted: how many Ray gives to workers on this machine; None without Ray: all that the driver sees.
    """
    gpus = installed_gpus()
    wanted = len(gpus) if num_wanted is None else num_wanted
    shown = f"{len(gpus)} x {gpus[0].name}, driver {gpus[0].driver}" if gpus else "none"
    return Finding(shown, tuple(_problems(gpus, wanted)))


def installed_gpus() -> list[Gpu]:
    """Return the GPUs that nvidia-smi lists; none where there is no nvidia-smi or no driver."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWERS_S, check=False)
    except FileNotFoundError:
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [
        Gpu(name, driver, int(total) if total.isdecimal() else 0, int(used) if used.isdecimal() else 0)
        for name, driver, total, used in (row for row in rows if len(row) == 4)
    ]


def _problems(gpus: list[Gpu], wanted: int) -> list[Problem]:
    if not gpus and not wanted:
        return []
    if not gpus:
        return [
            Problem(
                f"Ray gives {wanted} GPUs to workers here and nvidia-smi lists none; install the NVIDIA driver, start the "
                f"container with --gpus all, or start Ray with --num-gpus=0"
            )
        ]
    if not wanted:
        text = f"{len(gpus)} GPUs are not used, since Ray has none here; start Ray with --num-gpus={len(gpus)}"
        return [Problem(text, fails=False)]
    return _torch_problems(gpus, wanted) + _busy(gpus)


def _torch_problems(gpus: list[Gpu], wanted: int) -> list[Problem]:
    import torch

    cuda = torch.version.cuda
    if cuda is None:
        text = f"torch {torch.__version__} cannot use GPUs; install a build for CUDA (the image of Containerfile.gpu has one)"
        return [Problem(text)]
    least = LEAST_DRIVER.get(int(cuda.partition(".")[0]), 0)
    if int(gpus[0].driver.partition(".")[0]) < least:
        text = (
            f"driver {gpus[0].driver} is too old for torch {torch.__version__} (CUDA {cuda}); install driver {least} or "
            f"newer, or a torch for an older CUDA"
        )
        return [Problem(text)]
    count = torch.cuda.device_count()
    if count < wanted:
        text = (
            f"torch sees {count} of {wanted} GPUs; look with nvidia-smi and `dmesg | grep Xid` for a GPU that failed, and "
            f"start this node again without it"
        )
        return [Problem(text)]
    return []


def _busy(gpus: list[Gpu]) -> list[Problem]:
    busy = [
        f"GPU {at} ({gpu.used_mib:,} of {gpu.total_mib:,} MiB)"
        for at, gpu in enumerate(gpus)
        if gpu.used_mib > _BUSY_MIB
    ]
    if not busy:
        return []
    text = f"memory is in use on {', '.join(busy)}; end that process, or wait for that job, if it is not meant to share"
    return [Problem(text, fails=False)]
