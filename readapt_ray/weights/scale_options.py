"""Read the scales of a merge as options: one knowledge scale or one per adapter, and factors for ranges of layers.

In: numbers and text of a command line or a file. Out: what the fields of a config hold, and `LayerScale`.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from readapt_ray.errors import InputError

_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?=(.*)", re.DOTALL)


@dataclass(frozen=True)
class LayerScale:
    """A factor of the knowledge scales in a range of layers."""

    first: int
    last: int
    """The last layer of the range, which is in it."""
    scale: float

    def __str__(self) -> str:
        return f"{self.layers}={self.scale!r}"

    @property
    def layers(self) -> str:
        """The range as it is written."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def layer_scales(items: Sequence[str]) -> tuple[LayerScale, ...]:
    """Read the ranges of an option, in the order of the layers.

    Raises:
        ValueError: an item is no range with a finite number, a range is reversed, or two overlap.
    """
    found = sorted(map(_layer_scale, items), key=lambda each: each.first)
    for one, other in pairwise(found):
        if other.first <= one.last:
            raise ValueError(f"{one} and {other} overlap; give each layer once")
    return tuple(found)


def _layer_scale(item: str) -> LayerScale:
    parts = _RANGE.fullmatch(item)
    try:
        scale = float(parts[3]) if parts else math.nan
    except ValueError:
        scale = math.nan
    if parts is None or not math.isfinite(scale):
        raise ValueError(
            f"{item!r}: write FIRST-LAST=NUMBER with a finite number, and commas between ranges, such as 0-11=0.8,12-23=0.2"
        )
    first, last = int(parts[1]), int(parts[2] or parts[1])
    if last < first:
        raise ValueError(f"{item!r} ends before it begins; write {last}-{first}={parts[3].strip()}")
    return LayerScale(first, last, scale)


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to; None for embeddings, the last norm and a pooler."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def factor_of(layers: Iterable[LayerScale], name: str) -> float:
    """Return what the knowledge scales of a tensor are multiplied by; 1 outside of all ranges."""
    layer = layer_of(name)
    return next((each.scale for each in layers if layer is not None and each.first <= layer <= each.last), 1.0)


def check_layers(layers: Sequence[LayerScale], names: Iterable[str]) -> None:
    """Check that a model has all layers of the ranges.

    Args:
        layers: the ranges.
        names: of all tensors of the model.

    Raises:
        InputError: it lacks one.
    """
    if not layers:
        return
    last = max((layer for name in names if (layer := layer_of(name)) is not None), default=None)
    if last is None:
        raise InputError(f"layer_scales = {str(layers[0])!r}: the model has no numbered layers; leave layer_scales out")
    beyond = [each for each in layers if each.last > last]
    if beyond:
        raise InputError(
            f"layer_scales = {str(beyond[0])!r}: the model has the layers 0 to {last}; give ranges of these"
        )


def _as_items(value: Any) -> Any:
    """Take a section of a file, too: {0-11: 0.8, 12-23: 0.2}."""
    return [f"{layers}={scale}" for layers, scale in value.items()] if isinstance(value, dict) else value


def _normal(items: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(str, layer_scales(items)))


def _scales_or_one(value: Any) -> Any:
    given = list(value) if isinstance(value, list | tuple) else [value]
    try:
        scales = [float(each) for each in given]
    except (TypeError, ValueError):
        scales = []
    if not scales or not all(math.isfinite(each) for each in scales) or any(isinstance(each, bool) for each in given):
        raise ValueError("give a finite number such as 0.5, or one for each adapter with commas between them")
    return scales[0] if len(scales) == 1 else tuple(scales)


LayerScalesOption = Annotated[tuple[str, ...], BeforeValidator(_as_items), AfterValidator(_normal)]
"""A field of a config: items FIRST-LAST=NUMBER."""
KnowledgeScaleOption = Annotated[float | tuple[float, ...], BeforeValidator(_scales_or_one)]
"""A field of a config: a finite number, or one per adapter."""
