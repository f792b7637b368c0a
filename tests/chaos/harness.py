"""Runs the main job on three nodes, kills at seeded moments, resumes, and compares with an undisturbed run."""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from safetensors.numpy import load_file

from tests import factories, small_disk
from tests.chaos.network import Network
from tests.chaos.nodes import REPOSITORY, Cluster
from tests.chaos.witness.sitecustomize import digest_of

KINDS = ("worker", "raylet", "node", "driver", "disk", "cluster")
"""What is drawn; `cut-off` is for a network only."""
STEPS = ("corpus", "blocks", "adapter", "adapted", "vectors/retriever", "index/retriever", "vectors/adapted", "index/adapted")  # fmt: skip
_WEIGHTS = (1, 1, 4, 1, 2, 1, 2, 1)
NUM_PASSAGES, NUM_EPOCHS = 480, 2
_HANG_S = 400.0
_FULL_S = 8.0
_MAX_SUBMISSIONS = 8
_POLL_S = 0.05


@dataclass(frozen=True, order=True)
class Event:
    """What happens, and when: in which step, after which share of the time that it takes undisturbed."""

    place: int
    share: float
    kind: str


def drawn(seed: int, *, can_fill: bool) -> list[Event]:
    """One to three events. The kinds of the first ones take turns over the seeds."""
    rng = random.Random(seed)
    kinds = [KINDS[seed % len(KINDS)], *rng.choices(KINDS, k=rng.randrange(3))]
    places = rng.choices(range(len(STEPS)), weights=_WEIGHTS, k=len(kinds))
    events = [Event(place, round(rng.random(), 3), kind) for place, kind in zip(places, kinds, strict=True)]
    return sorted(event for event in events if can_fill or event.kind != "disk")


@dataclass
class Outcome:
    """What one run saw, beside what it left."""

    seconds: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)
    submissions: int = 0
    messages: list[str] = field(default_factory=list)
    """Last lines of drivers that ended with an error while something of theirs was gone or full."""
    began_s: dict[str, float] = field(default_factory=dict)
    """When each step was first reached."""
    num_steps: int = 0
    """Steps that are complete at the end."""

    def durations_s(self) -> dict[str, float]:
        """How long each step took; of an undisturbed run."""
        ends = [*list(self.began_s.values())[1:], self.seconds]
        return {name: end - began for (name, began), end in zip(self.began_s.items(), ends, strict=True)}


