"""Find and remove the files in an output folder that a stage wrote, and no others.

In: the folder of an artifact, and its record (manifest or lease). Out: files that are in the way, or were removed.

- A manifest lists file names. Consecutive numbers take one entry, so the names of 244,000 files fit on one line.
- A lease lists patterns of the files that the stage writes: paths relative to the artifact, in which `*` matches
  anything but a slash and `#` matches digits. A matching file that changed after the process had ended is not ours.

Only files that the record covers are ever removed. The cost is one listing of the folder, and on an object store a few
requests per removed file, 32 at a time.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.fs as pafs

from readapt_ray.model_file_names import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    BUNDLE_NAME,
    CHAT_TEMPLATE_NAME,
    CONFIG_NAME,
    CONTRACT_NAME,
    INDEX_NAME,
    LENGTH_NAME,
    MODULES_NAME,
    POOLING_CONFIG_NAME,
    PROMPTS_NAME,
    SINGLE_NAME,
    TOKENIZER_FILES,
)
from readapt_ray.storage import Location, name_when_whole

MANIFEST_NAME = "manifest.json"
LEASE_NAME = "building.json"
RECORDS = (MANIFEST_NAME, LEASE_NAME)
SINGLE_FILE_SUFFIX = ".trec"
_NUM_THREADS = 32
_NUM_NAMED = 4
_NUMBER = re.compile("[0-9]+")
_LAST_WRITES_S = 120.0
"""For how many seconds after a killed driver's last heartbeat its tasks on other machines may still write files. This
includes the difference between the machines' clocks."""

Names = Sequence[str | Sequence[str]]
"""File names as a record stores them: a name, or `[before, first, last, after]` for consecutive numbers."""

_TOKENIZER = (*TOKENIZER_FILES, CHAT_TEMPLATE_NAME)
_WEIGHTS = (CONFIG_NAME, SINGLE_NAME, "model-#-of-#.safetensors", INDEX_NAME)
RAY_TRAIN = ("workers/.validate_storage_marker", "workers/checkpoint_manager_snapshot.json")
"""Files that Ray Train writes to its `storage_path` while workers run. Our workers report no checkpoints to it."""
_TRAINED = (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    *_WEIGHTS,
    *_TOKENIZER,
    "metrics.jsonl",
    "metrics/step-#-#.jsonl",
    "checkpoints/step-#.safetensors",
    "batch_size",
    "dtype",
    "memory.json",
    "tensorboard/events.out.tfevents.*",
    *RAY_TRAIN,
    ".seen-*",
)
_VECTORS = (
    "vectors/part-#.parquet",
    "vectors/part-#-partly.parquet",
    "vectors/_part-#-partly.dead",
    "vectors/.seen-*",
    "shards.parquet",
    "join/digests-*-#",
)

EXCHANGED = (
    "exchange/plan",
    "exchange/summary.json",
    "exchange/piece-#-#",
    "exchange/ids-#-#",
    "exchange/contents-#-#",
    "exchange/lost-ids-#-#",
    "exchange/drop-ids-#-#",
    "exchange/drop-contents-#-#",
    "exchange/drop-near-#-#",
    "exchange/sketches-#-#",
    "exchange/bands-#-#",
    "exchange/buckets-#-#",
    "exchange/wanted-#-#",
    "exchange/sent-#-#-#",
    "exchange/alike-#-#-#",
    "exchange/state-#-#-#",
)
"""Files that the tasks of a parallel ingest exchange."""
SUBSET_NAME = "passages.jsonl"

