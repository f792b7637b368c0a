"""Define the options of packing, for pack, and for train if it packs passages itself."""

from typing import Literal

from pydantic import Field

from readapt_ray.config import Config


class PackOptions(Config):
    """Options that decide which passages are packed into blocks, and how."""

    mode: Literal["passage", "packed"] = "passage"
    """passage puts one passage in each block, as in the paper. packed fills each block with several passages that
    do not attend to each other; it is faster for short passages."""
    block_tokens: int = Field(default=1024, ge=8)
    """Maximum length of a passage in tokens, and the length of a block in packed mode; longer passages are
    truncated. If omitted, 1024 or the model's number of positions, whichever is smaller."""
    exclude: str | None = None
    """File of passages to leave out, for example of a test set: one doc_id per line, a Parquet or JSONL file
    with a column doc_id, or qrels. The id of a document that ingest split means all its passages."""
    withhold: int = Field(default=0, ge=0)
    """Number of passages, drawn at random, to leave out of training, so that `readapt drift` can measure the
    language-model loss on them."""
    only: str | None = None
    """File of the only passages to use; same formats as exclude."""
    new_since: str | None = None
    """An earlier state of the corpus, the output of `readapt ingest`. Only passages whose title and text are not in it
    are used."""


PACK_OPTIONS = tuple(PackOptions.model_fields)
"""Names of the options that train passes to pack if it is given passages."""
