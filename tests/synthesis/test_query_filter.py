"""What is taken from an answer of a language model."""

import pytest

from readapt_ray.synthesis.prompts import DEFAULT_PROMPT, fill, passage_text
from readapt_ray.synthesis.query_filter import REASONS, take_query

PASSAGE = "Wing flutter\nThe flutter speed of a swept wing falls with its aspect ratio, as tunnel tests have shown."


@pytest.mark.parametrize(
    "answer",
    [
        "how does aspect ratio change flutter?",
        "\n\n  how does aspect ratio   change flutter?  \nBecause it is thin.",
        "Question: how does aspect ratio change flutter?",
        "1. how does aspect ratio change flutter?\n2. what is a swept wing?",
        "**Query 1:** how does aspect ratio change flutter?",
        '- "how does aspect ratio change flutter?"',
        "“how does aspect ratio change flutter?”",
        "Query - how does aspect ratio change flutter?",
        "Q: how does aspect ratio change flutter?",
        "## how does aspect ratio change flutter?",
        "Sure! Here is a question:\n\nhow does aspect ratio change flutter?",
        "Sure, here's a search query for it: how does aspect ratio change flutter?",
        "Certainly!\n**how does aspect ratio change flutter?**",
        "A question that a person would type:\n- how does aspect ratio change flutter?",
        "__how does aspect ratio change flutter?__",
        "how does `aspect ratio` change flutter?",
        '"how does aspect ratio change flutter?',
        "<think>\nThe user wants a question about wings.\n</think>\n\nhow does aspect ratio change flutter?",
        "<think></think>how does aspect ratio change flutter?",
    ],
)
def test_the_first_question_is_taken_without_what_is_around_it(answer: str) -> None:
    assert take_query(answer, PASSAGE) == ("how does aspect ratio change flutter?", "")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        (" \n\t\n", "empty"),
        ("Question:", "empty"),
        ("Sure! Here is a question:", "empty"),
        ("wing flutter?", "short"),
        ("<think>The user wants a question about the wings of", "empty"),
        ("ปีกบิน", "script"),
        ("why " * 65, "long"),
        ("The flutter speed of a swept wing falls with its aspect ratio", "copied"),
        ("flutter speed, of a SWEPT wing", "copied"),
        ("как зависит флаттер от удлинения крыла", "script"),
        ("機翼顫振與展弦比有什麼關係呢", "script"),
        ("What is the main topic of this passage?", "of_passage"),
        ("what does the following short text say of wings", "of_passage"),
        ("I'm sorry, I cannot help with wings.", "refusal"),
    ],
)
def test_an_answer_that_is_no_query_says_why(answer: str, reason: str) -> None:
    assert take_query(answer, PASSAGE) == ("", reason)
    assert reason in REASONS


@pytest.mark.parametrize(
    ("query", "passage"),
    [
        ("how is a language model trained on tables?", "Tables are linearised before training."),
        ("what to do when I can't print in colour", "Check the ink of the printer."),
        ("how long does the document retention rule hold", "A document is kept for ten years."),
        ("where is the text field of a form", "A form has a text field and two buttons."),
        ("okay is a word of which origin", "Words have origins."),
        ("here is where the wing of what bird ends", "Birds have wings."),
        ("Q-learning with how many states", "Agents learn."),
        ("query-based retrieval of tables", "Rows are found by what is asked."),
        ("question-answering systems for wings", "Wings are asked about."),
        ("answer-set programming in practice", "Rules are solved."),
        ("what does __init__ do with **options and *rows", "The constructor takes options."),
        ("when are __enter__ and __exit__ called", "A context manager is entered."),
        ("is 2**8 more than 3**4", "Powers of numbers."),
        ('what does "flutter" mean in "wing flutter"', "Wings vibrate."),
        ("what is the meaning of «flutter»", "Wings vibrate."),
        ("ปีกเครื่องบินสั่นสะเทือนเมื่อใด", "ความเร็วของการสั่นสะเทือนของปีกเครื่องบินลดลงเมื่ออัตราส่วน"),
    ],
)
def test_a_query_about_such_things_is_none_of_these(query: str, passage: str) -> None:
    assert take_query(query, passage) == (query, "")


def test_scripts_are_those_of_the_passage() -> None:
    assert take_query("顫振速度隨展弦比如何變化", "後掠翼的顫振速度隨展弦比下降。風洞試驗已經證明。").reason == ""
    assert take_query("what does flutter speed depend on", "後掠翼的顫振速度隨展弦比下降。").reason == "script"
    assert take_query("was ist 顫振 bei wings", "後掠翼 wings of an aircraft 的顫振速度隨展弦比下降。").reason == ""


def test_a_passage_is_cut_behind_a_word_and_other_braces_stay() -> None:
    assert passage_text(" Wing ", "flutter speed of a wing", 16) == "Wing\nflutter"
    assert passage_text(None, "word", 80) == "word"
    assert passage_text("", "x" * 100, 80) == "x" * 80
    assert fill("{passage}: {other} {passage}", "a{b}") == "a{b}: {other} a{b}"
    assert fill(DEFAULT_PROMPT, PASSAGE).count(PASSAGE) == 1
