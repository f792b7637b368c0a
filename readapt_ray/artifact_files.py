"""Tell which files in an output folder are ours, by what its record says.

In: the folder of an artifact, and its record. Out: what is in the way, or what was removed. A manifest lists the names
of its files; consecutive numbers take one entry, so a record of 244,000 files takes a line. A lease lists patterns of
what the work writes: paths relative to the artifact in which `*` matches anything but a slash and `#` matches digits. Of
what matches, files that changed after the work had ended are not ours. Nothing else is ever removed. It costs one
listing of the folder, and on an object store a few requests for each file that is removed, 32 at a time.
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
"""Tasks on other machines may write for so long after the last heartbeat of a driver that was killed, clocks included."""

Names = Sequence[str | Sequence[str]]
"""Names of files as a record keeps them: a name, or `[before, first, last, after]` for consecutive numbers."""

_TOKENIZER = (*TOKENIZER_FILES, CHAT_TEMPLATE_NAME)
_WEIGHTS = (CONFIG_NAME, SINGLE_NAME, "model-#-of-#.safetensors", INDEX_NAME)
RAY_TRAIN = ("workers/.validate_storage_marker", "workers/checkpoint_manager_snapshot.json")
"""What Ray Train keeps in its `storage_path` while workers run; they report no checkpoints to it."""
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
    "synthesize": ("answers/part-#.parquet", "answers/.seen-*", "queries/part-#.parquet", "qrels/train.parquet"),
    "evaluate": ("per_query.parquet", "measures.json", "report.json", "report.md", "report.html"),
    "drift": ("report.json", "report.md", "report.html"),
    "tune": ("grid/*.json", "tune.json", "tune.md", "tune.html"),
    "subset": (SUBSET_NAME,),
}
"""What each stage writes beside its records, at its end or on the way there. A run of `search` is one file, its output."""
STAGE_FILES["headed"] = ("head.safetensors", "body-*.safetensors", *STAGE_FILES["merge"])


def record_of(location: Location, name: str) -> Location:
    """Return the location of the manifest or the lease of an artifact."""
    return location.beside(f".{name}") if is_single_file(location) else location / name


def is_single_file(location: Location) -> bool:
    """Return whether an output is one file, with its records beside it."""
    return location.name.endswith(SINGLE_FILE_SUFFIX)


def split_by_owner(names: Iterable[str], patterns: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names that match a pattern, and the others.

    A temporary file of an unfinished write belongs to whom the whole file would belong.
    """
    known = _compiled(patterns)
    own: list[str] = []
    foreign: list[str] = []
    for name in names:
        (own if known.fullmatch(whole_name(name)) else foreign).append(name)
    return own, foreign


def packed(names: Iterable[str]) -> list[str | list[str]]:
    """Return names as a record keeps them.

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
    """Yield each name of a record."""
    for each in names:
        if isinstance(each, str):
            yield each
        else:
            before, first, last, after = each
            for number in range(int(first), int(last) + 1):
                yield f"{before}{number:0{len(first)}d}{after}"


def own_files(location: Location, record: Mapping[str, Any]) -> set[str]:
    """Return which files of a folder are ours by its manifest or lease, with temporary files of unfinished writes.

    If the lease itself is late, the folder was copied as a whole or clocks differ, so that times say nothing.
    """
    if is_single_file(location):
        return set()
    there = location.entries()[0]
    listed = {*unpacked(record.get("files", ())), *RECORDS}
    matching = split_by_owner(there, record.get("patterns", ()))[0]
    is_copied = "heartbeat" in record and is_late(record_of(location, LEASE_NAME), record)
    late = set() if is_copied else late_files(location, matching, record)
    return {name for name in there if whole_name(name) in listed} | (set(matching) - late)


def late_files(location: Location, names: Collection[str], lease: Mapping[str, Any]) -> set[str]:
    """Return the files that changed after the process of a lease had ended.

    On a disk this is when the inode changed: a copy that keeps the time of its original cannot set it. The inode of a file
    that artifacts share changes with each name that it gets or loses, so one that has other names is not late.
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
    """Return whether a file changed after the process of a lease had ended."""
    changed_s = os.lstat(file.path).st_ctime if file.is_local else (file.info().mtime_ns or 0) / 1e9
    return bool(changed_s > lease["heartbeat"] + _LAST_WRITES_S)


