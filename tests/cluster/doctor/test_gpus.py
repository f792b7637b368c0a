"""GPUs, by an nvidia-smi and a torch of our own."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.cluster import connection, on_worker
from readapt_ray.cluster.doctor import gpus
from readapt_ray.errors import PlacementError
from readapt_ray.serving import workers


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine whose nvidia-smi and torch say this."""

    def with_these(*rows: str, cuda: str | None = "13.0", count: int | None = None, works: bool = True) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\ncat <<EOF\n" + "\n".join(rows) + "\nEOF\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr("readapt_ray.cluster.gpus._ANSWERS_S", 300.0)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: works and cuda is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(rows) if count is None else count)

    return with_these


H100 = "NVIDIA H100 80GB HBM3, 580.65.06, 81559, 1"


def test_gpus_that_all_agree_on(machine: Any) -> None:
    machine(H100, H100)
    for wanted in (2, None):
        found = gpus.check_gpus(wanted)
        assert found.shown == "2 x NVIDIA H100 80GB HBM3, driver 580.65.06"
        assert not found.problems


def test_a_driver_that_hangs_is_said_and_not_waited_for(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(H100)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 3600\n")
    monkeypatch.setattr("readapt_ray.cluster.gpus._ANSWERS_S", 0.2)
    with pytest.raises(PlacementError, match=r"nvidia-smi did not answer within 0.2 s, .* restart the machine"):
        gpus.check_gpus(1)


@pytest.mark.parametrize(
    ("says", "wanted", "text", "fails"),
    [
        (
            ([H100.replace("580.65.06", "550.54.15")], {"works": False}),
            1,
            "driver 550.54.15 is too old .* install driver 580",
            True,
        ),
        (([H100], {"cuda": None}), 1, r"torch .* cannot use GPUs; install a build for CUDA", True),
        (([H100, H100], {"count": 1}), 2, "torch sees 1 of 2 GPUs; look with nvidia-smi", True),
        (([H100], {"works": False}), 1, "torch sees 0 of 1 GPUs; look with nvidia-smi", True),
        (([], {}), 4, r"Ray gives 4 GPUs to workers here and nvidia-smi lists none; .* --gpus all", True),
        (([H100], {}), 0, "1 GPUs are not used, since Ray has none here; start Ray with --num-gpus=1", False),
        (([H100.replace(", 1", ", 40000")], {}), 1, r"memory is in use on GPU 0 \(40,000 of 81,559 MiB\); end", False),
    ],
)
def test_what_is_wrong_is_one_line(
    machine: Any, says: tuple[list[str], dict[str, Any]], wanted: int, text: str, fails: bool
) -> None:
    machine(*says[0], **says[1])
    (problem,) = gpus.check_gpus(wanted).problems
    assert problem.fails is fails
    assert re.search(text, problem.text), problem.text


def test_a_machine_without_gpus_has_no_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for wanted in (0, None):
        assert gpus.check_gpus(wanted) == gpus.Finding("none")


OLD = H100.replace("580.65.06", "550.54.15")


def test_a_run_refuses_nodes_whose_gpus_torch_cannot_use(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On KubeRay and Slurm nothing else looks at the driver."""
    asked: list[tuple[tuple[int, ...], int]] = []

    def answers(nodes: Any, function: Any, *args: int, max_calls: int = 0) -> dict[str, Any]:
        asked.append((args, max_calls))
        return {node["at"]: function(*args) for node in nodes}

    monkeypatch.setattr(connection, "_on_each", answers)
    nodes = [{"at": "10.0.0.1", "Resources": {"CPU": 16.0}}, {"at": "10.0.0.2", "Resources": {"GPU": 1.0}}]
    machine(H100)
    connection.check_alike(nodes)
    machine(OLD, works=False)
    with pytest.raises(PlacementError, match=r"GPUs cannot be used: 10\.0\.0\.2: driver 550\.54\.15 is too old"):
        connection.check_alike(nodes)
    assert asked == [((), 0), ((1,), 1)] * 2, "only nodes with GPUs, in processes that no worker of one GPU takes over"


def test_a_worker_that_has_a_gpu_never_falls_back_to_the_cpu(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, list[str]] = {"GPU": ["0"]}
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_accelerator_ids=lambda: given))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.2")
    machine(H100)
    on_worker.check_node()
    machine(OLD, works=False)
    with pytest.raises(PlacementError, match=r"node 10\.0\.0\.2: driver 550\.54\.15 is too old for torch"):
        on_worker.check_node()
    given["GPU"] = []
    on_worker.check_node()


@pytest.mark.parametrize(
    ("assigned", "mode", "share"),
    [
        ({"GPU": 0.25, "CPU": 4.0}, ray.WORKER_MODE, 0.25),
        ({"GPU": 2.0}, ray.WORKER_MODE, 1.0),
        ({"CPU": 1.0}, ray.WORKER_MODE, 1.0),
        ({"GPU": 0.25}, ray.SCRIPT_MODE, 1.0),
    ],
)
def test_a_worker_takes_as_much_of_a_gpus_memory_as_ray_gave_it_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, assigned: dict[str, float], mode: int, share: float
) -> None:
    """Seen so in Ray 2.60, in tasks, actors and placement groups; a driver may not ask."""
    context = SimpleNamespace(get_assigned_resources=lambda: assigned, worker=SimpleNamespace(mode=mode))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert on_worker.gpu_share() == share
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert on_worker.gpu_share() == 1.0


def test_a_process_without_ray_may_take_a_whole_gpu_and_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "get_runtime_context", None)
    assert on_worker.gpu_share() == 1.0


def test_encoders_are_loaded_with_their_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In `embed`, `search` and `serve`, with and without domains."""
    shares = []

    def note(*_: Any, gpu_share: float, **__: Any) -> None:
        shares.append(gpu_share)

    monkeypatch.setattr(on_worker, "gpu_share", lambda: 0.25)
    for name in ("check_node", "check_same_model", "open_model"):
        monkeypatch.setattr(on_worker, name, lambda *_, **__: None)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setattr("readapt_ray.retrieval.encoder.Encoder.load", note)
    options: dict[str, Any] = {"expected": "", "driver_node": "", "num_threads": 1, "batch_tokens": None}
    on_worker.load_encoder("x", Encoding(pooling="mean", add_bos=True, add_eos=True), "float32", **options)
    spec: Any = SimpleNamespace(encoding=None, dtype="float32", batch_tokens=None, base="b", max_domain_bytes=1)
    workers._encoder(spec, spec)
    monkeypatch.setattr(workers, "DomainEncoder", note)
    monkeypatch.setattr(workers, "open_model", lambda _: None)
    monkeypatch.setattr(workers, "check_domains", lambda *_: None)
    record = SimpleNamespace(retriever_fingerprint="")
    monkeypatch.setattr(workers, "read_domains", lambda _: [record])
    workers._domain_encoder(spec, SimpleNamespace(name="x"))  # type: ignore[arg-type]
    assert shares == [0.25] * 3
