"""Form the process group of training workers, on networks of several nodes too."""

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch.config import TorchConfig, _TorchBackend


class StartError(Exception):
    """The workers' process group could not be formed."""


@dataclass
class ProcessGroupConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's configuration of the process group, with a network address that works across nodes.

    By default Gloo uses the address of the host name, which is 127.0.1.1 on many systems (Debian's /etc/hosts). Workers
    of two nodes then never connect.
    """

    monitor: Any = None
    """The `RunMonitor` actor, which is told the placement group of each start."""

    @property
    def backend_cls(self) -> type["ProcessGroupBackend"]:
        """Return the class that sets up the workers."""
        return ProcessGroupBackend


class ProcessGroupBackend(_TorchBackend):  # type: ignore[misc]
    """Sets up the workers; runs in Ray Train's controller."""

    def on_start(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:
        """Choose each worker's network interface, then form the process group.

        Raises:
            StartError: the group cannot be formed. If a worker is lost here, Ray Train (2.60) would restart the workers
                without freeing their first placement group, and wait for room forever; this error prevents that.
        """
        handle = worker_group.get_worker_group_state().placement_group_handle
        ray.get(backend_config.monitor.hold.remote(handle.placement_group))
        try:
            worker_group.execute(choose_interface)
            super().on_start(worker_group, backend_config)
        except Exception as error:
            raise StartError(
                f"the workers' process group did not form (`readapt doctor --cluster` tests the network): {error}"
            ) from error


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME to the network interface with Ray's address of this node, unless it is set.

    Call it in a process that is connected to Ray, before the process group is formed. If no interface has the address,
    nothing is set.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address and each.family in (socket.AF_INET, socket.AF_INET6) for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
