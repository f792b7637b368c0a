"""Read and write the generations of a root. A generation lists the artifacts of one state of a changing corpus.

`refresh.json` under the root has an entry of some 2 KB per generation; the last entry is the present generation. The
file is replaced atomically after all artifacts of a generation are complete. So a reader that reads it once gets one
consistent state of the corpus, the old one or the new one.
"""

import dataclasses
import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from readapt_ray import artifacts
from readapt_ray.errors import CorruptFileError, InputError
from readapt_ray.leases import NO_FILE
from readapt_ray.storage import Location

FILE_NAME = "refresh.json"
_FORMAT_VERSION = 1
FOLDER_NAME = "generations"
CORPUS, VECTORS, INDEX, EXPORT = "corpus", "vectors", "index", "export"
STAGE_OF = {CORPUS: "ingest", VECTORS: "embed", INDEX: "index", EXPORT: "export"}
"""The stage that makes each artifact of a generation, in the order in which they are made."""
_RUN_NAME = "run.json"
_OF_A_RUN = {CORPUS: "corpus", VECTORS: "vectors/adapted", INDEX: "index/adapted"}
SECTIONS = ("ingest", "embed", "index", "export")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One state of the corpus, and the artifacts that were made from it."""

    number: int
    what: str
    """What made this generation: a run, a refresh, a compaction, or a return to an earlier generation."""
    created: str
    seconds: float
    settings: dict[str, Any]
    """Source, retriever, target of the export, and a section of options per stage."""
    source_fingerprint: str
    artifacts: dict[str, str]
    """Folder of each artifact, relative to the root. Generations may share one."""
    counts: dict[str, int] = field(default_factory=dict)
    """Numbers of passages that were added, changed, deleted and kept since the previous generation."""
    signals: dict[str, float] = field(default_factory=dict)
    """Numbers that show whether the retriever should be adapted again; see recipes/README.md."""
    advice: str = ""
    turnover: float = 0.0
    """Changed passages since the retriever was first used here, as a fraction of all passages."""
    index_changes: int = 0
    """Number of vectors added to or deleted from the index since it was last built from scratch."""
    freed: bool = False
    """Whether `readapt clean` removed the artifacts that only this generation needed."""

    def folder(self, root: Location, name: str) -> str:
        """Return the URI of an artifact of this generation. `name` is a key of `artifacts`, such as "corpus"."""
        return (root / self.artifacts[name]).uri


def read(root: Location) -> list[Generation]:
    """Return the generations under a root, oldest first; an empty list if there are none.

    Without `refresh.json`, the artifacts of a complete `readapt run` count as the first generation.

    Raises:
        CorruptFileError: `refresh.json` was cut short or altered.
        InputError: another release wrote `refresh.json` in a format that this one does not know.
    """
    file = root / FILE_NAME
    names = {each.name for each in dataclasses.fields(Generation)}
    try:
        content = file.read_json()
        entries, version = content["generations"], content.get("format_version", _FORMAT_VERSION)
        if version != _FORMAT_VERSION:
            raise InputError(
                f"{file} has format_version {version!r}, and this release reads {_FORMAT_VERSION}; use the release that wrote it"
            )
        return [Generation(**{name: each[name] for name in names & each.keys()}) for each in entries]
    except NO_FILE as error:
        if file.is_folder():
            raise CorruptFileError(
                f"{file} is a folder, where the list of generations belongs; move it away"
            ) from error
        return _of_run(root)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"{file} is not a list of generations ({error}); restore it from a backup, or remove it to begin with a "
            f"generation that is made as a whole"
        ) from error


def write(root: Location, generations: Sequence[Generation]) -> None:
    """Replace the list of generations by this one, oldest first. The last one becomes the present generation."""
    entries = [dataclasses.asdict(each) for each in generations]
    (root / FILE_NAME).write_text(
        json.dumps({"format_version": _FORMAT_VERSION, "generations": entries}, indent=1) + "\n"
    )


def now() -> str:
    """Return the current time (UTC) in the format of `Generation.created`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def as_of(root: Location, number: int | None) -> Generation:
    """Return the generation with a number; None means the present one.

    Raises:
        InputError: no generation has this number, or `readapt clean` removed its artifacts.
    """
    there = read(root)
    if not there:
        raise InputError(f"{root.uri!r} has no generation; run `readapt refresh --root {root.uri} --source ...` first")
    found = {each.number: each for each in there if not each.freed}
    if number is None:
        return there[-1]
    if number not in found:
        state = "was removed by `readapt clean`" if number in {each.number for each in there} else "does not exist"
        raise InputError(
            f"generation {number} of {root.uri!r} {state}; existing generations: {', '.join(map(str, found))} "
            f"(`readapt status --root {root.uri} --history`)"
        )
    return found[number]


def with_folders(values: Mapping[str, Any], options: Sequence[str]) -> dict[str, Any]:
    """Return a config's values, with options that are not given (retriever, corpus ...) set to folders of a generation.

    Args:
        values: the given values of the config. `root` is the root of `readapt refresh`; `as_of` is the number of the
            generation, or None for the present one. Without `root`, the values are returned as they are.
        options: which of retriever, corpus, vectors and index to fill in.

    Raises:
        InputError: there is no such generation, or `as_of` is given without `root`.
    """
    given = {name: value for name, value in values.items() if value is not None}
    number = given.get("as_of")
    if "root" not in given:
        if number is not None:
            raise InputError(f"as_of = {number!r} needs a root; give the root of `readapt refresh`, too")
        return dict(values)
    if not isinstance(given["root"], str | os.PathLike) or not re.fullmatch(r"None|[1-9]\d*", str(number)):
        return dict(values)  # a wrong type: validation of the config refuses it
    root = Location(os.fspath(given["root"]))
    generation = as_of(root, None if number is None else int(number))
    folders = {"retriever": generation.settings["retriever"]}
    folders |= {name: generation.folder(root, name) for name in options if name in generation.artifacts}
    return {**values, **{name: folders[name] for name in options if name in folders and name not in given}}


def absolute(name: str) -> str:
    """Return a model's or source's name. An existing local path is made absolute; any other name stays as it is."""
    location = Location(name)
    return location.path if location.is_local and location.exists() else name


def _of_run(root: Location) -> list[Generation]:
    """Return the artifacts of a complete `readapt run` as a list of one generation; else an empty list."""
    file = root / _RUN_NAME
    if not file.is_file():
        return []
    manifests = {name: artifacts.read_manifest(root / folder) for name, folder in _OF_A_RUN.items()}
    try:
        config = json.loads(file.read_bytes())["config"]
        corpus, seconds = manifests[CORPUS], sum(each.seconds for each in manifests.values() if each)
        if corpus is None or not all(manifests.values()):
            return []
        encoding = {} if config.get("encoding") is None else {"encoding": config["encoding"]}
        sections = {name: config.get(name, {}) for name in SECTIONS}
        sections["embed"] = {**encoding, **sections["embed"]}
        sections = {
            name: {option: value for option, value in options.items() if option != "overwrite"}
            for name, options in sections.items()
        }
        settings = {
            "source": absolute(config["source"]),
            "retriever": absolute((root / "adapted").uri),
            "to": None,
            **sections,
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # another release wrote run.json
    return [
        Generation(
            number=1,
            what="run",
            created=corpus.created,
            seconds=round(seconds, 3),
            settings=settings,
            source_fingerprint=corpus.inputs.get("source", ""),
            artifacts=dict(_OF_A_RUN),
            counts={"added": int(corpus.counts["num_passages"]), "changed": 0, "deleted": 0, "kept": 0},
        )
    ]
