"""Explain why the cluster launcher (Ray's autoscaler) could not start nodes: no quota, no capacity, no permission.

Ray shows this only in its own status, and a run would wait for the nodes without a message.
"""

import re
from pathlib import Path

from readapt_ray.errors import first_line

_LOG_BYTES = 1 << 20
_ADVICE = {
    "VcpuLimitExceeded": "ask AWS for the quota of its family (Service Quotas, EC2, vCPUs)",
    "MaxSpotInstanceCountExceeded": "ask AWS for the spot quota of its family (Service Quotas, EC2, All Spot Requests)",
    "InsufficientInstanceCapacity": "AWS has none left in these zones: name other zones or another instance type",
    "ServiceLinkedRoleCreationNotPermitted": "the account never used spot: run once, with rights to do it, aws iam "
    "create-service-linked-role --aws-service-name spot.amazonaws.com",
    "UnauthorizedOperation": "give the head's role ec2:RunInstances and iam:PassRole (clusters/README.md)",
    "QUOTA_EXCEEDED": "ask Google Cloud for the quota of this GPU in this region (IAM and admin, Quotas)",
    "ZONE_RESOURCE_POOL_EXHAUSTED": "Google Cloud has none left in this zone: name another zone",
}


def described_failures() -> str:
    """Return the end of an error message, "; the launcher could not start ...", or an empty text if no node failed."""
    lines = failures()
    return f"; the launcher could not start {'; '.join(lines)}" if lines else ""


def failures() -> list[str]:
    """Return one line per node group that could not be started, with a remedy if the error is a known one.

    Empty if none failed, without a cluster launcher, or if this process is not connected to Ray.
    """
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    if not ray.is_initialized():  # `get_runtime_context` would start Ray
        return []
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception:  # no autoscaler, or another version of Ray; this text only explains another error
        return []
    lines = {
        f"{each.ray_node_type_name} ({each.instance_type_name}): "
        f"{_explained(each.details or _logged(each.ray_node_type_name))}": None
        for each in status.failed_launches
    }
    return list(lines)


def _logged(group: str) -> str:
    """Return the reason for a node group from the launcher's log on the head: Ray 2.60 gives none in its status."""
    import ray

    try:
        log = Path(ray._private.worker._global_node.get_logs_dir_path()) / "monitor.log"
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_BYTES))
            text = file.read().decode(errors="replace")
    except (AttributeError, OSError):
        text = ""
    said = re.findall(rf"Failed to launch \d+ nodes of type {re.escape(group)}: (.*)", text)
    return str(said[-1]) if said else "no reason is known here; see `ray monitor` and monitor.log on the head"


def _explained(details: str) -> str:
    """Return a cloud provider's message, with a remedy if the error is a known one."""
    advice = next((text for code, text in _ADVICE.items() if code in details), None)
    message = first_line(Exception(details))
    return f"{message}; {advice}" if advice else message
