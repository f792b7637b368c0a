"""Makes every training worker write down the passages of each step before it takes it; found through PYTHONPATH.

A line a step in `$CHAOS_LEDGER/<process>.jsonl`. Nothing of the package is asked, or knows of it: the lines are of
what `DeepSpeedEngine.step` was given. A passage is known by a digest of its tokens.
"""

import hashlib
import importlib.abc
import importlib.machinery
import itertools
import json
import os
import sys
import time
from pathlib import Path

_WATCHED = "readapt_ray.training.engine"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != _WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            _watch(module.DeepSpeedEngine)

        spec.loader.exec_module = exec_module
        return spec


def digest_of(tokens):
    return hashlib.blake2b(" ".join(map(str, tokens)).encode(), digest_size=8).hexdigest()


def _with_loss(batch):
    """The digest of each passage of a batch that bears loss, which the padding does not."""
    ends = batch.passage_ends.tolist()
    for start, end in itertools.pairwise(ends):
        if (batch.labels[0, start:end] >= 0).any():
            yield digest_of(batch.input_ids[0, start:end].tolist())


def _watch(engine):
    take_step = engine.step
    group = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    ledger = Path(os.environ["CHAOS_LEDGER"]) / f"{time.time_ns()}-{os.getpid()}.jsonl"

    def step(self, parts, *, loss_of, rate, step):
        passages = [digest for batch, weight in parts if weight for digest in _with_loss(batch)]
        line = {"group": group, "time": time.time(), "step": step, "rank": self.worker_rank, "passages": passages}
        with ledger.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return take_step(self, parts, loss_of=loss_of, rate=rate, step=step)

    engine.step = step


if "CHAOS_LEDGER" in os.environ:
    sys.meta_path.insert(0, _Finder())
