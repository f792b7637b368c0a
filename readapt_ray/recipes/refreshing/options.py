"""Define the options of `readapt refresh`, `clean` and `find`, and combine them with those of the previous refresh."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from readapt_ray.config import Config
from readapt_ray.errors import InputError
from readapt_ray.generations import CORPUS, EXPORT, INDEX, SECTIONS, VECTORS, Generation, absolute
from readapt_ray.recipes.chain import Section, SectionRules, stage_config, stage_parts
from readapt_ray.targets.opening import parse


class RefreshConfig(Config):
    """Update vectors, index and export of a root to the present content of the source.

    Options that are not given are as in the previous refresh. The root of a `readapt run` is refreshed with the run's adapted
    model and options.
    """

    root: str
    """Folder or URI that holds the generations; also the root of a `readapt run`."""
    source: str | None = None
    """The corpus as it is now: a folder, a file, a URI, `ir_datasets:NAME`, `hub:OWNER/NAME` or `python-docs:PACKAGE,...`. If
    omitted, the source of the previous refresh."""
    retriever: str | None = None
    """Model that makes the vectors: a catalog name, a folder, a GGUF file, a URI or a hub id. If omitted, the model of the previous refresh."""
    to: str | None = None
    """Vector database to keep up to date, as for `readapt export --to`. If omitted, that of the previous refresh, if any."""
    serve: str | None = None
    """YAML file with the options of a running server, as for `readapt serve --config`. The server is updated to the new
    generation."""
    back: int | None = Field(default=None, ge=1)
    """Number of an earlier generation to make the present one again. The source is not read."""
    allow_shrink: bool = False
    """Accept a source with less than half of the passages that the present generation has. Without this it is refused."""
    overwrite: bool = False
    """Make all artifacts again that other options or another model make stale. Without this, such options are refused."""
    loss_sample: int = Field(default=64, ge=0)
    """Number of new passages, and of kept ones, on which to measure the language-model loss of the retriever's adapter. This
    loads the pretrained model. 0 turns it off."""
    ingest: Section | None = None
    """Options of ingest. If omitted, the options of the previous refresh; the same holds for the other sections."""
    embed: Section | None = None
    """Options of embed."""
    index: Section | None = None
    """Options of index."""
    export: Section | None = None
    """Options of export."""

    inputs: ClassVar[frozenset[str]] = frozenset({"source", "retriever", "to", "serve"})
    safety: ClassVar[frozenset[str]] = frozenset({"allow_shrink", "overwrite"})


class CleanConfig(Config):
    """Remove earlier generations, and the last copies of deleted passages."""

    root: str
    """Folder or URI that holds the generations."""
    keep: int = Field(default=0, ge=0)
    """Number of generations before the present one to keep, to go back to. They hold passages that were deleted since."""
    yes: bool = False
    """Remove the listed artifacts. Without this they are only listed."""

    safety: ClassVar[frozenset[str]] = frozenset({"keep", "yes"})


class FindConfig(Config):
    """Options of `readapt find`, which finds a passage in the artifacts under a root."""

    root: str
    """Folder or URI that holds the generations."""
    doc_id: str
    """Id of the passage."""


_BY_REFRESH = "a refresh passes the generation before by itself; leave it out"
RULES = SectionRules(
    recipe="the refresh",
    refused={
        "ingest": {"previous": _BY_REFRESH},
        "embed": {"previous": _BY_REFRESH, "sample": "a refresh needs vectors of all passages; leave it out"},
        "index": {"previous": _BY_REFRESH},
        "export": {"previous": _BY_REFRESH},
    },
)
_AFTER = {
    "ingest": (CORPUS,),
    "embed": (VECTORS, INDEX, EXPORT),
    "index": (INDEX,),
    "to": (EXPORT,),
    "export": (EXPORT,),
}
"""The artifacts that a changed option makes stale. If options of ingest change the corpus, vectors are updated passage by
passage, so they are not stale. A changed model is found by its fingerprint, not here."""


def settled(config: RefreshConfig, present: Generation | None) -> dict[str, Any]:
    """Return the settings of a refresh: the given options, and for others the settings of the present generation.

    A given section replaces the earlier one as a whole. Local paths of source and retriever become absolute.

    Raises:
        InputError: source or retriever is missing, the target is not a known one, or an option of a section is wrong.
    """
    before = present.settings if present else {}
    names = ("source", "retriever", "to", *SECTIONS)
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    given |= {name: absolute(given[name]) for name in ("source", "retriever") if name in given}
    if "to" in given and not (address := parse(given["to"])).host:
        given["to"] = address.uri
    settings = {"to": None, **{name: {} for name in SECTIONS}, **before, **given}
    if missing := [name for name in ("source", "retriever") if not settings.get(name)]:
        raise InputError(
            f"{config.root!r} was never refreshed, so give --{' and --'.join(missing)}; later refreshes know them"
        )
    wired: dict[str, dict[str, str]] = {
        "ingest": {"source": settings["source"]},
        "embed": {"retriever": settings["retriever"], "corpus": "-"},
        "index": {"vectors": "-"},
    }
    if settings["to"]:
        wired["export"] = {"vectors": "-", "corpus": "-", "to": settings["to"]}
    elif settings["export"]:
        raise InputError("section 'export' has options, and there is no target; give one with --to")
    for stage, options in wired.items():
        stage_config(stage, settings[stage], RULES, **options, output="-", overwrite=True)
    return settings


def stale(settings: Mapping[str, Any], present: Generation | None) -> dict[str, str]:
    """Return the artifacts ("vectors", "index" ...) that changed options make stale, each with the first reason.

    Empty if nothing changed, or if there is no present generation.
    """
    before = present.settings if present else settings
    found: dict[str, str] = {}
    for name, artifacts in _AFTER.items():
        was, now = before.get(name), settings[name]
        if name in SECTIONS:
            changed = _changed_options(name, was or {}, now)
        else:
            changed = [f"{name}: {was!r} there, {now!r} now"] if was is not None and was != now else []
        for artifact in artifacts if changed else ():
            found.setdefault(artifact, "; ".join(changed))
    return found


def _changed_options(stage: str, was: Section, now: Section) -> list[str]:
    """Describe the changed options of a section that affect the result."""
    config_class, _ = stage_parts(stage)
    changed = []
    for option in sorted(was.keys() | now.keys()):
        default = config_class.model_fields[option].default
        values = was.get(option, default), now.get(option, default)
        if values[0] != values[1] and option not in config_class.operational:
            changed.append(f"{stage}.{option}: {values[0]!r} there, {values[1]!r} now")
    return changed
