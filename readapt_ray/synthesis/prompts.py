"""Build the prompts that ask a language model for a query about a passage."""

from typing import Final

PASSAGE_FIELD: Final = "{passage}"
DEFAULT_PROMPT: Final = (
    "Here is a passage:\n\n{passage}\n\n"
    "Write one question that a person would type into a search engine and that this passage answers. Use other words than "
    "the passage where you can. Reply with the question alone."
)


def passage_text(title: str | None, text: str, max_chars: int) -> str:
    """Join title and text of a passage by a line break, and cut them to at most `max_chars` characters.

    The cut is after a whole word; in the middle if the first `max_chars` characters have no space. An empty or missing
    title adds nothing.
    """
    whole = "\n".join(each.strip() for each in (title or "", text) if each.strip())
    if len(whole) <= max_chars:
        return whole
    cut = whole[: max_chars + 1]
    return cut[: max(cut.rfind(" "), cut.rfind("\n"), 0) or max_chars].rstrip()


def fill(prompt: str, passage: str) -> str:
    """Replace `{passage}` in a prompt by a passage; other braces stay unchanged."""
    return prompt.replace(PASSAGE_FIELD, passage)
