"""Say why the cluster launcher (Ray's autoscaler) could not start nodes: no quota, no capacity, no permission.

Ray writes this into its own status alone, while a run would wait for the nodes without a word.
"""

from readapt_ray.errors import first_line

_ADVICE = {
    "VcpuLimitExceeded": "ask AWS for the quota of its family (Service Quotas, EC2, vCPUs)",
    "MaxSpotInstanceCountExceeded": "ask AWS for the spot quota of its family (Service Quotas, EC2, All Spot Requests)",
    "InsufficientInstanceCapacity": "AWS has none left in these zones: name other zones or another instance type",
    "UnauthorizedOperation": "give the head's role ec2:RunInstances and iam:PassRole (clusters/README.md)",
    "QUOTA_EXCEEDED": "ask Google Cloud for the quota of this GPU in this region (IAM and admin, Quotas)",
    "ZONE_RESOURCE_POOL_EXHAUSTED": "Google Cloud has none left in this zone: name another zone",
}


def failures() -> list[str]:
    """Return one line per node group that could not be started, with what to do; none without a launcher."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception:  # a cluster without autoscaler, or of another Ray: this only explains another error
        return []
    lines = {
        f"{each.ray_node_type_name} ({each.instance_type_name}): {_explained(each.details or '')}": None
        for each in status.failed_launches
    }
    return list(lines)


def _explained(details: str) -> str:
    """Give a provider's message, with the remedy where it is a known one."""
    advice = next((text for code, text in _ADVICE.items() if code in details), None)
    message = first_line(Exception(details))
    return f"{message}; {advice}" if advice else message
