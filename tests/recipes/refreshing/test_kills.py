"""A refresh or a clean that ends at any moment: readers have the old state or the new one, and the next start goes on.

In the first test a process "dies" before each of its writes and deletions in turn: from there on none succeeds.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from readapt_ray import artifacts, generations
from readapt_ray.generations import STAGE_OF, Generation
from readapt_ray.recipes.refreshing.clean import clean
from readapt_ray.recipes.refreshing.lock import LOCK_NAME
from readapt_ray.recipes.refreshing.options import CleanConfig
from readapt_ray.storage import Location
from tests import factories
from tests.recipes.refreshing import root as roots
from tests.recipes.refreshing.root import Root, StandIns

PASSAGES = factories.small_corpus(40)
NOW = [*PASSAGES[4:30], PASSAGES[30]._replace(title="changed"), *PASSAGES[31:], PASSAGES[0]._replace(doc_id="new")]
OLD_IDS, NEW_IDS = {each.doc_id for each in PASSAGES}, {each.doc_id for each in NOW}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return roots.models(tmp_path_factory.mktemp("models"))


class _Dead(BaseException):
    """The process has been killed."""


class Mortal:
    """Lets writes and deletions succeed until a number of them, and none after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.last = 0, sys.maxsize
        for name in ("_publish", "delete", "create_text"):
            monkeypatch.setattr(Location, name, self._until_death(getattr(Location, name)))

    def _until_death(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            self.count += 1
            if self.count > self.last:
                raise _Dead
            return method(*given)

        return call


def each_death(mortal: Mortal, work: Callable[[], Any], begin: Callable[[], None]) -> Iterator[int]:
    """Do the work again and again, dying one write later each time, until it succeeds."""
    for number in range(1000):
        mortal.last = sys.maxsize
        begin()
        mortal.count, mortal.last = 0, number
        try:
            work()
        except _Dead:
            mortal.last = sys.maxsize
            yield number
            continue
        return
    pytest.fail("it never ends")


def ids_of_one_state(root: Root, generation: Generation) -> set[str]:
    """The ids of a generation; corpus, vectors and index have the same ones."""
    for name in generation.artifacts:
        artifacts.open_artifact(generation.folder(root.location, name), STAGE_OF[name])
    ids = root.passages(generation).keys()
    assert root.vectors(generation).keys() == ids
    index = artifacts.open_artifact(generation.folder(root.location, "index"), "index")
    vectors = artifacts.open_artifact(generation.folder(root.location, "vectors"), "embed")
    assert index.manifest.inputs["vectors"] == vectors.fingerprint
    return set(ids)


@pytest.fixture
def base(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """A root with one generation, and a source that changed since."""
    StandIns(monkeypatch)
    root = Root(tmp_path / "base", models / "model")
    root.folder.mkdir()
    root.holds(PASSAGES)
    root.refresh()
    root.holds(NOW)
    return root


@pytest.mark.parametrize("to", [None, "collection"])
def test_a_refresh_may_die_before_any_write(base: Root, monkeypatch: pytest.MonkeyPatch, to: str | None) -> None:
    mortal = Mortal(monkeypatch)
    root = Root(base.folder.with_name("copy"), base.model)

    def begin() -> None:
        shutil.rmtree(root.folder, ignore_errors=True)
        shutil.copytree(base.folder, root.folder)

    options = {} if to is None else {"to": f"files:{root.folder}/{to}"}
    source = str(root.source)
    num_deaths = 0
    for number in each_death(mortal, lambda: root.refresh(source=source, **options), begin):
        num_deaths += 1
        present = root.there()[-1]
        assert ids_of_one_state(root, present) == (OLD_IDS if present.number == 1 else NEW_IDS), number
        made = root.refresh(source=source, **options)
        assert made.number == 2 and ids_of_one_state(root, made) == NEW_IDS, number
        assert (made.counts["added"], made.counts["changed"], made.counts["deleted"]) == (1, 1, 4), number
        assert not (Path(root.uri) / LOCK_NAME).exists(), number
        assert root.refresh() == root.there()[-1] == made, number
    assert num_deaths > 10


def test_a_clean_may_die_before_any_write(base: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    base.refresh()
    mortal = Mortal(monkeypatch)
    root = Root(base.folder.with_name("copy"), base.model)

    def begin() -> None:
        shutil.rmtree(root.folder, ignore_errors=True)
        shutil.copytree(base.folder, root.folder)

    num_deaths = 0
    for number in each_death(mortal, lambda: clean(CleanConfig(root=root.uri, yes=True)), begin):
        num_deaths += 1
        assert ids_of_one_state(root, root.there()[-1]) == NEW_IDS, number
        clean(CleanConfig(root=root.uri, yes=True))
        assert ids_of_one_state(root, root.there()[-1]) == NEW_IDS, number
        assert root.files_with({"text": PASSAGES[1].text.encode()}) == [], number
        assert clean(CleanConfig(root=root.uri)).text() == "nothing to free", number
    assert num_deaths > 10


@pytest.mark.parametrize("seed", [0, 1])
def test_a_refresh_that_is_killed_goes_on(base: Root, seed: int) -> None:
    with started(base) as process:
        wait_until_ready(process)
        tell(process)
        time.sleep(random.Random(seed).uniform(0, 1.5))
        process.kill()
    present = base.there()[-1]
    assert ids_of_one_state(base, present) == (OLD_IDS if present.number == 1 else NEW_IDS)
    made = base.refresh()
    assert made.number == 2 and ids_of_one_state(base, made) == NEW_IDS


def test_of_several_refreshes_at_once_one_works_at_a_time(base: Root) -> None:
    processes = [started(base), started(base)]
    for each in processes:
        wait_until_ready(each)
    for each in processes:
        tell(each)
    ended = [(each.communicate()[1], each.returncode) for each in processes]
    assert any(code == 0 for _, code in ended)
    assert all(code == 0 or "is writing" in error for error, code in ended), ended
    assert [each.number for each in base.there()] == [1, 2]
    assert ids_of_one_state(base, base.there()[-1]) == NEW_IDS


def started(root: Root) -> "subprocess.Popen[str]":
    """A process that will refresh."""
    command = [sys.executable, "-m", "tests.recipes.refreshing.killed", str(root.folder), str(root.model)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, **pipes)


def wait_until_ready(process: "subprocess.Popen[str]") -> None:
    """Return once it has imported all that it needs."""
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def tell(process: "subprocess.Popen[str]") -> None:
    """Let it begin."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ray_session")
def test_refreshes_by_the_real_stages_are_killed_ten_times(tmp_path: Path, models: Path) -> None:
    import ray

    root = Root(tmp_path, models / "model")
    root.holds(PASSAGES)
    first = root.refresh(embed={"batch_tokens": 1, "num_workers": 1, "rows_per_shard": 8})
    before = root.vectors(first)
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    for seed in range(10):
        root.holds(corpus_of(seed))
        there = root.there()[-1]
        command = [sys.executable, "-m", "readapt_ray.cli", "refresh", "--root", root.uri]
        with subprocess.Popen(command, env=environment) as process:
            _wait_for_first_write(root, process)
            time.sleep(random.Random(seed).uniform(0, 15))
            process.send_signal(signal.SIGKILL)
        present = generations.as_of(root.location, None)
        assert present.number in (there.number, there.number + 1)
        ids_of_one_state(root, present)
        made = root.refresh()
        assert made.number == there.number + 1
        assert ids_of_one_state(root, made) == {each.doc_id for each in corpus_of(seed)}
        same = {each.doc_id for each in corpus_of(seed) if each in PASSAGES}
        assert {each: root.vectors(made)[each] for each in same} == {each: before[each] for each in same}


def corpus_of(seed: int) -> list[factories.Passage]:
    """The corpus of a seed."""
    draw = random.Random(seed)
    now = [each._replace(text=f"{each.text} {seed}") if draw.random() < 0.2 else each for each in PASSAGES]
    return draw.sample(now, 36)


def _wait_for_first_write(root: Root, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None and not (Path(root.uri) / LOCK_NAME).exists():
        time.sleep(0.05)
