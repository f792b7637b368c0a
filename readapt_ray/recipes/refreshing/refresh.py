"""Refresh a root: find what changed in the source, and make a new generation of corpus, vectors, index and export.

In: a source, and the generations under the root. Out: one more generation under `generations/`. Its entry in
`refresh.json` is written last and makes it the present one; until then, readers see the old state.

Cost: of a large source, only changed files are read. Unchanged files of corpus, vectors and index are shared with the
previous generation. Only new and changed passages are encoded and sent to a vector database. A killed refresh is resumed
by the same command.
"""

import functools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from readapt_ray import artifacts, generations, leases
from readapt_ray.artifacts import Artifact
from readapt_ray.cluster.corpus_comparison import compare_corpora, opened
from readapt_ray.config import flag
from readapt_ray.errors import CorpusError, FingerprintMismatchError, InputError
from readapt_ray.generations import CORPUS, EXPORT, FOLDER_NAME, INDEX, STAGE_OF, VECTORS, Generation
from readapt_ray.progress import amount, duration
from readapt_ray.recipes.chain import make, stage_config
from readapt_ray.recipes.refreshing.adapting import adapter_loss, command_to_adapt
from readapt_ray.recipes.refreshing.back import go_back
from readapt_ray.recipes.refreshing.clean import remove_artifact
from readapt_ray.recipes.refreshing.collection import begun_export, changed_by_others
from readapt_ray.recipes.refreshing.lock import locked, next_number, publish
from readapt_ray.recipes.refreshing.options import RULES, RefreshConfig, settled, stale
from readapt_ray.recipes.refreshing.serving import server_options, update_server
from readapt_ray.recipes.refreshing.signals import ADAPT_AGAIN, signals
from readapt_ray.retrieval.corpus_changes import Changes
from readapt_ray.retrieval.shard_ledger import shared_files
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

MAX_INDEX_CHANGES = 0.2
"""If more than this fraction of vectors was added or deleted since the index was built, it is built from scratch."""
_MIN_KEPT = 0.5
"""A source with less than this fraction of the present generation's passages is refused."""


def refresh(config: RefreshConfig) -> Generation:
    """Update a root to the present content of its source, or go back to an earlier generation.

    Returns:
        The present generation. It is the same as before if the source is unchanged.

    Raises:
        ArtifactConflictError: another process refreshes or cleans the root.
        InputError: the source cannot be read or has shrunk, or changed options make artifacts stale. Then the present
            generation stays.
        ReadaptError: the server of `serve` could not be updated. The new generation is in place nevertheless.
    """
    root = Location(config.root)
    if config.serve:
        server_options(config.serve)
    with locked(root) as lock:
        there = generations.read(root)
        made = go_back(config.back, root, there, lock) if config.back else _refreshed(config, root, there, lock)
    if config.serve:
        update_server(config.serve, root, made)
    return made


def _refreshed(config: RefreshConfig, root: Location, there: list[Generation], lock: leases.Lease) -> Generation:
    present = there[-1] if there else None
    settings = settled(config, present)
    reasons = {**_changed_model(root, settings, present), **stale(settings, present)}
    if present is not None and settings["to"] and EXPORT not in reasons:
        changed = changed_by_others(root, present, next_number(root, there))
        reasons |= {EXPORT: changed} if changed else {}
    if reasons and not config.overwrite:
        raise _refusal(root, reasons, present)
    making = _Making(config, root, there, settings, frozenset(reasons))
    fingerprint = making.source_fingerprint()
    if present is not None and making.is_complete(fingerprint):
        logger.info("refresh: nothing changed in %s since generation %d", settings["source"], present.number)
        return _seen(root, there, settings, fingerprint, lock)
    made = making.make(fingerprint)
    if made is None:
        logger.info("refresh: the files of %s changed, and no passage or judgement in them", settings["source"])
        return _seen(root, there, settings, fingerprint, lock)
    _log_result(root, [*there, made])
    return publish(root, there, made, lock)


