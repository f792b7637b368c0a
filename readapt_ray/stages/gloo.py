"""Gloo, for workers on CPUs, over the network that Ray's nodes reach each other by.

Left to itself Gloo takes the address that the host's name stands for, and many systems say 127.0.1.1 there (Debian's
/etc/hosts): workers of two nodes then never meet.
"""

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch.config import TorchConfig, _TorchBackend


@dataclass
class GlooConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's configuration for it."""

    backend: str | None = "gloo"

    @property
    def backend_cls(self) -> type["_GlooBackend"]:
        """What sets the workers up."""
        return _GlooBackend


class _GlooBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """On a worker: that of the address by which Ray knows its node, unless GLOO_SOCKET_IFNAME says otherwise."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address and each.family in (socket.AF_INET, socket.AF_INET6) for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
