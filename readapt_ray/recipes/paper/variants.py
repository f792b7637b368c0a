"""List the variants that each experiment compares.

A variant is a model to search with, made from the pretrained model, the retriever and an adapter. The first variant of
an experiment is its baseline.
"""

from dataclasses import dataclass
from typing import Literal

BASE = "base"
READAPTED = "readapted"

Domain = Literal["own", "general", "other"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model to search with. A scale of None means the scale in the options of `readapt paper`."""

    name: str
    domain: Domain = "own"
    """Corpus to train the adapter on: the searched corpus itself, the general corpus, or another one of the corpora."""
    passages: str = "all"
    """Passages of it to train on: all, judged, unjudged (by the test judgements), or a number of random ones."""
    method: Literal["dora", "lora"] = "dora"
    continues_retriever: bool = False
    """Whether the adapter is trained on the retriever itself and applied to it: plain continued training."""
    readapter_scale: float | None = None
    knowledge_scale: float | None = None

    @property
    def is_base(self) -> bool:
        """Whether the variant is the unchanged retriever."""
        return self.name == BASE

    @property
    def has_seed(self) -> bool:
        """Whether the variant depends on the seed, because it contains a trained adapter."""
        return not self.is_base and self.knowledge_scale != 0.0


_BASE = Variant(name=BASE)
_READAPTED = Variant(name=READAPTED)

EXPERIMENTS: dict[str, str] = {
    "table1": "the retriever as it is and RE-adapted (the paper's Table 1)",
    "table2": "an adapter from passages without a test judgement, with one, and from all (Table 2)",
    "table3": "the adapter of the general corpus on every other corpus (Table 3)",
    "figure2": "adapters from ever more passages of a corpus (gain over corpus size, Figure 2)",
    "baselines": "what the paper lacks: the adapter alone, the readapter at other scales, a wrong domain, plain LoRA, "
    "continued training of the retriever itself",
}
"""The experiments by name, and what each compares."""


def variants_of(experiment: str, sizes: tuple[int, ...] = ()) -> list[Variant]:
    """Return the variants of an experiment, baseline first, then "readapted", which every experiment has.

    `sizes` are the numbers of passages for figure2; other experiments ignore them.
    """
    further = {
        "table1": [],
        "table2": [
            Variant(name="unjudged passages", passages="unjudged"),
            Variant(name="judged passages", passages="judged"),
        ],
        "table3": [Variant(name="general adapter", domain="general")],
        "figure2": [Variant(name=f"{size:,} passages", passages=str(size)) for size in sorted(sizes)],
        "baselines": [
            Variant(name="knowledge alone", readapter_scale=0.0, knowledge_scale=1.0),
            Variant(name="readapter 0.5", readapter_scale=0.5, knowledge_scale=0.0),
            Variant(name="readapter 1.5", readapter_scale=1.5, knowledge_scale=0.0),
            Variant(name="wrong domain", domain="other"),
            Variant(name="plain LoRA", method="lora"),
            Variant(name="continued training", continues_retriever=True),
        ],
    }[experiment]
    return [_BASE, _READAPTED, *further]