class Harness:
    """A cluster, a disk and the run file.

    Args:
        work: folder for all of it; the roots lie in `work/disk`.
        network: gives the nodes networks of their own, so that one can be cut off.
    """

    def __init__(self, work: Path, network: Network | None = None) -> None:
        self.disk, self._ledger, self._calm = work / "disk", work / "ledger", work / "calm"
        self.root = self.disk
        self.disk.mkdir(parents=True, exist_ok=True)
        self._ledger.mkdir(parents=True, exist_ok=True)
        (work / "logs").mkdir(exist_ok=True)
        self.run_file = _experiment(work / "experiment")
        paths = [str(REPOSITORY / "tests/chaos/witness"), str(REPOSITORY)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "CHAOS_LEDGER": str(self._ledger),
            "OMP_NUM_THREADS": "1",
        }
        self._cluster = Cluster(work / "logs", environment, network)

    def close(self) -> None:
        """End the cluster."""
        self._cluster.stop()

    def keep_calm(self) -> None:
        """Keep what an undisturbed run left, for runs that are disturbed only later."""
        shutil.rmtree(self._calm, ignore_errors=True)
        shutil.copytree(self.root, self._calm / "root")
        shutil.copytree(self._ledger, self._calm / "ledger")

    def _prepare(self, num_steps: int) -> None:
        """A new root that holds the first steps of the undisturbed run."""
        if self.root != self.disk:
            shutil.rmtree(self.root, ignore_errors=True)
        self.root = self.disk / f"root-{time.time_ns()}"
        for old in self._ledger.iterdir():
            old.unlink()
        for name in STEPS[:num_steps]:
            shutil.copytree(self._calm / "root" / name, self.root / name)
        if "adapter" in STEPS[:num_steps]:
            shutil.copytree(self._calm / "ledger", self._ledger, dirs_exist_ok=True)

    def run(self, events: list[Event], duration_s: dict[str, float], seed: int, *, whole: bool = True) -> Outcome:
        """Submit the run until it succeeds, with these events on the way.

        Unless the whole is run, the steps before that of the first event are those of the undisturbed run, and the run
        ends with the step of the last event.
        """
        self._prepare(0 if whole else events[0].place)
        outcome, rng, pending = Outcome(), random.Random(seed), list(events)
        started_s = time.monotonic()
        while True:
            outcome.submissions += 1
            if outcome.submissions > _MAX_SUBMISSIONS:
                raise AssertionError(f"not done after {_MAX_SUBMISSIONS} submissions: {outcome}")
            driver = _Driver(self.run_file, self.root, self._cluster)
            try:
                was_killed = self._disturb(driver, pending, duration_s, rng, outcome, whole=whole)
            finally:
                driver.kill()
            for name, began_s in driver.began_s.items():
                outcome.began_s.setdefault(name, began_s - started_s)
            if driver.code == 0 or outcome.num_steps:
                break
            assert "Traceback" not in driver.said, driver.said
            if not was_killed:
                outcome.messages.append(driver.said.strip().splitlines()[-1])
        outcome.num_steps = outcome.num_steps or len(STEPS)
        outcome.seconds = round(time.monotonic() - started_s, 1)
        return outcome

    def _disturb(
        self,
        driver: "_Driver",
        pending: list[Event],
        duration_s: dict[str, float],
        rng: random.Random,
        outcome: Outcome,
        *,
        whole: bool,
    ) -> bool:
        """Let events happen until the driver ends; whether it was killed."""
        full_s, was_killed = None, False
        deadline_s = time.monotonic() + _HANG_S
        while not driver.has_ended():
            time.sleep(_POLL_S)
            self._cluster.mend()
            now_s = time.monotonic()
            if now_s > deadline_s:
                driver.kill()
                raise AssertionError(f"the driver hangs: {driver.said}")
            if full_s is not None and now_s - full_s > _FULL_S:
                small_disk.free(self.disk)
                full_s = None
            if not pending and not whole and full_s is None and driver.has_passed(outcome.events[-1]["step"]):
                outcome.num_steps = STEPS.index(driver.step)
                driver.kill()
                self._cluster.settle()
                return True
            if not pending or not driver.is_at(pending[0], duration_s):
                continue
            event = pending.pop(0)
            hit = self._happen(event.kind, driver, rng)
            was_killed = was_killed or event.kind in ("driver", "cluster")
            full_s = now_s if event.kind == "disk" else full_s
            outcome.events.append({"kind": event.kind, "step": driver.step, "share": event.share, "hit": hit})
        if full_s is not None:
            small_disk.free(self.disk)
        return was_killed

    def _happen(self, kind: str, driver: "_Driver", rng: random.Random) -> str:
        if kind == "worker":
            return self._cluster.kill_worker(rng)
        if kind == "raylet":
            return self._cluster.kill_raylet(rng)
        if kind == "node":
            return self._cluster.kill_node(rng)
        if kind == "cut-off":
            return self._cluster.cut_off(rng)
        if kind == "disk":
            small_disk.fill(self.disk)
            return "no byte left"
        driver.kill()
        if kind == "cluster":
            self._cluster.stop()
            self._cluster.start()
        return "driver and all nodes" if kind == "cluster" else "driver"

    def files_that_differ(self, num_steps: int) -> list[str]:
        """The files of the first steps, or of all, that are not as in the undisturbed run, or there and not here."""
        there, wanted = content(self.root), content(self._calm / "root")
        differ = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
        prefixes = tuple(f"{step}/" for step in STEPS[:num_steps])
        return differ if num_steps == len(STEPS) else [name for name in differ if name.startswith(prefixes)]

    def trained_as_wanted(self, num_steps: int) -> bool | None:
        """Whether every passage bore loss once an epoch; None where it was not yet trained."""
        if "adapter" not in STEPS[:num_steps]:
            return None
        wanted = passages_of(self.root / "blocks" / "blocks")
        assert wanted.total() > 0.9 * NUM_PASSAGES  # the others are withheld, to measure the loss
        return trained_on(self._ledger) == Counter({digest: NUM_EPOCHS * num for digest, num in wanted.items()})


