"""Check that the GPUs of this machine can be used: the driver, the build of torch, and the number that Ray counts."""

from readapt_ray.cluster.doctor.findings import Finding, Problem
from readapt_ray.cluster.gpus import Gpu, installed_gpus, why_unusable

_BUSY_MIB = 1024
"""An unused GPU holds less memory than this (the driver, and the context of a process that is ending)."""


def check_gpus(num_wanted: int | None) -> Finding:
    """Compare the GPUs that the driver, torch and Ray see.

    A run fails if torch cannot use the wanted GPUs. GPUs that Ray does not use, or whose memory other processes use,
    are warnings.

    Args:
        num_wanted: number of GPUs that Ray gives to workers on this machine; None without Ray: all installed GPUs.
    """
    gpus = installed_gpus()
    wanted = len(gpus) if num_wanted is None else num_wanted
    shown = f"{len(gpus)} x {gpus[0].name}, driver {gpus[0].driver}" if gpus else "none"
    return Finding(shown, tuple(_problems(gpus, wanted)))


def _problems(gpus: list[Gpu], wanted: int) -> list[Problem]:
    if gpus and not wanted:
        text = f"{len(gpus)} GPUs are not used, since Ray has none here; start Ray with --num-gpus={len(gpus)}"
        return [Problem(text, fails=False)]
    text = why_unusable(wanted)
    return [Problem(text)] * bool(text) + _busy(gpus)


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
