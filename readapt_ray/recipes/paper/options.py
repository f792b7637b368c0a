"""Define the options of `readapt paper`, and find the corpora named in them."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field, field_validator

from readapt_ray.catalog import corpora
from readapt_ray.config import Config
from readapt_ray.errors import CorpusError
from readapt_ray.evaluation.measure_options import MeasureOption
from readapt_ray.recipes.chain import Section
from readapt_ray.recipes.paper.variants import EXPERIMENTS
from readapt_ray.storage import Location
from readapt_ray.weights.scale_options import LayerScalesOption

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


class PaperConfig(Config):
    """Options of `readapt paper`."""

    root: str = "readapt-paper"
    """Folder or URI to write all artifacts and tables to."""
    experiments: tuple[str, ...] = ("table1",)
    """Experiments to run, separated by commas: table1, table2, table3, figure2, baselines; or all."""
    retriever: str = "e5-mistral"
    """Model to adapt: a catalog name, a folder, a GGUF file, a URI or a hub id."""
    pretrained: str | None = None
    """Model before retrieval training: a catalog name, a folder, a GGUF file, a URI or a hub id. If omitted, the model that
    the catalog names for the retriever."""
    corpora: tuple[str, ...] = tuple(row.name for row in corpora.CORPORA)
    """Corpora, separated by commas: names of the catalog, or NAME=SOURCE with any source of `readapt ingest`. If
    omitted, the paper's fourteen."""
    general: str = "msmarco"
    """Corpus whose adapter table3 uses on all others: a name of the catalog, or NAME=SOURCE."""
    data: str | None = None
    """Folder that holds a BEIR folder for each corpus, under its name. If omitted, the corpora are downloaded with
    ir_datasets."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the adapters, separated by commas. Results are averaged over them."""
    sizes: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    """Numbers of training passages for figure2, separated by commas. Numbers above the size of a corpus are left out."""
    readapter_scale: float = 1.0
    """Weight of the retriever's change to the pretrained model; 1.0 is the paper's value."""
    knowledge_scale: float = 0.5
    """Weight of the adapter's change to the pretrained model; 0.5 is the paper's value."""
    layer_scales: LayerScalesOption = ()
    """Factors of knowledge_scale in ranges of layers, such as 0-11=0.8,12-23=0.2; the paper has none."""
    measure: MeasureOption = "nDCG@10"
    """Measure to compare by."""
    train: Section = Field(default_factory=dict)
    """Options of train and pack by name (in a YAML file)."""
    embed: Section = Field(default_factory=dict)
    """Options of embed by name (in a YAML file)."""
    search: Section = Field(default_factory=dict)
    """Options of search by name (in a YAML file)."""

    inputs: ClassVar[frozenset[str]] = frozenset({"root", "retriever", "pretrained", "corpora", "general", "data"})

    @field_validator("experiments", mode="after")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wanted = tuple(EXPERIMENTS) if value == ("all",) else value
        unknown = [each for each in wanted if each not in EXPERIMENTS]
        if unknown or not wanted:
            raise ValueError(f"give some of {', '.join(EXPERIMENTS)}, or all")
        return wanted

    @field_validator("corpora", mode="after")
    @classmethod
    def _joined(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Join the packages of `NAME=python-docs:A,B` again, which were split at the comma."""
        joined: list[str] = []
        for each in value:
            is_package = joined and "=python-docs:" in joined[-1] and "=" not in each
            if is_package and corpora.find_corpus(each) is None:
                joined[-1] += f",{each}"
            else:
                joined.append(each)
        return tuple(joined)

    @field_validator("corpora", "seeds", mode="after")
    @classmethod
    def _some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("give at least one, and none twice")
        return value


@dataclass(frozen=True)
class Collection:
    """A corpus of the reproduction: its source, and how its queries are searched and judged.

    `split` is the split of its qrels, `task` the instruction for its queries (empty if it has none), and
    `drops_self_hits` whether a result whose doc_id equals the query_id is dropped.
    """

    name: str
    source: str
    split: str = "test"
    task: str = ""
    drops_self_hits: bool = False


def collection(text: str, data: str | None) -> Collection:
    """Return the corpus that a text names. It is not opened.

    With NAME=SOURCE, a NAME of the catalog keeps the catalog's split and task; any other has the split test and no
    task.

    Args:
        text: a catalog name, or NAME=SOURCE.
        data: folder that may hold a BEIR folder named after the corpus; None if the user gave none.

    Raises:
        CorpusError: the text is neither, or the catalog name is also a folder in the current folder.
    """
    name, mark, source = text.partition("=")
    row = corpora.find_corpus(name)
    if mark and row is None:
        if not _NAME.fullmatch(name) or not source:
            raise CorpusError(f"corpus {text!r} is not NAME=SOURCE; a name has letters, digits, '.', '_' and '-'")
        return Collection(name, source)
    row = row or corpora.corpus(name)
    if not mark:
        folder = Location(data) / row.name if data else None
        in_data = folder is not None and folder.is_folder()
        if not in_data and Location(row.name).exists():
            raise CorpusError(
                f"{name!r} is a corpus of the catalog and a folder here; give {row.name}={row.name} if the folder holds that "
                f"corpus, my-{row.name}={row.name} if it holds another, or rename it to fetch the catalog's"
            )
        source = folder.uri if folder is not None and in_data else row.name
    return Collection(row.name, source, row.split, row.task, row.drops_self_hits)