def matching_files(location: Location, patterns: Iterable[str]) -> set[str]:
    """Return the whole files of a folder that match a pattern."""
    found = [] if is_single_file(location) else split_by_owner(location.entries()[0], patterns)[0]
    return {name for name in found if whole_name(name) == name}


def tidied_files(location: Location, patterns: Iterable[str]) -> set[str]:
    """Remove the temporary files of killed writers among the files that match a pattern, and return the whole ones."""
    found = set() if is_single_file(location) else {*split_by_owner(location.entries()[0], patterns)[0]}
    remove_temporary(location, found)
    return {name for name in found if whole_name(name) == name}


def whole_name(name: str) -> str:
    """Return the name that a file has, or would have after its write."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{name_when_whole(last) or last}"


def remove(location: Location, names: Iterable[str]) -> None:
    """Remove files of a folder, and the folders that are empty then.

    Raises:
        StorageError: a file may not be removed.
    """
    gone = list(names)
    with ThreadPoolExecutor(1 if location.is_local else _NUM_THREADS) as pool:
        list(pool.map(lambda name: (location / name).delete(), gone))
    for parent in sorted(_parents(gone), reverse=True):
        (location / parent).remove_if_empty()


def clear(location: Location, patterns: Collection[str]) -> None:
    """Remove the files of work under way that match a pattern, temporary ones too, and the folders that are empty then.

    Raises:
        StorageError: a file may not be removed.
    """
    remove(location, split_by_owner(location.entries()[0], patterns)[0])
    remove_empty_folders(location, patterns)


def remove_temporary(location: Location, names: Iterable[str]) -> None:
    """Remove those files among `names` that killed writers left: they never got their name."""
    remove(location, [name for name in names if whole_name(name) != name])


def remove_empty_folders(location: Location, patterns: Iterable[str]) -> None:
    """Remove the folders that hold nothing and would hold files that match a pattern."""
    parents = _compiled(_parents(patterns))
    for name in reversed(location.entries()[1]):
        if parents.fullmatch(name):
            (location / name).remove_if_empty()


def would_collide(location: Location, own: Collection[str], planned: Sequence[str]) -> list[str]:
    """Return what is in the place of planned files, and is not in `own`.

    Work that resumes from the files it finds would take such a file for its own. A link in the place of a folder
    leads to files that are not removed, so it collides, too.
    """
    foreign = [name for name in location.entries()[0] if name not in own]
    return split_by_owner(foreign, {*planned, *_parents(planned)})[0]


def in_the_way(location: Location, *, but: Collection[str]) -> list[str]:
    """Return the entries of a folder, folders with a slash behind their names.

    Temporary files of our writes do not count. On an object store a folder without files does not count either: it
    is only a mark that deleted files left.

    Args:
        location: the folder.
        but: names of files that do not count.
    """
    files, folders = location.entries(recursive=False)
    found = [f"{name}/" for name in folders if location.is_local or _holds_a_file(location / name)]
    return found + [name for name in files if name not in but and name_when_whole(name) is None]


def named(names: Sequence[str]) -> str:
    """Return the first few of some names as text, and how many more there are."""
    shown = [name.encode(errors="backslashreplace").decode() for name in names[:_NUM_NAMED]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def _holds_a_file(folder: Location) -> bool:
    files, folders = folder.entries(recursive=False)
    return bool(files) or any(_holds_a_file(folder / name) for name in folders)


def _parents(patterns: Iterable[str]) -> set[str]:
    """Return the folders, as patterns, in which matching files may be at any depth."""
    parts = [each.split("/") for each in patterns]
    return {"/".join(each[:depth]) for each in parts for depth in range(1, len(each))}


def _compiled(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(each).replace(r"\*", "[^/]*").replace(r"\#", "[0-9]+") for each in patterns))
