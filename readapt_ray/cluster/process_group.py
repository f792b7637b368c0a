"""Form the process group that workers train in."""

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch.config import TorchConfig, _TorchBackend


class StartError(Exception):
    """Workers failed before their work began."""


@dataclass
class ProcessGroupConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's configuration of the process group, with a backend that works across nodes.

    Left to itself Gloo takes the address of the host's name, and many systems say 127.0.1.1 there
    (Debian's /etc/hosts): workers of two nodes then never meet.
    """

    monitor: Any = None
    """Told the placement group of each start."""

    @property
    def backend_cls(self) -> type["ProcessGroupBackend"]:
        """The class that sets the workers up."""
        return ProcessGroupBackend


class ProcessGroupBackend(_TorchBackend):  # type: ignore[misc]
    """Set the workers up; runs in Ray Train's controller."""

    def on_start(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:
        """Form the process group.

        Raises:
            StartError: it cannot be formed. Ray Train (2.60) itself starts the workers again where one is lost
                but beside the placement group of the first, and waits for room without end; this error ends it.
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
    """Set Gloo's network to the one by which Ray knows this node, unless GLOO_SOCKET_IFNAME is set."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address and each.family in (socket.AF_INET, socket.AF_INET6) for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
