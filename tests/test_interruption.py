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
import yaml
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


@pytest.fixture(scope="module")
def with_general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a smaller experiment, which measures a general collection, too."""
    folder = tmp_path_factory.mktemp("with_general")
    train = {"block_tokens": 128, "batch_size": 64, "num_workers": 1, "num_cpus_per_worker": 1}
    file = factories.run_file(folder, num_passages=120, num_queries=10, train=train)
    passages = factories.small_corpus(1500)
    made = factories.ingest_artifact(folder / "other", passages, *factories.small_queries(passages, 10))
    place = made.location.local_path
    general = {"source": f"{place}/passages", "queries": f"{place}/queries", "qrels": f"{place}/qrels"}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"general": general}))
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


def hit(
    experiment: Path, root: Path, stage: str, sent: signal.Signals, after_s: float, *, to_group: bool = False
) -> tuple[int, str]:
    """Run, and send a signal some time after the stage, or the step of this output, began; exit code and output."""
    process = start(experiment, root)
    assert process.stdout is not None
    said, ray_processes = [], []

    def send() -> None:
        ray_processes.extend(psutil.Process(process.pid).children(recursive=True))
        (os.killpg if to_group else os.kill)(process.pid, sent)

    for line in process.stdout:
        said.append(line)
        if f"] {stage} ->" in line or line.endswith(f"-> {root / stage}\n"):
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


GENERAL = ("corpus", "vectors/retriever", "vectors/adapted", "runs/retriever.trec", "runs/adapted.trec", "report")


def test_a_run_resumes_in_the_middle_of_its_general_collection(with_general: Path) -> None:
    expected = with_general / "undisturbed"
    finish(with_general, expected)
    root = with_general / "stopped"
    signals = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT)
    for number, name in enumerate(GENERAL):
        sent = signals[number % 3]
        after_s = 8.0 if name.startswith("vectors") else 0.2
        code, out = hit(with_general, root, f"general/{name}", sent, after_s, to_group=sent != signal.SIGKILL)
        assert code in ({signal.SIGTERM: 143, signal.SIGKILL: -9, signal.SIGINT: 130}[sent], 0), (name, out)
        assert code or name != "vectors/retriever", "it was hit"
        if code > 0:
            assert out.count("readapt: ") == 1, out
            assert out.endswith("run the same command again and it resumes where it stopped\n"), out
    out = finish(with_general, root)
    assert "general/report" in out
    for name in ("vectors/retriever/vectors", "vectors/adapted/vectors"):
        tables = [pq.read_table(each / "general" / name).to_pydict() for each in (expected, root)]
        assert tables[0] == tables[1]
    for name in ("general/runs/adapted.trec", "general/report/measures.json", "report/measures.json"):
        assert (root / name).read_text() == (expected / name).read_text()


def test_timeout_ends_a_run_with_one_line(experiment: Path) -> None:
    for stage, after_s in (("pack", 6.0), ("train", 15.0), ("embed", 10.0)):
        code, out = hit(experiment, experiment / "group", stage, signal.SIGTERM, after_s, to_group=True)
        assert code in (143, 0), out
        if code:
            assert out.split("\n")[-3:] == [
                "",
                "readapt: terminated; run the same command again and it resumes where it stopped",
                "",
            ]
