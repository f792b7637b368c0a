"""What passes between a stage that asks and a language model that answers."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Ask(NamedTuple):
    """One prompt."""

    number: int
    """Number of the prompt among all of the job; seeds the sampling."""
    prompt: str


class Answer(NamedTuple):
    """What the language model wrote."""

    text: str
    num_tokens: int
    """Tokens of prompt and answer."""


class Writer(Protocol):
    """A language model that answers prompts."""

    def answer(self, asks: Sequence[Ask], *, temperature: float, max_tokens: int, seed: int) -> list[Answer]:
        """Return an answer to each prompt, in their order."""
        ...