STAGE_FILES: dict[str, tuple[str, ...]] = {
    "ingest": (
        "passages/part-#.parquet",
        "passages/.seen-*",
        "passages.footers.parquet",
        "passages.pieces.json",
        *EXCHANGED,
        "queries/part-#.parquet",
        "qrels/*.parquet",
    ),
    "pack": ("blocks/part-#.parquet", "blocks/.seen-*", "blocks.parquet"),
    "train": _TRAINED,
    "finetune": (*_TRAINED, "pairs/part-#.parquet", CONTRACT_NAME),
    "merge": (
        *_WEIGHTS,
        *_TOKENIZER,
        "README.md",
        CONTRACT_NAME,
        MODULES_NAME,
        POOLING_CONFIG_NAME,
        f"#_Dense/{CONFIG_NAME}",
        f"#_Dense/{SINGLE_NAME}",
        f"#_Normalize/{CONFIG_NAME}",
        LENGTH_NAME,
        PROMPTS_NAME,
        "model.safetensors.cast.json",
        "model-#-of-#.safetensors.cast.json",
        "low-rank.factors",
        "low-rank.factors.json",
        "low-rank.factors.parts/*.factors",
        "low-rank.factors.parts/*.json",
        BUNDLE_NAME,
        "readapter.safetensors",
        "readapter.safetensors.json",
        "readapter.safetensors.parts/*.factors",
        "readapter.safetensors.parts/*.json",
        "retriever/adapter_config.json",
        "retriever/adapter_model.safetensors",
        "knowledge-#/adapter_config.json",
        "knowledge-#/adapter_model.safetensors",
        "knowledge-#/difference.safetensors",
        "knowledge-#/difference.safetensors.json",
        "knowledge-#/difference.safetensors.parts/*.json",
        ".seen-*",
    ),
    "embed": _VECTORS,
    "embed-sample": _VECTORS,
    "bridge": (*_VECTORS, "map.safetensors", "calibration.safetensors"),
    "index": (
        "shards/#.faiss",
        "shards/#.ids.parquet",
        "shards/#.dead",
        "shards/#.json",
        "shards/trained.faiss",
        "shards/queries.recall.npz",
        "shards/#.recall.npz",
        "shards/#.bm25.npz",
        "shards/.seen-*",
    ),
    "export": ("rows/part-#.parquet", "rows/.seen-*", "deleted/part-#.parquet"),
    "search": (),
    "synthesize": (
        "answers/part-#.parquet",
        "answers/part-#-partly.parquet",
        "answers/.seen-*",
        "queries/part-#.parquet",
        "qrels/train.parquet",
    ),
    "evaluate": ("per_query.parquet", "measures.json", "report.json", "report.md", "report.html"),
    "drift": ("report.json", "report.md", "report.html"),
    "tune": ("grid/*.json", "tune.json", "tune.md", "tune.html"),
    "subset": (SUBSET_NAME,),
}
"""Patterns of the files that each stage writes, final or temporary, without its records. `search` writes one file, its
output."""
STAGE_FILES["headed"] = ("head.safetensors", "body-*.safetensors", *STAGE_FILES["merge"])


def record_of(location: Location, name: str) -> Location:
    """Return the location of an artifact's manifest or lease. `name` is MANIFEST_NAME or LEASE_NAME."""
    return location.beside(f".{name}") if is_single_file(location) else location / name


def is_single_file(location: Location) -> bool:
    """Return whether an output is a single file (its name ends with .trec) with its records beside it, not a folder."""
    return location.name.endswith(SINGLE_FILE_SUFFIX)


