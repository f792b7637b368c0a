import hashlib
import hmac
import subprocess
import sys
import types

import pytest

from readapt_ray.errors import InputError
from readapt_ray.serving import keys as keys_module
from readapt_ray.serving.keys import ApiKey, KeyRing, read_keys

SECRET = "a-secret-of-some-length"
ACCENTED = "schlüssel-der-endet-à"
OTHER = "another-secret-of-some-length"


def _file(tmp_path, text):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    return str(path)


def test_keys_of_a_file_are_kept_as_digests(tmp_path):
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    text = f"alice: {SECRET}\nbob:\n  key: sha256:{digest.upper()}\n  requests_per_minute: 60\n"
    found = read_keys(_file(tmp_path, text))
    assert found == (ApiKey("alice", hashlib.sha256(SECRET.encode()).hexdigest()), ApiKey("bob", digest, 60))
    assert SECRET not in repr(found)


def test_keys_of_the_environment(monkeypatch):
    monkeypatch.setenv("READAPT_API_KEYS", f'{{"ci": "{SECRET}"}}')
    assert [each.name for each in read_keys(None)] == ["ci"]
    monkeypatch.setenv("READAPT_API_KEYS", " ")
    assert read_keys(None) == ()


def test_processes_that_are_started_do_not_get_the_keys(monkeypatch):
    monkeypatch.setenv("READAPT_API_KEYS", f"ci: {SECRET}")
    show = [sys.executable, "-c", "import os; print(os.environ)"]
    with keys_module.out_of_environment():
        assert SECRET not in subprocess.run(show, capture_output=True, text=True, check=True).stdout
    assert [each.name for each in read_keys(None)] == ["ci"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no keys"),
        ("- a\n", "holds no keys"),
        ("a: [", "not YAML"),
        ("a: short", "at least 16 characters"),
        ("a: 1234567890123456", "at least 16 characters; quote digits"),
        ("a: sha256:0123456789", "no SHA-256 follows"),
        (f"a: {{key: {SECRET}, rate: 3}}", r"\['rate'\]"),
        (f"a: {{key: {SECRET}, requests_per_minute: 0}}", "over 0"),
        (f"a: {{key: {SECRET}, requests_per_minute: true}}", "over 0"),
        (f"a: {{key: {SECRET}, requests_per_minute: .nan}}", "finite number over 0"),
        (f"a: {{key: {SECRET}, requests_per_minute: .inf}}", "finite number over 0"),
        (f"a: !!int {SECRET}", "not YAML"),
        (f"a: {SECRET}\nb: 2024-02-31", "not YAML"),
        (f"a: {{key: {SECRET}, domains: [b]}}\na: {OTHER}", "'a' is given twice"),
        (f"1: {SECRET}\n'1': {OTHER}", "'1' is given twice"),
        (f"a: {{key: {SECRET}, domains: [b], domains: [c]}}", "'domains' is given twice"),
        (f"a: {{key: {SECRET}, domains: [b]}}\nc: {SECRET}", "'a' and 'c' have the same key"),
    ],
)
def test_what_is_no_list_of_keys_is_refused_without_showing_one(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read_keys(_file(tmp_path, text))
    assert SECRET not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_keys(str(tmp_path / "none.yaml"))


def ring(*keys: ApiKey, **options) -> KeyRing:
    return KeyRing(keys or read_ring(), **options)


def read_ring() -> tuple[ApiKey, ...]:
    return (
        ApiKey("alice", hashlib.sha256(SECRET.encode()).hexdigest()),
        ApiKey("bob", hashlib.sha256(OTHER.encode()).hexdigest()),
        ApiKey("carol", hashlib.sha256(ACCENTED.encode()).hexdigest()),
    )


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (f"Bearer {SECRET}", "alice"),
        (f"bearer {OTHER}", "bob"),
        (f"Bearer  {SECRET} ", "alice"),
        (f"Bearer {SECRET}x", None),
        (f"Bearer {SECRET[:-1]}", None),
        (f"Basic {SECRET}", None),
        (SECRET, None),
        ("Bearer ", None),
        ("Bearer ünï", None),
        (f"Bearer {ACCENTED.encode().decode('latin-1')}", "carol"),
        (f"Bearer {ACCENTED}", None),
        ("", None),
        (None, None),
    ],
)
def test_a_header_finds_its_key_or_none(header, name):
    found = ring().find(header)
    assert (found.name if found else None) == name


def test_every_key_is_compared_in_constant_time_whichever_fits(monkeypatch):
    compared = []

    def compare(left, right):
        compared.append(right)
        return hmac.compare_digest(left, right)

    monkeypatch.setattr(keys_module, "hmac", types.SimpleNamespace(compare_digest=compare))
    for header in (f"Bearer {SECRET}", f"Bearer {OTHER}", "Bearer nobody"):
        compared.clear()
        ring().find(header)
        assert compared == [each.sha256 for each in read_ring()]


def test_a_rate_allows_a_burst_of_ten_seconds_and_then_its_pace():
    now = [0.0]
    key = ApiKey("alice", "0" * 64, requests_per_minute=60)
    limited = KeyRing([key], clock=lambda: now[0])
    assert [limited.wait_s(key) for _ in range(10)] == [0.0] * 10
    assert limited.wait_s(key) == pytest.approx(1.0)
    now[0] = 0.5
    assert limited.wait_s(key) == pytest.approx(0.5)
    now[0] = 1.0
    assert limited.wait_s(key) == 0.0
    assert limited.wait_s(key) > 0
    now[0] = 1000.0
    assert [limited.wait_s(key) for _ in range(11)][9:] == [0.0, pytest.approx(1.0)]


def test_gateways_share_a_rate():
    key = ApiKey("alice", "0" * 64, requests_per_minute=60)
    half = KeyRing([key], share=0.5, clock=lambda: 0.0)
    assert [half.wait_s(key) for _ in range(6)] == [0.0] * 5 + [pytest.approx(2.0)]


def test_no_rate_means_no_limit_and_no_keys_are_false():
    key = ApiKey("alice", "0" * 64)
    assert [KeyRing([key]).wait_s(key) for _ in range(1000)] == [0.0] * 1000
    assert not KeyRing([])
    assert KeyRing([key])
