"""Split the text of a list option at its commas."""

_CLOSING = {"(": ")", "[": "]", "{": "}"}


def split_list(text: str) -> list[str]:
    """Split a text at its commas, except those in brackets or in double quotes.

    `nDCG(gains={0:0,1:1})@10,R@100` has two items, and so has `"my,run.trec",other.trec`. Quotes are special only at the
    beginning of an item or after its `=`, and are removed. A bracket or quote that is not closed is an ordinary
    character. Empty items are left out.
    """
    return [item for item in items_with_empty(text) if item]


def items_with_empty(text: str) -> list[str]:
    """Split a text as `split_list` does, and keep empty items."""
    items, item, at = [], "", 0
    while at < len(text):
        character = text[at]
        end = text.find('"', at + 1) if character == '"' and (not item.strip() or item.endswith("=")) else -1
        if end > 0:
            item += text[at + 1 : end]
            at = end + 1
        elif character == ",":
            items.append(item)
            item, at = "", at + 1
        else:
            end = _closing(text, at)
            item += text[at:end]
            at = end
    return [each.strip() for each in (*items, item)]


def _closing(text: str, at: int) -> int:
    """Return the index after the character at `at`. For an opening bracket: after its closing bracket, if it has one."""
    expected = []
    for place in range(at, len(text)):
        if text[place] in _CLOSING:
            expected.append(_CLOSING[text[place]])
        elif expected and text[place] == expected[-1]:
            expected.pop()
        if not expected:
            return place + 1
    return at + 1
