"""Parse and check the scales of a merge as options: one knowledge scale or one per adapter, and factors per layer.

In: numbers and text of a command line or a file. Out: values for the fields of a config, and `LayerScale`.
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
    """A factor that multiplies the knowledge scales in a range of layers."""

    first: int
    last: int
    """The last layer of the range, inclusive."""
    scale: float

    def __str__(self) -> str:
        return f"{self.layers}={self.scale!r}"

    @property
    def layers(self) -> str:
        """The range as a user writes it: 3 or 0-11."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def layer_scales(items: Sequence[str]) -> tuple[LayerScale, ...]:
    """Parse items FIRST-LAST=NUMBER (both layers included) or LAYER=NUMBER, and sort them by layer.

    Raises:
        ValueError: an item is not of this form, its number is not finite, a range is reversed, or two overlap.
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
    """Return the number of the layer that a tensor belongs to; None for embeddings, the final norm and a pooler.

    It is the first part of the name that is a number: 3 for "layers.3.mlp.up_proj.weight".
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def factor_of(layers: Iterable[LayerScale], name: str) -> float:
    """Return the factor of a tensor's knowledge scales; 1 if its layer is in no range."""
    layer = layer_of(name)
    return next((each.scale for each in layers if layer is not None and each.first <= layer <= each.last), 1.0)


def check_layers(layers: Sequence[LayerScale], names: Iterable[str]) -> None:
    """Check that a model has all layers that the ranges name. Without ranges, nothing is checked.

    Args:
        layers: the ranges.
        names: names of all tensors of the model.

    Raises:
        InputError: the model lacks a layer.
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
    """Turn a section of a YAML file into items: {0-11: 0.8, 12-23: 0.2} into 0-11=0.8 and 12-23=0.2."""
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
"""Type of a config field with items FIRST-LAST=NUMBER."""
KnowledgeScaleOption = Annotated[float | tuple[float, ...], BeforeValidator(_scales_or_one)]
"""Type of a config field with a finite number, or one per adapter."""
