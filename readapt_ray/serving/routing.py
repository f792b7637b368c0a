"""Which version answers a request: the one that it names, the default, or a share of the traffic."""

import hashlib
import random
from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from readapt_ray.config import Config
from readapt_ray.errors import InputError


class Routing(Config):
    """How requests that name no version are spread; replaced as a whole, between two requests."""

    default: str
    """The version that embeds, and searches unless there is a split."""
    split: dict[str, float] = Field(default_factory=dict)
    """Weight of each version among searches that name none; empty gives all of them to the default."""
    shadow: str = ""
    """A version that searches along, unseen by clients, to be compared with what they got."""
    shadow_share: float = Field(default=0.0, ge=0, le=1)
    """Share of searches that the shadow gets too."""
    recall_probe: float = Field(default=0.0, ge=0, le=1)
    """Share of searches that are made again exactly, to see what the index misses."""

    @model_validator(mode="after")
    def _weights_are_positive(self) -> Self:
        if self.split and (min(self.split.values()) < 0 or sum(self.split.values()) <= 0):
            raise ValueError("the weights of a split must be 0 or more, and one of them over 0")
        return self

    def check(self, names: Mapping[str, object]) -> None:
        """Refuse versions that are not served.

        Raises:
            InputError: one of them is not in `names`.
        """
        for option, name in [
            ("default", self.default),
            ("shadow", self.shadow),
            *(("split", each) for each in self.split),
        ]:
            if name and name not in names:
                raise InputError(f"{option} names {name!r}, which is not served; the versions are {', '.join(names)}")

    def of_search(self, user: str | None) -> str:
        """The version for a search that names none: the same for the same user, else by lot."""
        if not self.split:
            return self.default
        place = _place(user) if user else random.random()
        total = sum(self.split.values())
        for name, weight in self.split.items():
            place -= weight / total
            if place < 0:
                return name
        return max(self.split, key=self.split.__getitem__)

    def probes(self) -> bool:
        """Whether this search is to be made again exactly."""
        return random.random() < self.recall_probe

    def shadow_of(self, answered_by: str) -> str | None:
        """The version that is to search along with this one, this time; None for none."""
        if self.shadow and self.shadow != answered_by and random.random() < self.shadow_share:
            return self.shadow
        return None


def parse_split(entries: tuple[str, ...]) -> dict[str, float]:
    """`("base=0.1", "adapted=0.9")` as weights by name.

    Raises:
        InputError: an entry is not NAME=WEIGHT.
    """
    split = {}
    for entry in entries:
        name, _, weight = entry.partition("=")
        try:
            split[name] = float(weight)
        except ValueError:
            raise InputError(f"split entry {entry!r} is not NAME=WEIGHT, such as adapted=0.9") from None
    return split


def _place(user: str) -> float:
    """A number in [0, 1) that stays the same for a user."""
    return int.from_bytes(hashlib.sha256(user.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
