"""Secrets are taken out of text, and nothing else is."""

from __future__ import annotations

import pickle

import pytest

from tuner.errors import StudyError, TunerError
from tuner.redact import holds_secret, printable, redact

SECRETS = [
    ("https://me:pass@head:8265/api", "https://***@head:8265/api"),
    ("https://hf_abcdefgh@huggingface.co/x", "https://***@huggingface.co/x"),
    ("http://me:pa@ss@head", "http://***@head"),
    ("s3://AKIAKEY:sec/ret+x@bucket/runs", "s3://***@bucket/runs"),
    ("s3:/AKIAKEY:secret@bucket/runs", "s3:/***@bucket/runs"),
    ("s3://:secret@bucket", "s3://***@bucket"),
    ("postgresql+psycopg://me:1234x@db/study", "postgresql+psycopg://***@db/study"),
    ("s3://b/p?access_key=AK&secret_key=SK&region=eu", "s3://b/p?access_key=***&secret_key=***&region=eu"),
    ("https://b/p?X-Amz-Signature=ab%2Fc&X-Amz-Date=1", "https://b/p?X-Amz-Signature=***&X-Amz-Date=1"),
    ("abfss://c@a.dfs.core.windows.net/p?sas_token=x", "abfss://c@a.dfs.core.windows.net/p?sas_token=***"),
    ("https://a.blob.core.windows.net/c?sv=1&sig=xyz", "https://a.blob.core.windows.net/c?sv=1&sig=***"),
    ("header Authorization: Bearer c0ffee-c0ffee", "header Authorization: Bearer ***"),
    ('{"a": "http://me:pass@h", "b": "x@y"}', '{"a": "http://***@h", "b": "x@y"}'),
    ("(no answer from https://me:pass@h/x: timeout)", "(no answer from https://***@h/x: timeout)"),
]
HARMLESS = [
    "http://127.0.0.1:8265",
    "http://head:8265/api?next=a@b",
    "http://head:8265/mail@x",
    "s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http&region=eu",
    "gs://anonymous@bucket/x",
    "abfss://container@account.dfs.core.windows.net/path",
    "ssh://ray@10.0.0.1:22",
    "openai/whisper-small",
    "/data/a:b@c/manifest.jsonl",
    "mail me@example.com: lora.rank is 3?",
    "s3://b/x?monkey=1&author=me",
]


@pytest.mark.parametrize(("text", "shown"), SECRETS)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert holds_secret(text)
    assert not holds_secret(shown), "hidden once is hidden"


@pytest.mark.parametrize("text", HARMLESS)
def test_everything_else_stays(text: str) -> None:
    assert redact(text) == text
    assert not holds_secret(text)


def test_values_of_the_environments_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hf_0123456789-and-more")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/token-file")
    monkeypatch.setenv("EMPTY_TOKEN", "")
    monkeypatch.setenv("SHORT_TOKEN", "none")
    said = "hub said hf_0123456789; bucket said hf_0123456789-and-more; none in /home/me/token-file"
    assert redact(said) == "hub said ***; bucket said ***; none in /home/me/token-file"


def test_errors_hide_secrets_by_themselves() -> None:
    """Whoever prints, logs, stores or pickles one."""
    error = StudyError("--address https://me:pass@head: nobody answers")
    for shown in (str(error), repr(error), str(pickle.loads(pickle.dumps(error)))):
        assert "me:pass" not in shown
        assert "https://***@head: nobody answers" in shown
    assert str(TunerError()) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten\x08", "over\\rwritten\\x08"),
        ("\x9b31m", "\\x9b31m"),
        ("a\u202egpj.exe", "a\\u202egpj.exe"),
        ("ünïcode 漢字 [bold]\n\ttwo lines", "ünïcode 漢字 [bold]\n\ttwo lines"),
    ],
)
def test_a_terminal_is_told_nothing(text: str, shown: str) -> None:
    assert printable(text) == shown
