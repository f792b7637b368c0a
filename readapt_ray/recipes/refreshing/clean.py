"""Remove earlier generations, and with them the last copies of deleted passages.

In: the generations under a root. Out: a list of what is (or would be) removed, and why. First, if vectors or index of the
present generation still hold deleted passages, they are written again without them, as a new generation.
"""

import dataclasses
import logging
import time
from collections.abc import Collection, Iterator, Set
from dataclasses import dataclass, replace

from readapt_ray import artifact_files, artifacts, generations, leases, outputs
from readapt_ray.artifact_files import LEASE_NAME, record_of
from readapt_ray.catalog import cache_entries
from readapt_ray.cluster.compaction import compact, num_dead
from readapt_ray.errors import InputError
from readapt_ray.evaluation.tables import aligned_table
from readapt_ray.generations import CORPUS, EXPORT, FOLDER_NAME, INDEX, STAGE_OF, VECTORS, Generation
from readapt_ray.progress import ProgressReporter, amount
from readapt_ray.recipes.chain import make
from readapt_ray.recipes.refreshing.lock import locked
from readapt_ray.recipes.refreshing.options import RULES, CleanConfig
from readapt_ray.recipes.refreshing.traces import Trace, derived_from, traces
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")


@dataclass(frozen=True)
class Freed:
    """The artifacts that `readapt clean` removes, or would remove."""

    root: str
    rows: list[dict[str, object]]
    """One row per artifact, with `artifact`, `stage`, `bytes` and `why`."""
    num_deleted: int
    """Number of deleted passages still in vectors or index of the present generation, which are written again."""
    is_done: bool
    """Whether it was removed; False if it is only listed."""

    def text(self) -> str:
        """Return the rows as a text table, and a sentence with the total."""
        lines = [("artifact", "stage", "bytes", "why")]
        lines += [(str(row["artifact"]), str(row["stage"]), f"{row['bytes']:,}", str(row["why"])) for row in self.rows]
        total = sum(int(str(row["bytes"])) for row in self.rows)
        verb = "freed" if self.is_done else "would free"
        what = (
            f"{verb} {amount(len(self.rows), 'artifacts')}, {amount(total, 'bytes')}"
            if self.rows
            else "nothing to free"
        )
        if self.num_deleted:
            held = "held" if self.is_done else "hold"
            written = "were" if self.is_done else "would be"
            passages = amount(self.num_deleted, "deleted passages")
            what += f"; files of the present generation {held} {passages} and {written} written again"
        if not self.is_done and (self.rows or self.num_deleted):
            what += f"; `readapt clean --root {self.root} --yes` does it"
        return "\n".join([*([aligned_table(lines)] if self.rows else []), what])


def clean(config: CleanConfig) -> Freed:
    """Remove the artifacts that the present and the kept generations do not need. Without `yes`, only list them.

    If no earlier generation is kept and files of the present one still hold deleted passages, these files are first
    written again without them, as a new generation.

    Raises:
        ArtifactConflictError: another process refreshes or cleans the root.
        InputError: the root has no generation, or a refresh was killed during its export and must be finished first.
    """
    root = Location(config.root)
    if not generations.read(root):
        raise InputError(f"{config.root!r} has no generation; give the root of `readapt refresh` or `readapt run`")
    _refuse_half_exported(root)
    if not config.yes:
        there = generations.read(root)
        deleted = {} if config.keep else _deleted(root, there[-1])
        again = {there[-1].artifacts[name] for name in deleted}
        num_deleted = max(deleted.values(), default=0)
        return Freed(config.root, _rows(_useless(root, there, config.keep, again)), num_deleted, False)
    with locked(root) as lock:
        there = generations.read(root)
        deleted = {} if config.keep else _deleted(root, there[-1])
        if deleted:
            there = [*there, _compacted(root, there, deleted)]
            lock.confirm()
            generations.write(root, there)
        useless = _useless(root, there, config.keep)
        rows = _rows(useless)
        needed = _needed(there, config.keep)
        marked = [replace(each, freed=each.freed or not needed.issuperset(each.artifacts.values())) for each in there]
        lock.confirm()
        generations.write(root, marked)
        for trace, _ in sorted(useless, key=lambda pair: _turn(pair[0])):
            remove_artifact(trace.location)
        for kind in ("passages", "shards"):
            cache_entries.remove_unused(kind)
        for name in (root / FOLDER_NAME).children()[1]:
            (root / FOLDER_NAME / name).remove_if_empty()
    return Freed(config.root, rows, max(deleted.values(), default=0), True)


def _refuse_half_exported(root: Location) -> None:
    """Refuse to clean after a killed export: only its artifact, which no generation lists yet, knows what was sent."""
    there = generations.read(root)
    latest = f"{FOLDER_NAME}/{there[-1].number:05d}/{EXPORT}"  # earlier ones are of a removed `refresh.json`
    if any(
        each.is_of_refresh and not each.generations and each.name.endswith(f"/{EXPORT}") and each.name > latest
        for each in traces(root, there)
    ):
        raise InputError(
            f"a refresh of {root.uri!r} that did not end had begun to change its collection; run `readapt refresh --root "
            f"{root.uri}` first, which finishes it"
        )


