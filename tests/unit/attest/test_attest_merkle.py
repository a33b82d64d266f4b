"""RFC 6962 trees against the published roots of the Certificate Transparency test tree, and against
the recursive definition of the RFC."""

import hashlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.attest import merkle

LEAVES = [
    bytes.fromhex(x)
    for x in (
        "", "00", "10", "2021", "3031", "40414243", "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]  # fmt: skip
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def mth(leaves):
    """MTH as section 2.1 writes it."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def path(m, leaves):
    """PATH as section 2.1.1 writes it."""
    if len(leaves) == 1:
        return []
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    if m < k:
        return [*path(m, leaves[:k]), mth(leaves[k:])]
    return [*path(m - k, leaves[k:]), mth(leaves[:k])]


@pytest.mark.parametrize("count", range(9))
def test_published_roots(count):
    assert merkle.root(LEAVES[:count]).hex() == ROOTS[count]


@pytest.mark.parametrize("count", range(1, 40))
def test_root_and_paths_are_the_definition(count):
    leaves = [bytes([i]) for i in range(count)]
    assert merkle.root(leaves) == mth(leaves)
    for i in range(count):
        assert list(merkle.path(leaves, i)) == path(i, leaves)
        assert merkle.root_from_path(leaves[i], i, count, merkle.path(leaves, i)) == mth(leaves)


@given(st.integers(1, 300), st.data())
def test_a_path_fits_one_place_in_one_tree(count, data):
    leaves = [i.to_bytes(2, "big") for i in range(count)]
    i = data.draw(st.integers(0, count - 1))
    siblings = merkle.path(leaves, i)
    root = merkle.root(leaves)
    other = data.draw(st.integers(0, count + 2).filter(lambda x: x != i))
    for leaf, index, total, nodes in (
        (leaves[i] + b"x", i, count, siblings),
        (leaves[i], other, count, siblings),
        (leaves[i], i, count, (*siblings, b"\0" * 32)),
        (leaves[i], i, count, siblings[:-1]) if siblings else (b"", i, count, siblings),
        (leaves[i], -1, count, siblings),
        (leaves[i], i, 0, siblings),
    ):
        with suppress(ValueError):
            assert merkle.root_from_path(leaf, index, total, nodes) != root


def test_a_wrong_count_with_another_shape_is_refused():
    leaves = [bytes([i]) for i in range(5)]
    for count in (1, 2, 3, 4, 9, 17):
        with pytest.raises(ValueError, match=r"path|leaf"):
            merkle.root_from_path(leaves[4], 4, count, (*merkle.path(leaves, 4), b"\0" * 32))


def test_siblings_must_be_32_bytes():
    with pytest.raises(ValueError, match="32 bytes"):
        merkle.root_from_path(b"", 0, 2, (b"\0" * 31,))
    with pytest.raises(IndexError):
        merkle.path([b""], 1)
