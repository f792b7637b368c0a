"""Define the actor that runs the checks of its node and exchanges data with other nodes."""

import dataclasses
import importlib
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from readapt_ray.cluster.doctor.findings import Finding
from readapt_ray.cluster.doctor.machine import CheckOptions, check_machine
from readapt_ray.errors import WorkerError
from readapt_ray.progress import amount

Address = tuple[str, int]

_NCCL_BYTES, _GLOO_BYTES = 256 << 20, 8 << 20
_NUM_EXCHANGES = 3


@dataclass(frozen=True)
class Exchange:
    """Backend and bandwidth of a measured all-reduce."""

    backend: str
    bytes_per_s: float
    """Bandwidth per direction of a ring of n workers: 2 (n - 1) / n * bytes / seconds (NCCL's bus bandwidth)."""


class Inspector:
    """An actor that checks its node. It reserves a GPU only if it joins a process group of GPUs."""

    def __init__(self) -> None:
        self._listening: Any = None
        self._store: Any = None

    def examine(self, options: CheckOptions) -> dict[str, Finding]:
        """Run the checks of this node; return their findings by column of the report.

        The `ray_folder` of the options is replaced by this node's.
        """
        import ray

        session = ray._private.worker._global_node.get_session_dir_path()
        return check_machine(dataclasses.replace(options, ray_folder=session))

    def load_torch(self) -> None:
        """Import what `all_reduce` needs while other checks run: imports may take longer than the all-reduce."""
        importlib.import_module("torch.distributed")
        importlib.import_module("readapt_ray.cluster.process_group")

    def now(self) -> float:
        """Return this node's clock, in Unix seconds."""
        return time.time()

    def listen(self) -> Address:
        """Start accepting TCP connections; return the host and port."""
        import ray

        host = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family, backlog=1024)
        return host, int(self._listening.getsockname()[1])

    def unreachable(self, addresses: Sequence[Address], limit_s: float) -> list[int]:
        """Connect to all addresses at the same time; return the indices of those not reached within `limit_s` seconds.

        The list is ascending, and empty if all were reached.
        """
        reached: set[int] = set()

        def connect(place: int) -> None:
            try:
                with socket.create_connection(addresses[place], timeout=limit_s):
                    reached.add(place)
            except OSError:
                pass

        threads = [threading.Thread(target=connect, args=(place,), daemon=True) for place in range(len(addresses))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(limit_s)
        return sorted(set(range(len(addresses))) - reached)

    def open_store(self, num_workers: int, limit_s: float) -> Address:
        """Open the TCP store through which workers find each other; return its host and port.

        The worker that opens it must stay alive until all workers have finished `all_reduce`.

        Args:
            num_workers: number of workers in the group.
            limit_s: timeout of the store, in seconds.
        """
        import ray
        import torch

        host = ray.util.get_node_ip_address()
        limit = timedelta(seconds=limit_s)
        distributed: Any = torch.distributed  # its annotations lack TCPStore
        self._store = distributed.TCPStore(host, 0, num_workers, is_master=True, timeout=limit, wait_for_workers=False)
        return host, int(self._store.port)

    def all_reduce(self, worker_rank: int, num_workers: int, meeting: Address, limit_s: float) -> Exchange:
        """Sum a tensor over all workers, as training sums gradients, and measure the bandwidth.

        All workers must call it at the same time, once. It uses NCCL (256 MiB) where torch sees a GPU, else Gloo (8
        MiB).

        Args:
            worker_rank: rank of this worker, from 0; the worker that opened the store has rank 0.
            num_workers: number of workers in the group.
            meeting: address of the store, from `open_store`.
            limit_s: timeout of the group, in seconds.

        Raises:
            RuntimeError: the group did not form in time.
            WorkerError: the sum is wrong.
        """
        import torch

        from readapt_ray.cluster.process_group import choose_interface

        choose_interface()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        device = "cuda" if backend == "nccl" else "cpu"
        distributed: Any = torch.distributed
        limit = timedelta(seconds=limit_s)
        store = self._store or distributed.TCPStore(*meeting, num_workers, is_master=False, timeout=limit)
        distributed.init_process_group(backend, store=store, rank=worker_rank, world_size=num_workers, timeout=limit)
        num_bytes = _NCCL_BYTES if backend == "nccl" else _GLOO_BYTES
        tensor = torch.ones(num_bytes // 4, device=device)
        distributed.all_reduce(tensor)
        if float(tensor.min()) != num_workers or float(tensor.max()) != num_workers:
            raise WorkerError(f"the sum over {amount(num_workers, 'workers')} is wrong")
        started_s = time.monotonic()
        for _ in range(_NUM_EXCHANGES):
            distributed.all_reduce(tensor)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = (time.monotonic() - started_s) / _NUM_EXCHANGES
        return Exchange(backend, 2 * (num_workers - 1) / num_workers * num_bytes / seconds)
