import pytest

from readapt_ray.retrieval.truncation import sentence, truncation, warn_of_loss


def _found(num_lost: int, num_truncated: int = 12):
    return truncation(num_texts=300, num_truncated=num_truncated, num_tokens=9000, num_lost=num_lost, max_tokens=1024)


def test_the_sentence_says_how_many_passages_and_which_share_of_the_tokens() -> None:
    assert _found(1000)["lost_share"] == 0.1
    assert sentence(_found(1000)) == "12 of 300 passages truncated to 1,024 tokens, 10.0% of the tokens lost"
    assert sentence(_found(0, 0)) == "no passage is longer than 1,024 tokens"


@pytest.mark.parametrize(("num_lost", "is_warned"), [(0, False), (450, False), (500, True)])
def test_more_than_five_percent_is_a_warning_that_says_what_to_do(num_lost, is_warned, caplog) -> None:
    warn_of_loss("embed", _found(num_lost), "raise max_passage_tokens")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * is_warned
    assert all(message.endswith("tokens lost; raise max_passage_tokens") for message in caplog.messages)


def test_copied_vectors_are_said_not_to_count() -> None:
    found = truncation(num_texts=1, num_truncated=0, num_tokens=9, num_lost=0, max_tokens=512, num_copied=2000)
    assert sentence(found) == "no new passage is longer than 512 tokens (2,000 copied vectors not counted)"
    found = truncation(num_texts=4, num_truncated=1, num_tokens=90, num_lost=10, max_tokens=512, num_copied=1)
    due = "1 of 4 new passages truncated to 512 tokens, 10.0% of the tokens lost (1 copied vector not counted)"
    assert sentence(found) == due
    assert "num_copied" not in truncation(num_texts=1, num_truncated=0, num_tokens=9, num_lost=0, max_tokens=512)
