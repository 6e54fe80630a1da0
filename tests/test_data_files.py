"""Files that are not what their names say, and values that are not what a reader expects."""

import gzip

import pytest

from pisces_jax.utils.files import sniff


@pytest.mark.parametrize(
    "first, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
        (gzip.compress(b"{}"), "gzip"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"\xef\xbb\xbf<html>", "a web page"),
        (b"PK\x03\x04abc", "zip"),
        (bytes(600), "only zeros"),
        (b'{"text": "<html>"}', None),
        (b'\xef\xbb\xbf[{"a": 1}]', None),
        (b"PAR1", None),
        (b"", None),
    ],
)
def test_first_bytes_say_what_a_file_is(first, words):
    found = sniff(first)
    assert found is None if words is None else found is not None and words in found