class _Driver:
    """`readapt run` in a process of its own, and what it says."""

    def __init__(self, run_file: Path, root: Path, cluster: Cluster) -> None:
        joining = {"RAY_ADDRESS": cluster.address, "READAPT_NUM_NODES": "3", "READAPT_WAIT_S": "60"}
        command = [sys.executable, "-m", "readapt_ray.cli", "run", "--config", str(run_file), "--root", str(root)]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env={**cluster.environment, **joining},
            start_new_session=True,
        )
        self._root = str(root)
        self.began_s: dict[str, float] = {}
        self.step = "start"
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said += line
            if "] " in line and f" -> {self._root}/" in line:
                self.step = line.strip().partition(f" -> {self._root}/")[2]
                self.began_s[self.step] = time.monotonic()

    def is_at(self, event: Event, duration_s: dict[str, float]) -> bool:
        """Whether the moment of an event has come."""
        step = STEPS[event.place]
        if step in self.began_s and time.monotonic() - self.began_s[step] >= event.share * duration_s[step]:
            return True
        return any(later in self.began_s for later in STEPS[event.place + 1 :])

    def has_passed(self, step: str) -> bool:
        """Whether a step behind this one has begun."""
        return self.step in STEPS and STEPS.index(self.step) > STEPS.index(step)

    @property
    def code(self) -> int:
        return self._process.wait()

    def has_ended(self) -> bool:
        if self._process.poll() is None:
            return False
        self._reader.join(timeout=10)
        return True

    def kill(self) -> None:
        """Nothing happens where it has ended."""
        self._process.send_signal(signal.SIGKILL)


def _experiment(folder: Path) -> Path:
    """A run file whose stages are of some seconds each, with many files."""
    run_file = folder / "run.yaml"
    if not run_file.is_file():
        train = {
            "mode": "packed",
            "block_tokens": 128,
            "batch_size": 4,
            "num_epochs": NUM_EPOCHS,
            "num_workers": 2,
            "num_cpus_per_worker": 1,
            "lora_dropout": 0.1,
            "checkpoint_every_s": 0,
            "dtype": "float32",
        }
        factories.run_file(
            folder,
            num_passages=NUM_PASSAGES,
            num_queries=1,
            ingest={"rows_per_file": 80},
            train=train,
            embed={"rows_per_shard": 40, "dtype": "float32"},
            index={"rows_per_shard": 80},
        )
        options = yaml.safe_load(run_file.read_text())
        run_file.write_text(yaml.safe_dump({k: v for k, v in options.items() if k not in ("queries", "qrels")}))
    return run_file


def content(root: Path) -> dict[str, str]:
    """A digest of all that a run left, by name: tables by their rows and weights by their tensors, the rest by bytes.

    Footers of vectors hold times, and safetensors writes the entries of a header in any order.
    """
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if ".tmp-" in path.name:  # half written when its driver was killed
            found[name] = ""
        elif path.is_file() and path.suffix == ".parquet":
            found[name] = _digest(repr(pq.read_table(path).to_pydict()).encode())
        elif path.is_file() and path.suffix == ".safetensors":
            tensors = load_file(path)
            found[name] = _digest(b"".join(each.encode() + tensors[each].tobytes() for each in sorted(tensors)))
        elif path.is_file() and path.suffix == ".faiss":
            found[name] = _digest(path.read_bytes())
        elif path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            found[name] = _digest(json.dumps([manifest["fingerprint"], manifest["counts"]]).encode())
        elif path.is_file():
            found[name] = ""
    return found


def passages_of(blocks: Path) -> Counter[str]:
    """How often each passage is in blocks, by a digest of its tokens."""
    found: Counter[str] = Counter()
    for block in pq.read_table(blocks).to_pylist():
        ends = list(itertools.accumulate(block["passage_lengths"], initial=0))
        found.update(digest_of(block["input_ids"][start:end]) for start, end in itertools.pairwise(ends))
    return found


def trained_on(ledger: Path) -> Counter[Any]:
    """How often each passage bore loss, by what the workers themselves wrote down.

    A step that was taken again counts as it was taken last: what came of it before was lost with its workers.
    """
    lines = [json.loads(line) for file in ledger.iterdir() for line in file.read_text().splitlines()]
    last = {line["step"]: line["group"] for line in sorted(lines, key=lambda line: line["time"])}
    counted = {(line["step"], line["rank"]): line for line in lines if line["group"] == last[line["step"]]}
    return Counter(number for line in counted.values() for number in line["passages"])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
