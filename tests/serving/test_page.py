"""The page at /, in a real browser."""

import hashlib

import pytest

from readapt_ray.serving.keys import ApiKey
from tests.serving.browser import chromium
from tests.serving.conftest import LocalVersion, serving_at

QUERY = "lock a thread"


@pytest.fixture(scope="module")
def url(world):
    versions = {"base": LocalVersion.load(world, "other"), "adapted": LocalVersion.load(world)}
    with serving_at(versions) as address:
        yield address


def test_two_columns_show_how_the_versions_differ(url, tmp_path):
    with chromium(tmp_path) as page:
        page.call("Page.navigate", url=url)
        page.wait_for("document.querySelectorAll('#left option').length === 2")
        assert page.value("document.activeElement.id") == "query"
        page.type(QUERY)
        page.press("Enter")
        page.wait_for("document.querySelectorAll('#columns section').length === 2")
        columns = [
            page.value(
                f"[...document.querySelectorAll('#columns section')[{side}].querySelectorAll('li')].map("
                "item => [item.querySelector('.doc').textContent, item.querySelector('.mark').textContent, item.className])"
            )
            for side in (0, 1)
        ]
        assert [len(column) for column in columns] == [10, 10]
        names = page.value("[...document.querySelectorAll('#columns h2')].map(each => each.textContent)")
        assert names == ["adapted", "base"]
        _check_marks(*columns)
        shared = len({doc for doc, *_ in columns[0]} & {doc for doc, *_ in columns[1]})
        assert page.value("document.getElementById('status').textContent") == (
            f"{shared} of 10 passages are in both columns."
        )
        latency = page.value("document.querySelector('.latency').textContent")
        assert " ms (queue " in latency
        # Nothing but this server was asked, and nothing went wrong.
        assert {each.split("/", 3)[2] for each in page.requested} == {url.split("/")[2]}
        assert page.complaints == []


def _check_marks(left, right):
    for mine, its in ((left, right), (right, left)):
        places = {doc: place for place, (doc, *_) in enumerate(its)}
        for place, (doc, mark, kind) in enumerate(mine):
            if doc not in places:
                assert (mark, kind) == ("only here", "only")
            elif places[doc] == place:
                assert (mark, kind) == ("same place", "")
            elif places[doc] > place:
                assert (mark, kind) == (f"▲ {places[doc] - place} higher here", "up")
            else:
                assert (mark, kind) == (f"▼ {place - places[doc]} lower here", "down")


def test_keyboard_links_and_what_a_screen_reader_needs(url, tmp_path):
    with chromium(tmp_path) as page:
        page.call("Page.navigate", url=f"{url}/?q=array&left=base&right=base")
        page.wait_for("document.querySelectorAll('#columns section').length === 1")
        assert page.value("document.querySelector('#columns h2').textContent") == "base"
        page.value("document.activeElement.blur()")
        page.press("/", "/")
        assert page.value("document.activeElement.id") == "query"
        assert page.value("document.getElementById('query').value") == "array"
        assert page.value("document.documentElement.lang") == "en"
        assert page.value("document.getElementById('status').getAttribute('aria-live')") == "polite"
        unnamed = "[...document.querySelectorAll('input, select')].filter(each => !each.labels.length).length"
        assert page.value(unnamed) == 0
        order = []
        for _ in range(6):
            order.append(page.value("document.activeElement.id || document.activeElement.tagName"))
            page.press("Tab")
        assert order == ["query", "left", "right", "top", "key", "BUTTON"]


def test_what_a_passage_says_is_shown_and_not_obeyed(world, tmp_path):
    version = LocalVersion.load(world)
    with serving_at({"<b>x</b>": version}) as url, chromium(tmp_path) as page:
        page.call("Page.navigate", url=f"{url}/?q=array")
        page.wait_for("document.querySelectorAll('#columns section').length === 1")
        assert page.value("document.querySelector('#columns h2').textContent") == "<b>x</b>"
        assert page.value("document.querySelectorAll('#columns b').length") == 0


def test_an_error_is_said_and_nothing_old_stays_below_it(url, tmp_path):
    with chromium(tmp_path) as page:
        page.call("Page.navigate", url=f"{url}/?q=%20")
        page.wait_for("document.getElementById('status')?.classList.contains('error')")
        assert "is empty" in page.value("document.getElementById('status').textContent")
        page.call("Page.navigate", url=f"{url}/?q=array")
        page.wait_for("document.querySelectorAll('#columns section').length === 2")
        page.value("document.getElementById('query').value = ' '")
        page.press("Enter")
        page.wait_for("document.getElementById('status')?.classList.contains('error')")
        assert page.value("document.querySelectorAll('#columns section').length") == 0


def test_one_version_has_no_sides(world, tmp_path):
    with serving_at({"tiny": LocalVersion.load(world)}) as url, chromium(tmp_path) as page:
        page.call("Page.navigate", url=f"{url}/?q=array")
        page.wait_for("document.querySelectorAll('#columns section').length === 1")
        for side in ("left", "right"):
            assert page.value(f"getComputedStyle(document.getElementById('{side}').parentElement).display") == "none"
        assert page.value("document.querySelector('h1').textContent") == "Search"
        assert page.value("document.querySelector('a[href=docs]') !== null") is True


def test_a_link_to_a_version_that_is_gone_says_so(url, tmp_path):
    with chromium(tmp_path) as page:
        page.call("Page.navigate", url=f"{url}/?q=array&left=gone&right=base")
        page.wait_for("document.querySelectorAll('#columns section').length > 0")
        assert "Not served any more: gone" in page.value("document.getElementById('status').textContent")


def test_a_link_keeps_its_query_where_a_key_is_needed(world, tmp_path):
    key = "a-secret-of-some-length"
    keys = [ApiKey("alice", hashlib.sha256(key.encode()).hexdigest())]
    with serving_at({"tiny": LocalVersion.load(world)}, keys=keys) as url, chromium(tmp_path) as page:
        page.call("Page.navigate", url=f"{url}/?q=array")
        page.wait_for("document.getElementById('status')?.classList.contains('error')")
        assert page.value("document.getElementById('query').value") == "array"
        page.value(f"document.getElementById('key').value = '{key}'")
        page.press("Enter")
        page.wait_for("document.querySelectorAll('#columns section').length === 1")


def test_a_long_passage_can_be_unfolded(url, tmp_path):
    with chromium(tmp_path) as page:
        page.call("Page.navigate", url=f"{url}/?q=array&left=base&right=base")
        page.wait_for("document.querySelectorAll('#columns li').length === 10")
        page.value("document.querySelector('.text summary').click()")
        assert page.value("document.querySelector('.text').open") is True
        assert page.value("getComputedStyle(document.querySelector('.text summary')).display") == "block"


def test_the_page_of_the_api_lists_every_path(url, tmp_path):
    with chromium(tmp_path) as page:
        page.call("Page.navigate", url=f"{url}/docs")
        page.wait_for("document.querySelectorAll('h2').length > 5")
        text = page.value("document.body.innerText")
        for path in ("POST /v1/embeddings", "POST /v1/search", "GET /v1/models", "GET /readyz", "GET /metrics"):
            assert path in text
        assert "encoding_format" in text
        assert page.complaints == []
