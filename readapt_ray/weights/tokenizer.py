"""Write the tokenizer of an exported model, so that every library adds the special tokens that the encoding asks for.

Libraries differ in whether they honour `add_bos_token` and `add_eos_token`, and some versions drop
the EOS that a retriever was trained with. All of them honour a post-processor inside `tokenizer.json`,
so the special tokens are put there. The written tokenizer is read back and its ids are compared.
"""

import json
from pathlib import Path
from typing import Any

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.special_tokens import added_by_itself, only_token
from readapt_ray.errors import ModelError
from readapt_ray.model_file_names import TOKENIZER_CONFIG_NAME

_PROBES = ("", "a", "Hello, world! 1,234", "query: Ünïcode 数据 🙂", "two\nlines  and   spaces")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def edge_tokens(tokenizer: Any, encoding: Encoding) -> tuple[str | None, str | None]:
    """Return the special token before and the one after a text, as strings; None where the encoding asks for none.

    A token that the tokenizer already adds by itself is kept (a few add another than their `eos_token`).
    Otherwise it is BOS, else CLS, before the text, and EOS, else SEP, after it.

    Raises:
        ModelError: the tokenizer lacks a token that the encoding asks for, or adds several in its place.
    """
    edges: list[str | None] = []
    for asked, option, own, roles in zip(
        (encoding.add_bos, encoding.add_eos),
        ("add_bos", "add_eos"),
        added_by_itself(tokenizer),
        (("bos_token", "cls_token"), ("eos_token", "sep_token")),
        strict=True,
    ):
        if not asked:
            edges.append(None)
            continue
        token = only_token(own) or next((getattr(tokenizer, role) for role in roles if getattr(tokenizer, role)), None)
        if token is None:
            raise ModelError(
                f"the encoding asks for a special token that the tokenizer lacks ({' or '.join(roles)}); set it in "
                f"tokenizer_config.json, or set {option} to false in the encoding"
            )
        edges.append(token)
    return edges[0], edges[1]


def write_tokenizer(tokenizer: Any, encoding: Encoding, folder: Path) -> None:
    """Write the tokenizer into a local folder that holds the model's config.json, and check it by reading it back.

    It adds the special tokens that the encoding asks for, pads and truncates on the right, and its maximum length is
    the longer one of queries and passages. The given tokenizer is not changed.

    Args:
        tokenizer: the tokenizer of the retriever, as transformers loads it.
        encoding: how the retriever encodes text.
        folder: the local folder.

    Raises:
        ModelError: it is not a fast tokenizer, or the one that is read back makes other ids.
    """
    from transformers import PreTrainedTokenizerFast

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json form; give a model that has one"
        )
    before, after = edge_tokens(tokenizer, encoding)
    exported = type(backend).from_str(backend.to_str())
    exported.no_truncation()
    exported.no_padding()
    exported.post_processor = _post_processor(exported, before, after)
    roles = {role: getattr(tokenizer, role) for role in _ROLES if getattr(tokenizer, role) is not None}
    roles.setdefault("pad_token", after or before or roles.get("unk_token"))
    written = PreTrainedTokenizerFast(
        tokenizer_object=exported,
        model_max_length=max(encoding.max_query_tokens, encoding.max_passage_tokens),
        padding_side="right",
        truncation_side="right",
        model_input_names=list(tokenizer.model_input_names),
        clean_up_tokenization_spaces=False,
        **{role: token for role, token in roles.items() if token is not None},
    )
    written.save_pretrained(str(folder))
    _name_class(folder / TOKENIZER_CONFIG_NAME)
    _read_back(tokenizer, encoding, (before, after), folder)


def _post_processor(backend: Any, before: str | None, after: str | None) -> Any:
    from tokenizers.processors import TemplateProcessing

    around = [token for token in (before, after) if token is not None]
    template = [*([before] if before else []), "$A", *([after] if after else [])]
    second = [*([f"{before}:1"] if before else []), "$B:1", *([f"{after}:1"] if after else [])]
    return TemplateProcessing(
        single=template,
        pair=template + second,
        special_tokens=[(token, backend.token_to_id(token)) for token in set(around)],
    )


def _name_class(path: Path) -> None:
    """Set the tokenizer class to a name that transformers 4 and 5 both know."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _read_back(tokenizer: Any, encoding: Encoding, edges: tuple[str | None, str | None], folder: Path) -> None:
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    first, last = ([tokenizer.convert_tokens_to_ids(edge)] if edge else [] for edge in edges)
    for probe in _PROBES:
        wanted = [*first, *tokenizer(probe, add_special_tokens=False)["input_ids"], *last]
        made = again(probe)["input_ids"]
        if made != wanted:
            raise ModelError(
                f"the exported tokenizer makes the ids {made} of {probe!r} where {wanted} are expected (add_bos="
                f"{encoding.add_bos}, add_eos={encoding.add_eos}); its class {type(again).__name__} overrides tokenizer.json"
            )