def _seen(
    root: Location, there: list[Generation], settings: dict[str, Any], fingerprint: str, lock: leases.Lease
) -> Generation:
    """Record that the present generation already matches the source."""
    seen = replace(there[-1], settings=settings, source_fingerprint=fingerprint)
    if seen == there[-1] and (root / generations.FILE_NAME).is_file():
        return seen
    return publish(root, there[:-1], seen, lock)


def _changed_model(root: Location, settings: Mapping[str, Any], present: Generation | None) -> dict[str, str]:
    """Return the artifacts that are stale because the model's weights changed, with the reason. Its name does not matter."""
    from readapt_ray.catalog.models import open_model

    if present is None:
        return {}
    made_from = artifacts.open_artifact(present.folder(root, VECTORS), "embed").manifest.inputs["retriever"]
    if open_model(settings["retriever"]).fingerprint == made_from:
        return {}
    was, given = present.settings["retriever"], settings["retriever"]
    change = f"{was!r} there, {given!r} now" if was != given else f"the content of {given!r} changed"
    return dict.fromkeys((VECTORS, INDEX, EXPORT), f"retriever: {change}")


def _refusal(root: Location, reasons: Mapping[str, str], present: Generation | None) -> InputError:
    """Return an error that says which artifacts are stale, why, and how long each took to make."""
    parts = []
    for name in reasons:
        if present is not None and name in present.artifacts:
            manifest = artifacts.read_manifest(present.folder(root, name))
            parts.append(f"{name} ({duration(manifest.seconds if manifest else 0.0)})")
    what = "; ".join(dict.fromkeys(reasons.values()))
    return InputError(
        f"{what}. Stale, with the time each took: {', '.join(parts) or 'nothing'}; add {flag('overwrite')} to make them again, "
        f"or undo that change"
    )


def _log_result(root: Location, there: list[Generation]) -> None:
    made = there[-1]
    counted = ", ".join(f"{count:,} {name}" for name, count in made.counts.items())
    logger.info("refresh: generation %d: %s, in %s", made.number, counted, duration(made.seconds))
    if made.advice:
        logger.info("refresh: %s", made.advice)
    if made.advice.startswith(ADAPT_AGAIN) and (command := command_to_adapt(root, there)):
        logger.info("refresh: train its adapter on what is new, then merge, and refresh with the result: %s", command)


