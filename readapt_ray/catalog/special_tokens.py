"""Find which special tokens a tokenizer adds around a text, by tokenising a text and not by its options.

The token at the end of a text is not always `eos_token` (Qwen3-Embedding ends with <|endoftext|>, and its `eos_token`
is <|im_end|>), and tokenizers do not always follow their options.
"""

from typing import Any

from readapt_ray.errors import ModelError


def added_by_itself(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Return the special tokens that the tokenizer adds by default before and after a text, as token strings.

    Both lists are empty if it adds none, or if it tokenises the text itself differently with them.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    for start in range(len(ids) - len(plain) + 1):
        if ids[start : start + len(plain)] == plain:
            around = ids[:start], ids[start + len(plain) :]
            return tokenizer.convert_ids_to_tokens(around[0]), tokenizer.convert_ids_to_tokens(around[1])
    return [], []


def only_token(tokens: list[str]) -> str | None:
    """Return the only special token of one side of a text; None if there is none.

    Raises:
        ModelError: there are several, which no encoding can express.
    """
    if len(tokens) > 1:
        raise ModelError(
            f"the tokenizer puts the special tokens {' '.join(tokens)} on one side of a text; supported is one on each "
            f"side: give a model that has one, or --encoding FILE.json with add_bos or add_eos false there"
        )
    return tokens[0] if tokens else None
