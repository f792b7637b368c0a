"""List what each experiment compares, one variant per row.

A variant is a model made of the pretrained model, the retriever and an adapter, and searched with. The
first variant of an experiment is its baseline.
"""

from dataclasses import dataclass
from typing import Literal

BASE = "base"
READAPTED = "readapted"

Domain = Literal["own", "general", "other"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model that is searched with. Scales that are None are the reproduction's."""

    name: str
    domain: Domain = "own"
    """Whose passages the adapter is trained on: the corpus's own, the general one's, another one's."""
    passages: str = "all"
    """Which of them: all, judged, unjudged (by the test judgements), or a number of them."""
    method: Literal["dora", "lora"] = "dora"
    continues_retriever: bool = False
    """The adapter is trained on the retriever itself and stays there: plain continued training."""
    readapter_scale: float | None = None
    knowledge_scale: float | None = None

    @property
    def is_base(self) -> bool:
        """Whether it is the retriever as published."""
        return self.name == BASE

    @property
    def has_seed(self) -> bool:
        """Whether a seed changes it: only if it contains a trained adapter."""
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
"""Every experiment and what it compares."""


def variants_of(experiment: str, sizes: tuple[int, ...] = ()) -> list[Variant]:
    """Return the variants of an experiment, its baseline first; `sizes` are the numbers of passages of figure2."""
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
