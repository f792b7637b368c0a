import itertools
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.catalog.models import open_model
from readapt_ray.errors import InputError
from readapt_ray.sources.splitting import open_splitting, parent_of, piece_ids, split_part
from readapt_ray.storage import Location
from tests.factories import tiny_decoder, tiny_encoder

SENTENCES = [f"Sentence number {number} is about arrays and shapes." for number in range(40)]
PARAGRAPHS = "\n".join(" ".join(SENTENCES[at : at + 4]) for at in range(0, 40, 4))


@pytest.fixture(scope="module", params=["decoder", "encoder"])
def model(request, tmp_path_factory):
    make = {"decoder": tiny_decoder, "encoder": tiny_encoder}[request.param]
    return str(make(tmp_path_factory.mktemp("model") / request.param))


def num_tokens(model, text):
    return len(open_model(model).tokenizer(text, add_special_tokens=False)["input_ids"])


WORDS = " ".join(f"w{number}" for number in range(300))
SIGNS = "".join(f"第{number}の文章です。" for number in range(60))
TEXTS = [PARAGRAPHS, WORDS, SIGNS, "x" * 700, "🌊é" * 90, "one\ntwo", ""]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("max_tokens", [1, 2, 7, 30])
def test_pieces_keep_the_bound_and_lose_nothing(model, text, max_tokens):
    (pieces,) = open_splitting(max_tokens, 0, model).split([text])
    if max_tokens > 4:  # a sign may be four tokens
        assert all(num_tokens(model, piece) <= max_tokens for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


@pytest.mark.parametrize("text", [PARAGRAPHS, WORDS, SIGNS])
@pytest.mark.parametrize(("max_tokens", "overlap"), [(30, 29), (30, 10), (15, 5)])
def test_pieces_that_overlap_follow_each_other_without_a_gap(model, text, max_tokens, overlap):
    (pieces,) = open_splitting(max_tokens, overlap, model).split([text])
    if max_tokens > 4:
        assert all(num_tokens(model, piece) <= max_tokens for piece in pieces)
    begin = end = 0
    for piece in pieces:
        begin = text.index(piece, begin)
        assert not text[end:begin].strip()
        assert begin + len(piece) > end
        end = begin + len(piece)
    assert not text[end:].strip()


def test_pieces_end_with_paragraphs_and_sentences(model):
    most = num_tokens(model, " ".join(SENTENCES[:9]))
    (pieces,) = open_splitting(most, 0, model).split([PARAGRAPHS])
    assert all(piece in PARAGRAPHS for piece in pieces)
    assert all(PARAGRAPHS[PARAGRAPHS.index(piece) + len(piece) :][:1] in ("\n", "") for piece in pieces)
    (pieces,) = open_splitting(num_tokens(model, " ".join(SENTENCES[20:23])), 0, model).split([" ".join(SENTENCES)])
    assert all(piece.endswith("shapes.") for piece in pieces)


def test_pieces_overlap_by_whole_sentences(model):
    most = num_tokens(model, " ".join(SENTENCES[20:24]))
    text = " ".join(SENTENCES)
    (pieces,) = open_splitting(most, num_tokens(model, SENTENCES[20]) + 2, model).split([text])
    assert len(pieces) > 8
    for before, after in itertools.pairwise(pieces):
        assert before.endswith(re.match(r".*?shapes\.", after)[0])


def test_ids_give_their_documents_back():
    assert piece_ids("a", 1) == ["a"]
    assert piece_ids("a", 2) == ["a#1", "a#2"]
    assert piece_ids("a#7", 1) == ["a#7#1"]
    for doc_id in ("a", "a#7", "x/y.md#1", "#"):
        for number in (1, 2):
            assert {parent_of(each) for each in piece_ids(doc_id, number)} == {doc_id}


def test_a_part_is_split_once(tmp_path, model):
    table = pa.table(
        {
            "doc_id": ["a", "b", "t"],
            "title": ["A", "", "alone"],
            "text": [PARAGRAPHS, "short", ""],
            "content_hash": pa.array([b"0" * 16] * 3, pa.binary(16)),
            "year": [1, 2, 3],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    file, splitting = Location(str(tmp_path / "p.parquet")), open_splitting(40, 0, model)
    counts = split_part(file, splitting)
    made = pq.read_table(tmp_path / "p.parquet")
    assert made.schema.names == ["doc_id", "title", "text", "content_hash", "parent_id", "year"]
    rows = made.to_pylist()
    assert [row["doc_id"] for row in rows[-2:]] == ["b", "t"]
    assert {(row["title"], row["parent_id"], row["year"]) for row in rows[:-2]} == {("A", "a", 1)}
    assert [row["doc_id"] for row in rows[:-2]] == [f"a#{number}" for number in range(1, len(rows) - 1)]
    assert len({row["content_hash"] for row in rows}) == len(rows)
    size = sum(len(row["title"]) + len(row["text"]) for row in rows)
    assert counts == {"num_documents": 3, "num_split_documents": 1, "num_passages": len(rows), "num_bytes": size}
    before = (tmp_path / "p.parquet").read_bytes()
    assert split_part(file, splitting) == counts
    assert (tmp_path / "p.parquet").read_bytes() == before


def test_a_model_without_a_tokenizer_that_knows_places_is_refused(tmp_path, monkeypatch):
    folder = tiny_decoder(tmp_path / "model")
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", property(lambda self: False))
    with pytest.raises(InputError, match=r"does not say where in a text its tokens are"):
        open_splitting(10, 0, str(folder))
