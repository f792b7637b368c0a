"""Which passages are packed into blocks, and how: options of pack, and of train where it packs passages itself."""

from typing import Literal

from pydantic import Field

from readapt_ray.config import Config


class PackOptions(Config):
    """The options that decide what is in a block."""

    mode: Literal["passage", "packed"] = "passage"
    """passage: a block is one passage, as in the paper; packed: passages end to end, none seeing another."""
    block_tokens: int = Field(default=1024, ge=8)
    """Longest passage, and in packed mode the length of a block, in tokens; unless given no more than the model's positions."""
    exclude: str | None = None
    """Passages to leave out: a file with a doc_id a line, a Parquet or JSONL file with the column doc_id, or qrels."""
    only: str | None = None
    """Passages to take, and no others: a file as for exclude."""


PACK_OPTIONS = tuple(PackOptions.model_fields)
"""What train hands on to pack, where it is given passages."""
