"""`readapt run` under Ctrl-C, SIGTERM and SIGKILL of the driver, in a process of its own with a Ray of its own."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from tests import factories

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
REPOSITORY = Path(__file__).parent.parent
STAGES = ("ingest", "pack", "train", "merge", "embed", "index", "search", "evaluate")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file on a tiny model and a corpus with judgements."""
    folder = tmp_path_factory.mktemp("experiment")
    train = {
        "mode": "packed",
        "block_tokens": 128,
        "batch_size": 16,
        "num_workers": 1,
        "num_cpus_per_worker": 1,
        "checkpoint_every_s": 0,
    }
    factories.run_file(folder, num_passages=3000, num_queries=40, train=train, ingest={"rows_per_file": 1000})
    return folder


def start(experiment: Path, root: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "READAPT_NUM_CPUS": "2", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "readapt_ray.cli", "run", "--config", str(experiment / "run.yaml"), "--root", str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env=environment,
        start_new_session=True,
    )


def hit(experiment: Path, root: Path, stage: str, sent: signal.Signals, after_s: float) -> tuple[int, str]:
    """Run, and send a signal some time after the stage began; exit code and output."""
    process = start(experiment, root)
    assert process.stdout is not None
    said, ray_processes = [], []

    def send() -> None:
        ray_processes.extend(psutil.Process(process.pid).children(recursive=True))
        os.kill(process.pid, sent)

    for line in process.stdout:
        said.append(line)
        if f"] {stage} ->" in line:
            threading.Timer(after_s, send).start()
    code = process.wait(timeout=120)
    for left in psutil.wait_procs(ray_processes, timeout=30)[1]:
        left.kill()
    return code, "".join(said)


def finish(experiment: Path, root: Path) -> str:
    process = start(experiment, root)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return out


def content(root: Path) -> dict[str, object]:
    """What a run made, without times."""
    found: dict[str, object] = {}
    for name in ("adapter/adapter_model", "adapted/model"):
        found[name] = {key: value.tobytes() for key, value in load_file(root / f"{name}.safetensors").items()}
    for name in ("corpus/passages", "blocks/blocks", "vectors/retriever/vectors", "vectors/adapted/vectors"):
        found[name] = pq.read_table(root / name).to_pydict()
    for name in ("runs/retriever.trec", "runs/adapted.trec", "report/measures.json"):
        found[name] = (root / name).read_text()
    return found


@pytest.fixture(scope="module")
def undisturbed(experiment: Path) -> dict[str, object]:
    root = experiment / "undisturbed"
    out = finish(experiment, root)
    assert "nDCG@10" in out
    return content(root)


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_every_stage_and_then_the_same_command(
    experiment: Path, undisturbed: dict[str, object], sent: signal.Signals, expected: int
) -> None:
    root = experiment / sent.name
    for stage in STAGES:
        code, out = hit(experiment, root, stage, sent, 0.7 if stage not in ("train", "embed") else 12.0)
        assert code in (expected, 0), (stage, out)
        if code == expected:
            assert "run the same command again" in out
            assert "Traceback" not in out, out
            assert "stack trace" not in out.lower(), out
    finish(experiment, root)
    assert content(root) == undisturbed


def test_a_driver_killed_while_training_and_embedding(experiment: Path, undisturbed: dict[str, object]) -> None:
    root = experiment / "killed"
    for stage, after_s in (("train", 14.0), ("embed", 8.0)):
        code, out = hit(experiment, root, stage, signal.SIGKILL, after_s)
        assert code in (-signal.SIGKILL, 0), (stage, out)
    finish(experiment, root)
    assert content(root) == undisturbed
