"""RFC 6962 trees against the published roots of the Certificate Transparency test tree, and against
the recursive definition of the RFC."""

import hashlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.spec import merkle

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


def proof(m, leaves, whole=True):
    """SUBPROOF as section 2.1.2 writes it."""
    if m == len(leaves):
        return [] if whole else [mth(leaves)]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    if m <= k:
        return [*proof(m, leaves[:k], whole), mth(leaves[k:])]
    return [*proof(m - k, leaves[k:], False), mth(leaves[:k])]


def numbered(count):
    return [i.to_bytes(2, "big") for i in range(count)]


@pytest.mark.parametrize("count", range(9))
def test_published_roots(count):
    assert merkle.root(count, merkle.tree(LEAVES[:count])).hex() == ROOTS[count]


@pytest.mark.parametrize("count", range(1, 40))
def test_roots_and_proofs_are_the_definition(count):
    leaves = numbered(count)
    node, root = merkle.tree(leaves), mth(leaves)
    assert merkle.root(count, node) == root
    for i in range(count):
        assert list(merkle.inclusion(i, count, node)) == path(i, leaves)
        hashed = merkle.leaf_hash(leaves[i])
        assert merkle.root_from_inclusion(hashed, i, count, path(i, leaves)) == root
    for old in range(1, count + 1):
        assert list(merkle.consistency(old, count, node)) == proof(old, leaves)
        merkle.check_consistency(old, mth(leaves[:old]), count, root, proof(old, leaves))
    assert merkle.consistency(0, count, node) == ()
    merkle.check_consistency(0, merkle.EMPTY, count, root, ())


@given(st.integers(0, 700))
def test_a_tree_that_grows_is_the_tree(count):
    nodes, leaves = {}, numbered(count)
    for size, leaf in enumerate(leaves):
        for level, place, hashed in merkle.grow(
            size, merkle.leaf_hash(leaf), lambda level, place: nodes[level, place]
        ):
            assert (level, place) not in nodes
            nodes[level, place] = hashed
    assert merkle.root(count, lambda level, place: nodes[level, place]) == mth(leaves)
    assert len(nodes) < 2 * max(1, count)


@given(st.integers(1, 300), st.data())
def test_a_path_fits_one_place_in_one_tree(count, data):
    leaves = numbered(count)
    i = data.draw(st.integers(0, count - 1))
    node = merkle.tree(leaves)
    siblings = merkle.inclusion(i, count, node)
    root = merkle.root(count, node)
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
            hashed = merkle.leaf_hash(leaf)
            assert merkle.root_from_inclusion(hashed, index, total, nodes) != root


@given(st.integers(1, 300), st.data())
def test_a_consistency_proof_fits_one_pair_of_trees(count, data):
    leaves = numbered(count)
    old = data.draw(st.integers(1, count))
    node = merkle.tree(leaves)
    found, before, after = merkle.consistency(old, count, node), mth(leaves[:old]), mth(leaves)
    bad = bytes(32)
    wrong = [
        (old, bad, count, after, found),
        (old, before, count, bad, found),
        (old, before, count, after, (*found, bad)),
        (count + 1, before, count, after, found),
    ]
    if found:
        at = data.draw(st.integers(0, len(found) - 1))
        wrong += [
            (old, before, count, after, found[:-1]),
            (old, before, count, after, (*found[:at], bad, *found[at + 1 :])),
            (old, before, old, after, found),
            (0, merkle.EMPTY, count, after, found),
        ]
    for case in wrong:
        with pytest.raises(ValueError, match=r"root|proof|tree"):
            merkle.check_consistency(*case)
    forked = mth([b"other", *leaves[1:]])
    if old < count:
        with pytest.raises(ValueError, match="root"):
            merkle.check_consistency(old, before, count, forked, found)


def test_a_wrong_count_with_another_shape_is_refused():
    leaves = [bytes([i]) for i in range(5)]
    node = merkle.tree(leaves)
    for count in (1, 2, 3, 4, 9, 17):
        with pytest.raises(ValueError, match=r"path|leaf"):
            merkle.root_from_inclusion(
                merkle.leaf_hash(leaves[4]), 4, count, (*merkle.inclusion(4, 5, node), bytes(32))
            )


def test_nodes_must_be_32_bytes_and_places_inside():
    for call in (
        lambda: merkle.root_from_inclusion(bytes(32), 0, 2, (bytes(31),)),
        lambda: merkle.check_consistency(1, bytes(32), 2, bytes(32), (bytes(33),)),
    ):
        with pytest.raises(ValueError, match="32 bytes"):
            call()
    node = merkle.tree([b""])
    for call in (
        lambda: merkle.inclusion(1, 1, node),
        lambda: merkle.consistency(2, 1, node),
        lambda: merkle.inclusion(-1, 1, node),
    ):
        with pytest.raises(IndexError):
            call()
