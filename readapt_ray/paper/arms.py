"""What each experiment compares: arms, a row each.

An arm is a model made of the pretrained model, the retriever and an adapter, and searched with. The
first arm of an experiment is its baseline.
"""

from dataclasses import dataclass
from typing import Literal

BASE = "base"
READAPTED = "readapted"

Domain = Literal["own", "general", "other"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model that is searched with. Scales that are None are those of the study."""

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
        """The retriever as it is."""
        return self.name == BASE

    @property
    def has_seed(self) -> bool:
        """Whether a seed changes it: not where nothing of a trained adapter is in it."""
        return not self.is_base and self.knowledge_scale != 0.0


_BASE = Arm(name=BASE)
_READAPTED = Arm(name=READAPTED)

EXPERIMENTS: dict[str, str] = {
    "table1": "the retriever as it is and RE-adapted (the paper's Table 1)",
    "table2": "an adapter from passages without a test judgement, with one, and from all (Table 2)",
    "table3": "the adapter of the general corpus on every other corpus (Table 3)",
    "figure2": "adapters from ever more passages of a corpus (gain over corpus size, Figure 2)",
    "baselines": "what the paper lacks: the adapter alone, the readapter at other scales, a wrong domain, plain LoRA, "
    "continued training of the retriever itself",
}
"""Every experiment and what it compares."""


def arms_of(experiment: str, sizes: tuple[int, ...] = ()) -> list[Arm]:
    """The arms of an experiment, its baseline first; `sizes` are the numbers of passages of figure2."""
    further = {
        "table1": [],
        "table2": [
            Arm(name="unjudged passages", passages="unjudged"),
            Arm(name="judged passages", passages="judged"),
        ],
        "table3": [Arm(name="general adapter", domain="general")],
        "figure2": [Arm(name=f"{size:,} passages", passages=str(size)) for size in sorted(sizes)],
        "baselines": [
            Arm(name="knowledge alone", readapter_scale=0.0, knowledge_scale=1.0),
            Arm(name="readapter 0.5", readapter_scale=0.5, knowledge_scale=0.0),
            Arm(name="readapter 1.5", readapter_scale=1.5, knowledge_scale=0.0),
            Arm(name="wrong domain", domain="other"),
            Arm(name="plain LoRA", method="lora"),
            Arm(name="continued training", continues_retriever=True),
        ],
    }[experiment]
    return [_BASE, _READAPTED, *further]
