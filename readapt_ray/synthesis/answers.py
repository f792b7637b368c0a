"""Define the interface between a stage and the language model that answers its prompts."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Ask(NamedTuple):
    """A prompt for the language model."""

    number: int
    """Number of the prompt among all prompts of the job, from 0; it is part of the random seed."""
    prompt: str


class Answer(NamedTuple):
    """What the language model wrote."""

    text: str
    """The answer without the prompt; may be empty."""
    num_tokens: int
    """Number of tokens in prompt and answer; an estimate if the endpoint does not report it."""


class Writer(Protocol):
    """Interface of a language model that answers prompts."""

    def answer(self, asks: Sequence[Ask], *, temperature: float, max_tokens: int, seed: int) -> list[Answer]:
        """Return an answer to each prompt, in the same order.

        Args:
            asks: the prompts, with their numbers in the job.
            temperature: sampling temperature; 0 takes the likeliest token.
            max_tokens: maximum number of tokens per answer.
            seed: seed of the sampling; combined with the numbers of the prompts.
        """
        ...