def split_by_owner(names: Iterable[str], patterns: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split names into those that match a pattern and those that match none, in this order.

    A temporary file of an unfinished write is matched by its final name.
    """
    known = _compiled(patterns)
    own: list[str] = []
    foreign: list[str] = []
    for name in names:
        (own if known.fullmatch(final_name(name)) else foreign).append(name)
    return own, foreign


def packed(names: Iterable[str]) -> list[str | list[str]]:
    """Shorten a list of file names for a record: consecutive numbers become one entry. Their order is not kept.

    Example:
        packed(["a", "part-08", "part-09", "part-10"]) == ["a", ["part-", "08", "10", ""]]
    """
    single: list[str | list[str]] = []
    numbered: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for name in sorted(names):
        if found := _NUMBER.search(name, name.rfind("/") + 1):
            numbered[name[: found.start()], len(found[0]), name[found.end() :]].append(int(found[0]))
        else:
            single.append(name)
    for (before, width, after), numbers in numbered.items():
        first = numbers[0]
        for number, following in zip(numbers, [*numbers[1:], -1], strict=True):
            if following != number + 1:
                single.append([before, f"{first:0{width}d}", f"{number:0{width}d}", after])
                first = following
    return single


def unpacked(names: Names) -> Iterator[str]:
    """Yield every file name of a record: the inverse of `packed`."""
    for each in names:
        if isinstance(each, str):
            yield each
        else:
            before, first, last, after = each
            for number in range(int(first), int(last) + 1):
                yield f"{before}{number:0{len(first)}d}{after}"


def own_files(location: Location, record: Mapping[str, Any]) -> set[str]:
    """Return the files of a folder that are ours according to its manifest or lease, temporary files included.

    Empty for an output that is one file. If the lease itself changed late, the folder was copied as a whole or the
    clocks differ. Then times are ignored.
    """
    if is_single_file(location):
        return set()
    there = location.entries()[0]
    listed = {*unpacked(record.get("files", ())), *RECORDS}
    matching = split_by_owner(there, record.get("patterns", ()))[0]
    is_copied = "heartbeat" in record and is_late(record_of(location, LEASE_NAME), record)
    late = set() if is_copied else late_files(location, matching, record)
    return {name for name in there if final_name(name) in listed} | (set(matching) - late)


def late_files(location: Location, names: Collection[str], lease: Mapping[str, Any]) -> set[str]:
    """Return the files that changed more than 120 s after the last heartbeat of a lease. Our process wrote none of them.

    On a local disk the inode's change time is used, because a copy that preserves modification times cannot set it. A
    hard link changes the inode's time too, so a file with several names (shared between artifacts) is never late.
    """
    if not names:
        return set()
    if location.is_local:
        states = ((name, os.lstat(os.path.join(location.path, name))) for name in names)
        changed_s = {name: state.st_ctime for name, state in states if state.st_nlink == 1}
    else:
        start = len(location.path.rstrip("/")) + 1
        found = location.filesystem.get_file_info(pafs.FileSelector(location.path, recursive=True))
        changed_s = {each.path[start:]: each.mtime_ns / 1e9 for each in found if each.mtime_ns is not None}
    return {name for name in names if changed_s.get(name, 0.0) > lease["heartbeat"] + _LAST_WRITES_S}


def is_late(file: Location, lease: Mapping[str, Any]) -> bool:
    """Return whether a file changed more than 120 s after the last heartbeat of a lease."""
    changed_s = os.lstat(file.path).st_ctime if file.is_local else (file.info().mtime_ns or 0) / 1e9
    return bool(changed_s > lease["heartbeat"] + _LAST_WRITES_S)


def matching_files(location: Location, patterns: Iterable[str]) -> set[str]:
    """Return the files of a folder that match a pattern, without temporary ones; empty if the output is one file."""
    found = [] if is_single_file(location) else split_by_owner(location.entries()[0], patterns)[0]
    return {name for name in found if final_name(name) == name}


def tidied_files(location: Location, patterns: Iterable[str]) -> set[str]:
    """Delete the temporary files whose final name matches a pattern, and return the names of complete files that match.

    Call it only while holding the output's lease and when no writer runs. Empty for an output that is one file.
    """
    found = set() if is_single_file(location) else {*split_by_owner(location.entries()[0], patterns)[0]}
    remove_temporary(location, found)
    return {name for name in found if final_name(name) == name}


def final_name(name: str) -> str:
    """Return the final name of a temporary file; the name itself for any other file."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{name_when_whole(last) or last}"


def remove(location: Location, names: Iterable[str]) -> None:
    """Remove files (relative names) from a folder, and the subfolders that become empty. Missing files are ignored.

    Raises:
        StorageError: permission to remove a file is missing.
    """
    gone = list(names)
    with ThreadPoolExecutor(1 if location.is_local else _NUM_THREADS) as pool:
        list(pool.map(lambda name: (location / name).delete(), gone))
    for parent in sorted(_parents(gone), reverse=True):
        (location / parent).remove_if_empty()


def clear(location: Location, patterns: Collection[str]) -> None:
    """Remove the files that match a pattern, temporary ones too, and the subfolders that become empty.

    Raises:
        StorageError: permission to remove a file is missing.
    """
    remove(location, split_by_owner(location.entries()[0], patterns)[0])
    remove_empty_folders(location, patterns)


def remove_temporary(location: Location, names: Iterable[str]) -> None:
    """Remove the temporary files among `names`, which killed writers left. No writer may be running."""
    remove(location, [name for name in names if final_name(name) != name])


def remove_empty_folders(location: Location, patterns: Iterable[str]) -> None:
    """Remove the empty subfolders that were made for files that match a pattern."""
    parents = _compiled(_parents(patterns))
    for name in reversed(location.entries()[1]):
        if parents.fullmatch(name):
            (location / name).remove_if_empty()


def would_collide(location: Location, own: Collection[str], planned: Sequence[str]) -> list[str]:
    """Return the files that have the name of a planned file and are not in `own`.

    A stage that resumes would mistake such a file for its output. A link that has the name of a planned folder is
    returned too: the files that it leads to are never removed.

    Args:
        location: the folder.
        own: names of the files that are ours.
        planned: patterns of the files that will be written.
    """
    foreign = [name for name in location.entries()[0] if name not in own]
    return split_by_owner(foreign, {*planned, *_parents(planned)})[0]


def in_the_way(location: Location, *, but: Collection[str]) -> list[str]:
    """List the entries of a folder that prevent its use as an output. Folders have a slash behind their names.

    Temporary files of our writes are left out. On an object store, folders without files are left out too: they are
    only markers that remain after files are deleted.

    Args:
        location: the folder.
        but: names of files to leave out.
    """
    files, folders = location.entries(recursive=False)
    found = [f"{name}/" for name in folders if location.is_local or _holds_a_file(location / name)]
    return found + [name for name in files if name not in but and name_when_whole(name) is None]


def named(names: Sequence[str]) -> str:
    """Join the first four names for a message, and say how many more there are, if any: "a, b, c, d and 7 more"."""
    shown = [name.encode(errors="backslashreplace").decode() for name in names[:_NUM_NAMED]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def _holds_a_file(folder: Location) -> bool:
    files, folders = folder.entries(recursive=False)
    return bool(files) or any(_holds_a_file(folder / name) for name in folders)


def _parents(patterns: Iterable[str]) -> set[str]:
    """Return the parent folders, at every depth, of each pattern."""
    parts = [each.split("/") for each in patterns]
    return {"/".join(each[:depth]) for each in parts for depth in range(1, len(each))}


def _compiled(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(each).replace(r"\*", "[^/]*").replace(r"\#", "[0-9]+") for each in patterns))
