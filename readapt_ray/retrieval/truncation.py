"""Report how many tokens truncation cut from texts that are longer than a model's maximum length.

In: counts of shards or files. Out: a record for the manifest, and a sentence for log and report.
"""

import logging
from collections.abc import Mapping
from typing import Any

from readapt_ray.progress import amount

logger = logging.getLogger("readapt_ray")

_WARNED_SHARE = 0.05
"""Above this share of lost tokens, a warning is logged."""


def truncation(
    *, num_texts: int, num_truncated: int, num_tokens: int, num_lost: int, max_tokens: int, num_copied: int = 0
) -> dict[str, Any]:
    """Return a record of truncation for the manifest.

    Args:
        num_texts: texts that were tokenised.
        num_truncated: how many of them were longer than the maximum.
        num_tokens: tokens that were kept.
        num_lost: tokens that were cut off.
        max_tokens: the maximum length of a text in tokens.
        num_copied: vectors that were copied from earlier ones, whose texts are not counted.

    Returns:
        `num_texts`, `num_truncated`, `num_lost_tokens`, `lost_share` (lost of all tokens, 0 to 1) and `max_tokens`; and
        `num_copied` unless it is 0.
    """
    share = num_lost / max(1, num_tokens + num_lost)
    return {
        "num_texts": num_texts,
        "num_truncated": num_truncated,
        "num_lost_tokens": num_lost,
        "lost_share": round(share, 4),
        "max_tokens": max_tokens,
        **({"num_copied": num_copied} if num_copied else {}),
    }


def sentence(found: Mapping[str, Any]) -> str:
    """Describe truncation: "12 of 300 passages truncated to 512 tokens, 3.4% of the tokens lost".

    If nothing was truncated: "no passage is longer than 512 tokens". If vectors were copied, it says that their passages
    are not counted.

    Args:
        found: a record of `truncation`.
    """
    copied = found.get("num_copied", 0)
    behind = f" ({amount(copied, 'copied vectors')} not counted)" if copied else ""
    if not found["num_truncated"]:
        return f"no {'new ' if copied else ''}passage is longer than {found['max_tokens']:,} tokens{behind}"
    return (
        f"{found['num_truncated']:,} of {amount(found['num_texts'], 'new passages' if copied else 'passages')} truncated to "
        f"{found['max_tokens']:,} tokens, {100 * found['lost_share']:.1f}% of the tokens lost{behind}"
    )


def warn_of_loss(stage: str, found: Mapping[str, Any], advice: str) -> None:
    """Log a warning if more than 5% of the tokens were lost; else do nothing.

    Args:
        stage: name of the stage that truncated.
        found: a record of `truncation`.
        advice: how to keep more of the texts; ends the message.
    """
    if found["lost_share"] > _WARNED_SHARE:
        logger.warning("%s: %s; %s", stage, sentence(found), advice)
