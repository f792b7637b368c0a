"""Define the options for reading a source."""

from dataclasses import dataclass, field
from typing import Final

from readapt_ray.sources.columns import ColumnChoice

DEFAULT_MAX_TEXT_BYTES: Final = 10_000_000
DEFAULT_MAX_PASSAGE_CHARS: Final = 2_000


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options for reading a source: limits, and which columns to read."""

    max_text_bytes: int = DEFAULT_MAX_TEXT_BYTES
    """A row whose title and text together have this many UTF-8 bytes or more is a bad row; so is such a text file."""
    max_passage_chars: int = DEFAULT_MAX_PASSAGE_CHARS
    """Text files are split into passages of at most this many characters."""

    columns: ColumnChoice = field(default_factory=ColumnChoice)
    """Which columns hold doc_id, title and text, and which are kept besides."""

    @property
    def max_line_bytes(self) -> int:
        """The longest line held in memory, in bytes: a text of maximum length with every character escaped, plus 1 MB."""
        return 6 * self.max_text_bytes + (1 << 20)
