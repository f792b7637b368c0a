"""Define the options of `readapt refresh`, `clean` and `find`; a refresh keeps the options of the one before."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from readapt_ray.config import Config
from readapt_ray.errors import InputError
from readapt_ray.generations import CORPUS, EXPORT, INDEX, SECTIONS, VECTORS, Generation, absolute
from readapt_ray.recipes.chain import Section, SectionRules, stage_config, stage_parts
from readapt_ray.targets.opening import parse


class RefreshConfig(Config):
    """Bring vectors, index and export of a root to what the source holds now.

    What is not given is as in the refresh before; the root of a run is refreshed with the run's adapted model and options.
    """

    root: str
    """Folder or URI that holds the generations; also the root of a `readapt run`."""
    source: str | None = None
    """The corpus as it is now: a folder, a file, a URI, `ir_datasets:NAME`, `hub:OWNER/NAME` or `python-docs:PACKAGE,...`. If
    omitted, the source of the previous refresh."""
    retriever: str | None = None
    """Model that makes the vectors: a catalog name, a folder, a GGUF file, a URI or a hub id. If omitted, the model of the previous refresh."""
    to: str | None = None
    """Vector database to keep up to date, as `readapt export --to`. If omitted, the target of the previous refresh, if it had one."""
    serve: str | None = None
    """YAML file with the options of a server that runs, as `readapt serve --config`. It is updated to the new generation."""
    back: int | None = Field(default=None, ge=1)
    """Number of an earlier generation to make the present one again. The source is not read."""
    allow_shrink: bool = False
    """Accept a source with less than half of the passages that the present generation has. Without this it is refused."""
    overwrite: bool = False
    """Make again all that other options or another model make stale. Without this they are refused."""
    loss_sample: int = Field(default=64, ge=0)
    """Number of new and of kept passages on which the language-model loss of the retriever's adapter is measured; 0 leaves it
    out. It loads the pretrained model."""
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
    """Remove generations that are not the present one, and what is left of deleted passages."""

    root: str
    """Folder or URI that holds the generations."""
    keep: int = Field(default=0, ge=0)
    """Number of generations before the present one to keep, to go back to. They hold what was deleted since."""
    yes: bool = False
    """Remove what is listed. Without this it is only listed."""

    safety: ClassVar[frozenset[str]] = frozenset({"keep", "yes"})


class FindConfig(Config):
    """Options of `readapt find`."""

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
"""What a changed option makes stale. Vectors follow a changed corpus passage by passage, so they are not stale as a whole;
another model is told by its content."""


def settled(config: RefreshConfig, present: Generation | None) -> dict[str, Any]:
    """Return the settings of a refresh: the given ones, and for the others the present generation's.

    Raises:
        InputError: there is no source or no retriever, the target is none, or an option of a section is wrong.
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
    """Return the artifacts that other options make stale, each with the first reason."""
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
    """Describe the options of a section that differ and decide what comes out."""
    config_class, _ = stage_parts(stage)
    changed = []
    for option in sorted(was.keys() | now.keys()):
        default = config_class.model_fields[option].default
        values = was.get(option, default), now.get(option, default)
        if values[0] != values[1] and option not in config_class.operational:
            changed.append(f"{stage}.{option}: {values[0]!r} there, {values[1]!r} now")
    return changed