@dataclass
class _Making:
    """Makes the artifacts of one refresh."""

    config: RefreshConfig
    root: Location
    there: list[Generation]
    settings: dict[str, Any]
    stale: frozenset[str]
    """Names of the artifacts that changed options make stale."""

    def __post_init__(self) -> None:
        self.present = self.there[-1] if self.there else None
        self.number = next_number(self.root, self.there)
        self.folder = self.root / FOLDER_NAME / f"{self.number:05d}"
        self._started_s = time.monotonic()
        self._made: dict[str, Artifact] = {}
        self._opened: dict[str, Artifact] = {}

    def source_fingerprint(self) -> str:
        """Return a fingerprint of the present content of the source.

        Raises:
            InputError: the source does not exist, or holds no passages.
        """
        from readapt_ray.sources.opening import open_source

        values: Any = stage_config("ingest", self.settings["ingest"], RULES, source=self.settings["source"], output="-")
        source = open_source(values.source, values.format, values.read_options())
        source.check()
        return source.fingerprint()

    def is_complete(self, fingerprint: str) -> bool:
        """Return whether the present generation is already what this refresh would make."""
        there = self.present.artifacts if self.present else {}
        has_export = EXPORT in there or not self.settings["to"]
        is_same = self.present is not None and self.present.source_fingerprint == fingerprint
        return is_same and has_export and not self.stale and not begun_export(self.root, self.number)

    def make(self, fingerprint: str) -> Generation | None:
        """Make the new artifacts and return the new generation; None if passages and judgements are unchanged."""
        corpus = self._corpus(fingerprint)
        changes = self._changes(corpus)
        if changes is not None and changes.other_columns:
            logger.info("refresh: the kept columns of %s differ", amount(changes.other_columns, "passages"))
        if changes is not None and changes.is_empty and self._has_same_labels(corpus):
            if CORPUS in self._made:
                self._made.pop(CORPUS)
                remove_artifact(corpus.location)
            if not self.stale and EXPORT in self._needed():
                return None
            corpus = self._present(CORPUS)
        self._refuse_shrunk(corpus)
        vectors = self._vectors(corpus)
        moved = self._index(vectors, changes)
        self._export(corpus, vectors)
        return self._generation(corpus, vectors, changes, moved)

    def _needed(self) -> set[str]:
        """Return the artifacts that the present generation has. If no export is wanted, it counts as present."""
        there = set(self.present.artifacts) if self.present else set()
        return there if self.settings["to"] else there | {EXPORT}

    def _present(self, name: str) -> Artifact:
        assert self.present is not None
        if name not in self._opened:
            self._opened[name] = artifacts.open_artifact(self.present.folder(self.root, name), STAGE_OF[name])
        return self._opened[name]

    def _has(self, name: str) -> bool:
        """Return whether the present generation has the artifact, and it is not stale."""
        return self.present is not None and name in self.present.artifacts and name not in self.stale

    def _run(self, name: str, *, overwrite: bool = True, **wired: Any) -> Artifact:
        """Make an artifact of the new generation. Leftovers of an unfinished refresh are resumed or replaced."""
        stage = STAGE_OF[name]
        output = (self.folder / name).uri
        self._made[name] = make(stage, self.settings[stage], RULES, output=output, overwrite=overwrite, **wired)
        return self._made[name]

    def _exported_corpus(self, begun: Mapping[str, Any]) -> Artifact:
        """Return the corpus of an unfinished export, which must be finished first: the collection is half changed.

        So this refresh does not read the source; the next one does.
        """
        if (self.folder / CORPUS).exists():
            self._made[CORPUS] = artifacts.open_artifact((self.folder / CORPUS).uri, "ingest")
            corpus = self._made[CORPUS]
        elif self._has(VECTORS) and self._has(EXPORT):  # with these options nothing would be exported again
            raise InputError(
                f"a `readapt refresh` with --back or other options did not end, and {begun['config']['to']} is half "
                f"changed; run that command again"
            )
        else:
            corpus = self._present(CORPUS)
        logger.info("refresh: generation %d was being exported and is finished first", self.number)
        return corpus

    def _forget_other_export(self, begun: Mapping[str, Any]) -> None:
        """Give up an unfinished export to another target. Its collection stays half changed, so `overwrite` must be set."""
        there, now = begun["config"].get("to"), self.settings["to"]
        if there and not self.config.overwrite:
            raise InputError(
                f"a refresh that did not end has begun to export to {there}, and this one exports to {now or 'no target'}; "
                f"finish it with --to {there}, or add {flag('overwrite')} to leave that collection as it is"
            )
        if there:
            logger.warning("refresh: %s is left as it is, half changed", there)
        remove_artifact(self.folder / EXPORT)

    def _corpus(self, fingerprint: str) -> Artifact:
        begun = begun_export(self.root, self.number)
        if begun and begun["config"].get("to", "") == self.settings["to"]:
            return self._exported_corpus(begun)
        if begun:
            self._forget_other_export(begun)
        if self.present is not None and self._has(CORPUS) and self.present.source_fingerprint == fingerprint:
            return self._present(CORPUS)
        previous = self._present(CORPUS).uri if self._has(CORPUS) else None
        return self._run(CORPUS, source=self.settings["source"], previous=previous)

    def _changes(self, corpus: Artifact) -> Changes | None:
        return None if self.present is None else compare_corpora(self._present(CORPUS), corpus)

    def _has_same_labels(self, corpus: Artifact) -> bool:
        """Return whether queries and qrels are the same as in the present generation."""
        found = []
        for each in (corpus, self._present(CORPUS)):
            files = [*(each.location / "queries").files(), *(each.location / "qrels").files()]
            found.append([(file.name, file.sha256()) for file in files])
        return found[0] == found[1]

    def _refuse_shrunk(self, corpus: Artifact) -> None:
        if self.present is None or self.config.allow_shrink:
            return
        now, before = (each.manifest.counts["num_passages"] for each in (corpus, self._present(CORPUS)))
        if now < _MIN_KEPT * before:
            raise CorpusError(
                f"{self.settings['source']!r} has {amount(now, 'passages')}, and generation {self.present.number} has {before:,}; see that "
                f"the source is whole, or add {flag('allow_shrink')} if it really lost so many"
            )

    def _vectors(self, corpus: Artifact) -> Artifact:
        has_vectors = self._has(VECTORS)
        if has_vectors and CORPUS not in self._made:
            return self._present(VECTORS)
        wired = {"retriever": self.settings["retriever"], "corpus": corpus.uri}
        try:
            return self._run(VECTORS, **wired, previous=self._present(VECTORS).uri if has_vectors else None)
        except FingerprintMismatchError as error:
            if not self.config.overwrite:
                raise FingerprintMismatchError(
                    f"{str(error).rpartition('; ')[0]}: vectors, index and export are stale; add {flag('overwrite')} to make "
                    f"them again, or embed as the present generation was"
                ) from error
            self.stale |= {VECTORS, INDEX, EXPORT}
            return self._run(VECTORS, **wired)

    def _index(self, vectors: Artifact, changes: Changes | None) -> int:
        """Make the index, and return how many vectors were added or deleted since it was last built from scratch."""
        has_index = self._has(INDEX)
        if self.present is None or changes is None or not has_index:
            self._run(INDEX, vectors=vectors.uri)
            return 0
        if VECTORS not in self._made:
            return self.present.index_changes
        moved = self.present.index_changes + changes.added + 2 * changes.changed + changes.deleted
        if moved <= MAX_INDEX_CHANGES * vectors.manifest.counts["num_vectors"]:
            try:
                self._run(INDEX, vectors=vectors.uri, previous=self._present(INDEX).uri)
                return moved
            except FingerprintMismatchError as error:
                logger.info("refresh: the index is built as a whole: %s", error)
        self._run(INDEX, vectors=vectors.uri)
        return 0

    def _export(self, corpus: Artifact, vectors: Artifact) -> None:
        to, has_export = self.settings["to"], self._has(EXPORT)
        if not to or (has_export and VECTORS not in self._made):
            return
        previous = self._present(EXPORT).uri if has_export else None
        wired = {"corpus": corpus.uri} if self.settings["export"].get("with_text", True) else {}
        overwrite = self.config.overwrite
        self._run(EXPORT, overwrite=overwrite, vectors=vectors.uri, to=to, previous=previous, **wired)

    def _generation(self, corpus: Artifact, vectors: Artifact, changes: Changes | None, moved: int) -> Generation:
        total = corpus.manifest.counts["num_passages"]
        shared = self.present.artifacts if self.present else {}
        if not self.settings["to"]:
            shared = {name: folder for name, folder in shared.items() if name != EXPORT}
        made = {name: f"{FOLDER_NAME}/{self.number:05d}/{name}" for name in self._made}
        entry = Generation(
            number=self.number,
            what="refresh",
            created=generations.now(),
            seconds=round(
                max(time.monotonic() - self._started_s, sum(each.manifest.seconds for each in self._made.values())), 3
            ),
            settings=self.settings,
            source_fingerprint=corpus.manifest.inputs["source"],
            artifacts={**shared, **made},
            counts={"added": total, "changed": 0, "deleted": 0, "kept": 0},
            index_changes=moved,
        )
        if self.present is None or changes is None:
            return entry
        is_same_model = VECTORS not in self.stale
        share = (changes.added + changes.changed + changes.deleted) / max(1, total)
        turnover = round(self.present.turnover + share, 4) if is_same_model else 0.0
        found = signals(
            opened(corpus, "passages"),
            opened(vectors, "vectors"),
            changes,
            shared=shared_files(vectors.location) if is_same_model else frozenset(),
            turnover=turnover,
            loss_of=functools.partial(adapter_loss, self.settings["retriever"]),
            loss_sample=self.config.loss_sample,
        )
        return replace(entry, counts=changes.counts(), signals=found.values(), advice=found.advice(), turnover=turnover)