def remove_artifact(location: Location) -> None:
    """Remove the files of an artifact, complete or not, according to its manifest or lease.

    Files that no stage made stay, and a folder without a manifest or lease is not touched. During the removal a lease
    lists the files, so a killed removal can be resumed.

    Raises:
        ArtifactConflictError: another process is writing the artifact.
    """
    lease = record_of(location, LEASE_NAME)
    before = leases.wait_until_dead(lease, location)
    manifest = artifacts.read_manifest(location)
    record = dataclasses.asdict(manifest) if manifest else before
    if record is None:
        return
    own = artifact_files.own_files(location, record)
    fields = {"stage": record["stage"], **outputs.being_cleared(own), "seconds_before": 0.0}
    with leases.Lease(
        lease, location, ProgressReporter("clean"), before=before, fields={**fields, "config": {}, "inputs": {}}
    ):
        outputs.clear(location, record, own)
    lease.delete()
    location.remove_if_empty()


def _deleted(root: Location, present: Generation) -> dict[str, int]:
    """Return, for vectors and index, how many deleted passages their files still hold. Zeros are left out."""
    shards = artifacts.open_artifact(present.folder(root, INDEX), STAGE_OF[INDEX]).manifest.details["shards"]
    vectors = artifacts.open_artifact(present.folder(root, VECTORS), STAGE_OF[VECTORS])
    found = {VECTORS: num_dead(vectors), INDEX: sum(int(each["num_deleted"]) for each in shards)}
    return {name: count for name, count in found.items() if count}


def _compacted(root: Location, there: list[Generation], deleted: Collection[str]) -> Generation:
    """Write vectors or index again without deleted passages, and return the new generation that has them."""
    started_s = time.monotonic()
    present, number = there[-1], 1 + max(each.number for each in there)
    folders = dict(present.artifacts)
    for name in deleted:
        output = f"{FOLDER_NAME}/{number:05d}/{name}"
        if name == INDEX:
            options = {"vectors": (root / folders[VECTORS]).uri, "output": (root / output).uri, "overwrite": True}
            make("index", present.settings["index"], RULES, **options)
        else:
            compact(artifacts.open_artifact(present.folder(root, name), STAGE_OF[name]), (root / output).uri)
        folders[name] = output
    return replace(
        present,
        number=number,
        what="compaction",
        created=generations.now(),
        seconds=round(time.monotonic() - started_s, 3),
        artifacts=folders,
        counts={},
        signals={},
        advice="",
        index_changes=0 if INDEX in deleted else present.index_changes,
    )


def _needed(there: list[Generation], num_kept: int) -> set[str]:
    """Return the folders of the artifacts of the present generation and of the `num_kept` before it."""
    left = [each for each in there if not each.freed]
    return {name for each in left[-1 - num_kept :] for name in each.artifacts.values()}


def _useless(
    root: Location, there: list[Generation], num_kept: int, rebuilt: Set[str] = frozenset()
) -> list[tuple[Trace, str]]:
    """Return the artifacts to remove, each with the reason: no kept generation needs them, or they are `rebuilt`."""
    needed = _needed(there, num_kept) - rebuilt
    found = traces(root, there)
    kept = {each.fingerprint for each in found if each.name in needed}
    others = [each for each in found if each.name not in needed]
    freed: list[tuple[Trace, str]] = []
    for each in others:
        if each.generations:
            freed.append((each, f"generation {', '.join(map(str, each.generations))}"))
        elif each.is_of_refresh:
            freed.append((each, "left by a refresh that did not end"))
    corpora = [each for each, _ in freed if each.stage == STAGE_OF[CORPUS] and each.fingerprint not in kept]
    known = {each.name for each, _ in freed}
    beside = [each for each in derived_from(corpora, others) if each.name not in known]
    return list(_not_in_use([*freed, *((each, "made from an earlier generation") for each in beside)]))


def _not_in_use(found: list[tuple[Trace, str]]) -> Iterator[tuple[Trace, str]]:
    for each, why in found:
        lease = artifacts.read_lease(each.location)
        if lease is not None and leases.is_alive(lease):
            logger.warning("clean: %s is being written by process %s, and is kept", each.location, lease["pid"])
        else:
            yield each, why


def _turn(trace: Trace) -> tuple[bool, bool]:
    """Return the sort key for the order in which artifacts are removed.

    A corpus goes last, because its manifest shows which artifacts were made from it. Leftovers of a killed refresh go
    before the generations that they share files with, because the inode's change time shows which files are theirs.
    """
    return trace.stage == STAGE_OF[CORPUS], bool(trace.generations)


def _rows(found: list[tuple[Trace, str]]) -> list[dict[str, object]]:
    return [{"artifact": each.name, "stage": each.stage, "bytes": each.num_bytes(), "why": why} for each, why in found]
