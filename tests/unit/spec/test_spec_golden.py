"""Each shared format has one golden file: its bytes may not change without a new version."""

import re

import pytest

from casemate.spec import codec
from support import formats

FORMATS = formats.formats()


def test_the_search_finds_formats_outside_spec_too():
    assert {"graph/v1", "identity-file/v1", "policy/v1"} <= set(FORMATS)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*/v[1-9][0-9]*", name) for name in FORMATS)


def test_no_golden_file_is_without_a_format():
    known = {formats.golden(name) for name in FORMATS}
    assert set(formats.GOLDEN.iterdir()) == known


@pytest.mark.parametrize("name", FORMATS)
def test_golden(name):
    kind, path = FORMATS[name], formats.golden(name)
    assert path.exists(), "run: python tests/support/formats.py"
    sample = formats.sample(kind)
    assert codec.encode(sample) == path.read_bytes()
    assert codec.decode(kind, path.read_bytes()) == sample


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_frozen(name):
    sample = formats.sample(FORMATS[name])
    field = next(iter(sample.__dataclass_fields__))
    with pytest.raises(AttributeError):
        setattr(sample, field, None)
    assert not hasattr(sample, "__dict__")
