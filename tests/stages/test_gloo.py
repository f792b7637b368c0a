"""Which network Gloo takes."""

import os
import socket
from types import SimpleNamespace

import psutil
import pytest
import ray

from readapt_ray.stages.gloo import choose_interface

INTERFACES = {
    "lo": [SimpleNamespace(family=socket.AF_INET, address="127.0.0.1")],
    "eth0": [
        SimpleNamespace(family=psutil.AF_LINK, address="10.1.2.3"),  # an address of hardware
        SimpleNamespace(family=socket.AF_INET, address="10.9.9.9"),
    ],
    "eth1": [SimpleNamespace(family=socket.AF_INET, address="10.1.2.3")],
    "eth2": [SimpleNamespace(family=socket.AF_INET6, address="fd00::1")],
}


@pytest.mark.parametrize(
    ("address", "already", "wanted"),
    [
        ("10.1.2.3", None, "eth1"),
        ("127.0.0.1", None, "lo"),
        ("fd00::1", None, "eth2"),
        ("10.1.2.3", "eth7", "eth7"),
        ("10.5.5.5", None, None),
    ],
)
def test_the_one_that_ray_knows_its_node_by(monkeypatch, address, already, wanted):
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: INTERFACES)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if already:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", already)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    choose_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == wanted
