"""Tell which files in an output folder are ours, by the patterns that every lease and manifest lists.

In: the folder of an artifact, and the patterns of its record. Out: what is in the way, or what was removed. A
pattern is a path relative to the artifact in which `*` stands for anything but a slash, so a record of 244,000
files takes a line. Nothing that matches no pattern is ever removed. It costs one listing of the folder, and on
an object store a few requests for each file that is removed, 32 at a time.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from readapt_ray.model_file_names import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
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

_TOKENIZER = (*TOKENIZER_FILES, CHAT_TEMPLATE_NAME)
_WEIGHTS = (CONFIG_NAME, SINGLE_NAME, "model-*.safetensors", INDEX_NAME)
RAY_TRAIN = ("workers/.validate_storage_marker", "workers/checkpoint_manager_snapshot.json")
"""What Ray Train keeps in its `storage_path` while workers run; they report no checkpoints to it."""
_TRAINED = (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    *_WEIGHTS,
    *_TOKENIZER,
    "metrics.jsonl",
    "metrics/step-*.jsonl",
    "checkpoints/step-*.safetensors",
    "batch_size",
    "dtype",
    "memory.json",
    "tensorboard/events.out.tfevents.*",
    *RAY_TRAIN,
    ".seen-*",
)
_VECTORS = ("vectors/part-*.parquet", "vectors/.seen-*", "shards.parquet", "join/digests-*")

STAGE_FILES: dict[str, tuple[str, ...]] = {
    "ingest": (
        "passages/part-*.parquet",
        "passages/.seen-*",
        "passages.footers.parquet",
        "exchange/*",
        "queries/part-*.parquet",
        "qrels/*.parquet",
    ),
    "pack": ("blocks/part-*.parquet", "blocks/.seen-*", "blocks.parquet"),
    "train": _TRAINED,
    "finetune": (*_TRAINED, "pairs/part-*.parquet", CONTRACT_NAME),
    "merge": (
        *_WEIGHTS,
        *_TOKENIZER,
        "README.md",
        CONTRACT_NAME,
        MODULES_NAME,
        POOLING_CONFIG_NAME,
        f"*_Dense/{CONFIG_NAME}",
        f"*_Dense/{SINGLE_NAME}",
        f"*_Normalize/{CONFIG_NAME}",
        LENGTH_NAME,
        PROMPTS_NAME,
        "model.safetensors.cast.json",
        "model-*.safetensors.cast.json",
        "low-rank.factors",
        "low-rank.factors.json",
        "low-rank.factors.parts/*.factors",
        "low-rank.factors.parts/*.json",
        "bundle.json",
        "readapter.safetensors",
        "readapter.safetensors.json",
        "readapter.safetensors.parts/*.factors",
        "readapter.safetensors.parts/*.json",
        "retriever/adapter_config.json",
        "retriever/adapter_model.safetensors",
        "knowledge-*/adapter_config.json",
        "knowledge-*/adapter_model.safetensors",
        "knowledge-*/difference.safetensors",
        "knowledge-*/difference.safetensors.json",
        "knowledge-*/difference.safetensors.parts/*.json",
        ".seen-*",
    ),
    "embed": _VECTORS,
    "embed-sample": _VECTORS,
    "bridge": (*_VECTORS, "map.safetensors"),
    "index": (
        "shards/*.faiss",
        "shards/*.ids.parquet",
        "shards/*.json",
        "shards/*.recall.npz",
        "shards/*.bm25.npz",
        "shards/.seen-*",
    ),
    "export": ("rows/part-*.parquet", "rows/.seen-*", "deleted/part-*.parquet"),
    "search": (),
    "evaluate": ("per_query.parquet", "measures.json", "report.json", "report.md", "report.html"),
    "drift": ("report.json", "report.md", "report.html"),
    "tune": ("grid/*.json", "tune.json", "tune.md", "tune.html"),
}
"""What each stage writes beside its records, at its end or on the way there. A run of `search` is one file, its output."""


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
        folder, slash, last = name.rpartition("/")
        is_own = known.fullmatch(f"{folder}{slash}{name_when_whole(last) or last}")
        (own if is_own else foreign).append(name)
    return own, foreign


def clear(location: Location, patterns: Collection[str], *, keep: str | None = None) -> list[str]:
    """Remove the files of a folder that match a pattern, and the folders that are empty then.

    Args:
        location: the folder.
        patterns: what its record lists.
        keep: the name of a file that stays.

    Returns:
        The names of the other files, all of which stay.

    Raises:
        StorageError: a file may not be removed.
    """
    own, foreign = split_by_owner((name for name in location.entries()[0] if name != keep), patterns)
    with ThreadPoolExecutor(1 if location.is_local else _NUM_THREADS) as pool:
        list(pool.map(lambda name: (location / name).delete(), own))
    remove_empty_folders(location, patterns)
    return foreign


def remove_temporary(location: Location, patterns: Iterable[str]) -> None:
    """Remove what killed writers left of files that match a pattern: files that never got their name."""
    names = [name for name in location.entries()[0] if name_when_whole(name.rpartition("/")[2]) is not None]
    for name in split_by_owner(names, patterns)[0]:
        (location / name).delete()


def remove_empty_folders(location: Location, patterns: Iterable[str]) -> None:
    """Remove the folders that hold nothing and that files matching a pattern would lie in."""
    parents = _compiled(_parents(patterns))
    for name in reversed(location.entries()[1]):
        if parents.fullmatch(name):
            (location / name).remove_if_empty()


def would_collide(location: Location, own: Iterable[str], planned: Sequence[str]) -> list[str]:
    """Return what lies where planned files would be written, and matches no pattern of `own`.

    Work that goes on from the files it finds would take such a file for its own. A link in the place of a folder
    leads to files that are not removed, so it collides, too.
    """
    _, foreign = split_by_owner(location.entries()[0], own)
    return split_by_owner(foreign, {*planned, *_parents(planned)})[0]


def in_the_way(location: Location, *, but: Collection[str]) -> list[str]:
    """Return what lies right under a folder, folders with a slash behind their names.

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
    return re.compile("|".join(re.escape(each).replace(r"\*", "[^/]*") for each in patterns))
