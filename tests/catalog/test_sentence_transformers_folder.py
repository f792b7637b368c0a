"""The encoding of a folder that only sentence-transformers' files describe."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from readapt_ray.catalog import models
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.errors import ModelError
from tests import factories


def _folder(
    folder: Path,
    *,
    single: str = "$A </s>",
    pooling: str = "lasttoken",
    modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"),
    encoder: dict[str, Any] | None = None,
    settings: tuple[str, dict[str, Any]] = ("sentence_bert_config.json", {}),
    tokenizer_config: dict[str, Any] | None = None,
) -> Path:
    """A decoder whose tokenizer puts `single` around a text, and the files of sentence-transformers."""
    factories.tiny_decoder(folder, headless=True)
    tokenizer = factories.decoder_tokenizer()
    specials = [("<pad>", 0), ("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=specials)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    contents = {
        "modules.json": [
            {"type": f"sentence_transformers.models.{kind}", "path": f"{number}_{kind}" if number else ""}
            for number, kind in enumerate(modules)
        ],
        "1_Pooling/config.json": {f"pooling_mode_{pooling}": True},
        "config_sentence_transformers.json": encoder or {},
        settings[0]: settings[1],
        "tokenizer_config.json": config | (tokenizer_config or {}),
    }
    (folder / "1_Pooling").mkdir()
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def _encoding(folder: Path) -> Encoding:
    return models.open_model(str(folder)).encoding


@pytest.mark.parametrize(
    ("single", "bos", "eos"),
    [
        ("<s> $A </s>", True, True),
        ("$A", False, False),
        ("<s> $A", True, False),
        ("$A <pad>", False, True),  # as Qwen3-Embedding ends: with another token than its eos_token
    ],
)
def test_special_tokens_are_those_that_the_tokenizer_adds(tmp_path: Path, single: str, bos: bool, eos: bool) -> None:
    encoding = _encoding(_folder(tmp_path / "m", single=single))
    assert (encoding.add_bos, encoding.add_eos) == (bos, eos)


def test_special_tokens_that_the_tokenizers_options_ask_for_are_added(tmp_path: Path) -> None:
    """As E5-Mistral's do; transformers 5 reads tokenizer.json alone."""
    options = {"add_bos_token": True, "add_eos_token": True}
    encoding = _encoding(_folder(tmp_path / "m", single="<s> $A", tokenizer_config=options))
    assert (encoding.add_bos, encoding.add_eos) == (True, True)
    off = {"add_bos_token": False, "add_eos_token": False}
    encoding = _encoding(_folder(tmp_path / "off", single="<s> $A </s>", tokenizer_config=off))
    assert (encoding.add_bos, encoding.add_eos) == (True, True)


def test_several_special_tokens_on_a_side_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"<pad> <s> on one side.*--encoding"):
        _encoding(_folder(tmp_path / "m", single="<pad> <s> $A </s>"))


def test_the_last_token_without_an_end_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "readapt_ray")
    _encoding(_folder(tmp_path / "mean", single="$A", pooling="mean_tokens"))
    _encoding(_folder(tmp_path / "ended"))
    assert not caplog.records
    folder = _folder(tmp_path / "m", single="$A")
    _encoding(folder)
    _encoding(folder)
    assert [str(folder) in record.message and "--encoding" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("prompts", "default", "query", "passage"),
    [
        ({}, None, "", ""),
        ({"query": "q: "}, None, "q: ", ""),
        ({"query": "q: ", "passage": "p: ", "sts": "s: "}, None, "q: ", "p: "),
        ({"document": "d: "}, None, "", "d: "),
        ({"web": "w{}: "}, "web", "w{{}}: ", "w{{}}: "),
        ({"query": "q: ", "web": "w: "}, "web", "q: ", "w: "),
        ({"web": "", "sts": ""}, None, "", ""),
    ],
)
def test_prompts(tmp_path: Path, prompts: dict[str, str], default: str | None, query: str, passage: str) -> None:
    encoder = {"prompts": prompts, "default_prompt_name": default}
    encoding = _encoding(_folder(tmp_path / "m", encoder=encoder))
    assert (encoding.query_template, encoding.passage_template) == (query + "{text}", passage + "{title} {text}")


def test_prompts_that_nobody_can_choose_from_are_refused(tmp_path: Path) -> None:
    encoder = {"prompts": {"web_search_query": "Instruct: x\nQuery: ", "sts_query": "y: "}, "default_prompt_name": None}
    with pytest.raises(ModelError, match=r"the prompts web_search_query, sts_query, and nothing says.*--encoding"):
        _encoding(_folder(tmp_path / "m", encoder=encoder))


@pytest.mark.parametrize(
    ("modules", "similarity", "normalize"),
    [
        (("Transformer", "Pooling"), None, True),
        (("Transformer", "Pooling"), "cosine", True),
        (("Transformer", "Pooling"), "dot", False),
        (("Transformer", "Pooling", "Normalize"), "dot", True),
    ],
)
def test_vectors_rank_as_the_folders_similarity_does(
    tmp_path: Path, modules: tuple[str, ...], similarity: str | None, normalize: bool
) -> None:
    encoder = {"similarity_fn_name": similarity} if similarity else {}
    assert _encoding(_folder(tmp_path / "m", modules=modules, encoder=encoder)).normalize is normalize


def test_another_similarity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'euclidean'; understood are cosine and dot"):
        _encoding(
            _folder(tmp_path / "m", modules=("Transformer", "Pooling"), encoder={"similarity_fn_name": "euclidean"})
        )


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_settings_under_their_older_names(tmp_path: Path, kind: str) -> None:
    settings = (f"sentence_{kind}_config.json", {"max_seq_length": 17, "do_lower_case": True})
    encoding = _encoding(_folder(tmp_path / "m", settings=settings))
    assert (encoding.max_query_tokens, encoding.max_passage_tokens, encoding.lower_case) == (17, 17, True)


def test_a_pooling_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m")
    (folder / "1_Pooling/config.json").unlink()
    with pytest.raises(
        ModelError, match=r"1_Pooling/config.json is missing in .*modules.json names '1_Pooling'.*again"
    ):
        _encoding(folder)


@pytest.mark.parametrize("option", ["module_input_name", "module_output_name"])
def test_a_normalize_module_of_something_else_is_refused(tmp_path: Path, option: str) -> None:
    """sentence-transformers leaves the vector as long as it was."""
    folder = _folder(tmp_path / "m")
    (folder / "2_Normalize").mkdir()
    settings = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    (folder / "2_Normalize/config.json").write_text(json.dumps(settings))
    assert _encoding(folder).normalize
    (folder / "2_Normalize/config.json").write_text(json.dumps(settings | {option: "other"}))
    with pytest.raises(ModelError, match=rf"2_Normalize .*'other'.*{option} .*2_Normalize/config.json"):
        _encoding(folder)


@pytest.mark.parametrize("config", [{}, {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": False}])
def test_a_pooling_that_says_nothing_is_the_mean_as_in_sentence_transformers(
    tmp_path: Path, config: dict[str, bool]
) -> None:
    folder = _folder(tmp_path / "m")
    (folder / "1_Pooling/config.json").write_text(json.dumps(config | {"embedding_dimension": 32}))
    assert _encoding(folder).pooling == "mean"


def test_modules_that_are_no_list_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m")
    (folder / "modules.json").write_text('{"a": 1}')
    with pytest.raises(ModelError, match=r"modules.json is not a list of modules"):
        _encoding(folder)
