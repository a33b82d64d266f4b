"""Tiles: the specification's own paths and sizes; an independent verifier reads every file."""

import os
import random
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate.seal import checkpoint, tiles
from casemate.seal.checkpoint import Checkpoint
from casemate.seal.tiles import ENTRIES, Tile
from casemate.spec import merkle
from casemate.spec.errors import CasemateError, FormatError
from support import rfc6962

FUZZ = int(os.environ.get("CASEMATE_FUZZ", "20000"))
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key().public_bytes_raw()
ORIGIN = "log.example/tiles"


def numbered(count):
    return [b"entry %d " % i * (i % 3) for i in range(count)]


def write(folder: Path, entries, known=0):
    """The log as static files; only what a log of ``known`` entries lacks."""
    node = merkle.tree(entries)
    for tile in tiles.tiles(len(entries), known):
        if tile.level == ENTRIES:
            data = tiles.bundle(entries[tile.place * 256 :][: tile.width])
        else:
            data = tiles.hashes(tile, node)
        path = folder / tile.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    head = Checkpoint(ORIGIN, len(entries), merkle.root(len(entries), node))
    (folder / "checkpoint").write_bytes(str(checkpoint.sign(head, PUBLIC, KEY.sign)).encode())


def refused(call, *args):
    with pytest.raises(FormatError) as e:
        call(*args)
    assert e.value.code == "format.tile"
    return e.value


# Paths.


@pytest.mark.parametrize(
    ("tile", "path"),
    [
        # c2sp.org/tlog-tiles
        (Tile(0, 1234067), "tile/0/x001/x234/067"),
        (Tile(0, 273, 112), "tile/0/273.p/112"),
        (Tile(1, 1, 17), "tile/1/001.p/17"),
        (Tile(2, 0, 1), "tile/2/000.p/1"),
        (Tile(0, 0), "tile/0/000"),
        # golang.org/x/mod/sumdb/tlog, tlog_test.go, with this specification's height and names
        (Tile(0, 1, 5), "tile/0/001.p/5"),
        (Tile(5, 123456078), "tile/5/x123/x456/078"),
        (Tile(5, 123456078, 2), "tile/5/x123/x456/078.p/2"),
        (Tile(0, 3057500), "tile/0/x003/x057/500"),
        (Tile(ENTRIES, 3057500), "tile/entries/x003/x057/500"),
        (Tile(ENTRIES, 1000, 255), "tile/entries/x001/000.p/255"),
        (Tile(63, 10**18 - 1), "tile/63/x999/x999/x999/x999/x999/999"),
    ],
)
def test_paths(tile, path):
    assert tile.path == path and tiles.read_path(path) == tile


@pytest.mark.parametrize(
    "path",
    [
        *("", "tile", "tile/0", "tile/0/", "tile/0/0", "tile/0/00", "tile/0/0000", "/tile/0/000"),
        *("tile/0/000/", "tile/0/000\n", "tile/0/000.p", "tile/0/000.p/", "tile/0/000.p/0"),
        *("tile/0/000.p/01", "tile/0/000.p/256", "tile/0/000.p/257", "tile/0/000.p/999"),
        *("tile/0/000.p/1000", "tile/00/000", "tile/01/000", "tile/64/000", "tile/99/000"),
        *("tile/100/000", "tile/-1/000", "tile/data/000", "tile/Entries/000", "tile/5/123/456/078"),
        *("tile/0/x000/000", "tile/0/x000/x001/000", "tile/0/x001", "tile/0/x1/000"),
        *("tile/0/x001/x000", "tile/0/x1234/067", "tile/0/../000", "tile/0/%30%30%30"),
        *("tile/0/x001/x001/x001/x001/x001/x001/000", "tile/0/٠٠٠", "tile/٠/000", "x" * 1000),
    ],
)
def test_paths_that_are_none(path):
    assert len(refused(tiles.read_path, path).message) < 200


some_tiles = st.builds(
    Tile,
    st.one_of(st.just(ENTRIES), st.integers(0, 63)),
    st.integers(0, 10**18 - 1),
    st.integers(1, 256),
)


@given(some_tiles)
def test_any_path_is_read_as_it_was_written(tile):
    assert tiles.read_path(tile.path) == tile
    assert tile.path == f"tile/{tile.level}/{rfc6962.tile_name(tile.place, tile.width)}"


def test_fuzzed_paths_have_one_spelling():
    rng = random.Random(8)
    read = 0
    for _ in range(FUZZ):
        level = rng.choice([ENTRIES, *range(64)])
        path = Tile(level, rng.randrange(10 ** rng.randrange(1, 12)), rng.randrange(1, 257)).path
        at = rng.randrange(len(path))
        put = rng.choice(["", "0", "x", "/", ".p/1", "9", " ", "1"])
        path = path[:at] + put + path[at + rng.randrange(3) :]
        try:
            found = tiles.read_path(path)
        except CasemateError as e:
            assert e.code == "format.tile"
        else:
            assert found.path == path and 1 <= found.width <= 256
            read += 1
    assert read


# Sizes.


def widths(size, known=0):
    out = {}
    for tile in tiles.tiles(size, known):
        out.setdefault(tile.level, []).append(tile.width)
    return out


def test_the_specifications_sizes():
    assert widths(256) == {ENTRIES: [256], 0: [256], 1: [1]}
    found = widths(70000)
    assert found == {
        ENTRIES: [256] * 273 + [112],
        0: [256] * 273 + [112],
        1: [256, 17],
        2: [1],
    }
    assert widths(0) == {} and widths(1) == {ENTRIES: [1], 0: [1]}
    assert widths(255) == {ENTRIES: [255], 0: [255]}
    assert widths(65536) == {ENTRIES: [256] * 256, 0: [256] * 256, 1: [256], 2: [1]}


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 511, 512, 65535, 65536, 70000])
def test_tiles_are_those_of_the_definition(size):
    want = {(level, i): w for level, i, w in rfc6962._expected(size)}
    assert {(str(t.level), t.place): t.width for t in tiles.tiles(size)} == want


@given(st.integers(0, 10**6), st.integers(0, 3000))
def test_what_is_new_and_what_was_there_make_the_whole(known, more):
    new = list(tiles.tiles(known + more, known))
    before = {(t.level, t.place): t.width for t in tiles.tiles(known)}
    both = before | {(t.level, t.place): t.width for t in new}
    assert both == {(t.level, t.place): t.width for t in tiles.tiles(known + more)}
    assert all(before.get((t.level, t.place)) != t.width for t in new)
    assert len(set(new)) == len(new)


@given(st.integers(0, 10**7))
def test_within(size):
    for tile in list(tiles.tiles(size))[-400:]:
        assert tiles.within(tile, size)
        shift = 0 if tile.level == ENTRIES else 8 * tile.level
        if tile.width == 256:
            assert not tiles.within(tile, ((tile.place + 1) << (shift + 8)) - 1)
        else:
            assert tiles.within(Tile(tile.level, tile.place, 1), size)
            assert not tiles.within(Tile(tile.level, tile.place, tile.width + 1), size)
        assert not tiles.within(Tile(tile.level, tile.place + 1, 1), size) or tile.width == 256


# Contents.


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=256))
def test_entries_are_read_as_they_were_written(entries):
    tile = Tile(ENTRIES, 0, len(entries))
    data = tiles.bundle(entries)
    assert tiles.unbundle(tile, data) == tuple(entries)
    for bad in (data[:-1], data + b"\0", data + b"\0\0", b"", data[1:]):
        if bad != data:
            try:
                found = tiles.unbundle(tile, bad)
            except FormatError as e:
                assert e.where == tile.path
            else:  # cutting the front may give another bundle, never the same entries
                assert tiles.bundle(found) == bad


def test_an_entry_is_as_long_as_it_may_be():
    longest = bytes(0xFFFF)
    assert tiles.unbundle(Tile(ENTRIES, 0, 1), tiles.bundle([longest])) == (longest,)
    with pytest.raises(ValueError, match="65535"):
        tiles.bundle([b"", bytes(0x10000)])


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\2x", b"\0\0\0", b"\0\1xx", b"\xff\xff"])
def test_bundles_that_are_none(data):
    assert refused(tiles.unbundle, Tile(ENTRIES, 0, 1), data).where == "tile/entries/000.p/1"


def test_a_tile_of_hashes_has_its_length():
    tile = Tile(0, 0, 3)
    assert tiles.check(tile, bytes(96)) == bytes(96)
    for length in (0, 95, 97, 32, 8192):
        refused(tiles.check, tile, bytes(length))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 255, 256, 257, 300, 513, 1000])
def test_an_independent_verifier_reads_every_file(tmp_path, size):
    entries = numbered(size)
    write(tmp_path, entries)
    assert rfc6962.read(tmp_path, ORIGIN, PUBLIC) == entries


def test_a_log_that_grows_stays_readable(tmp_path):
    entries, known = numbered(1300), 0
    for size in (1, 7, 255, 256, 300, 511, 513, 1024, 1300):
        write(tmp_path, entries[:size], known)
        known = size
        assert rfc6962.read(tmp_path, ORIGIN, PUBLIC) == entries[:size]
    for partial in tmp_path.rglob("*.p"):  # full tiles stand in for partial ones that are gone
        full = partial.with_name(partial.name.removesuffix(".p"))
        if full.exists():
            for file in partial.iterdir():
                file.unlink()
    assert rfc6962.read(tmp_path, ORIGIN, PUBLIC) == entries


def test_any_flip_in_any_file_is_found_by_the_independent_verifier(tmp_path):
    write(tmp_path, numbered(300))
    files = [p for p in sorted(tmp_path.rglob("*")) if p.is_file()]
    assert len(files) == 6  # the checkpoint, two bundles, two tiles of level 0, one of level 1
    rng = random.Random(3)
    for file in files:
        data = file.read_bytes()
        for _ in range(12):
            at = rng.randrange(len(data))
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
            with pytest.raises((rfc6962.Wrong, ValueError)):
                rfc6962.read(tmp_path, ORIGIN, PUBLIC)
        for bad in (data[:-1], data + b"\0", b""):
            file.write_bytes(bad)
            with pytest.raises((rfc6962.Wrong, ValueError)):
                rfc6962.read(tmp_path, ORIGIN, PUBLIC)
        file.unlink()
        with pytest.raises((rfc6962.Wrong, FileNotFoundError)):
            rfc6962.read(tmp_path, ORIGIN, PUBLIC)
        file.write_bytes(data)
    with pytest.raises(rfc6962.Wrong):
        rfc6962.read(tmp_path, ORIGIN, bytes(32))
    with pytest.raises(rfc6962.Wrong):
        rfc6962.read(tmp_path, "log.example/other", PUBLIC)
    rfc6962.read(tmp_path, ORIGIN, PUBLIC)


@settings(max_examples=40)
@given(st.integers(1, 700), st.data())
def test_a_tree_is_read_from_its_tiles(size, data):
    entries = numbered(size)
    node = merkle.tree(entries)
    loads = []

    def load(tile):
        loads.append(tile)
        return tiles.hashes(tile, node)

    read = tiles.reader(size, load)
    assert merkle.root(size, read) == rfc6962.mth(entries)
    place, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
    assert list(merkle.inclusion(place, size, read)) == rfc6962.path(place, entries)
    assert list(merkle.consistency(old, size, read)) == rfc6962.proof(old, entries)
    assert len(loads) == len(set(loads)), "a tile is loaded once"
    assert set(loads) <= set(tiles.tiles(size))
    for level, outside in ((0, size), (0, size + 256), (8, size >> 8), (3, size >> 3), (16, 0)):
        with pytest.raises(IndexError):
            read(level, outside)


def test_a_reader_loads_no_more_than_it_needs():
    entries, loads = numbered(600), []
    node = merkle.tree(entries)

    def load(tile):
        loads.append(tile)
        return tiles.hashes(tile, node)

    read = tiles.reader(600, load)
    assert read(8, 1) == node(8, 1) and loads == [Tile(1, 0, 2)]
    assert loads[0].path == "tile/1/000.p/2"
    assert read(9, 0) == node(9, 0) and loads == [Tile(1, 0, 2)]
    assert read(6, 8) == node(6, 8) and loads == [Tile(1, 0, 2), Tile(0, 2, 88)]


def test_a_reader_refuses_a_tile_of_another_length():
    refused(tiles.reader(3, lambda _: bytes(64)), 0, 0)


def test_roots_and_proofs_agree_with_the_independent_verifier():
    """All sizes to 70: the roots that the proofs lead to, by a second algorithm."""
    entries = numbered(70)
    node = merkle.tree(entries)
    roots = [rfc6962.mth(entries[:n]) for n in range(71)]
    for size in range(1, 71):
        assert merkle.root(size, node) == roots[size]
        for place in range(size):
            path = list(merkle.inclusion(place, size, node))
            leaf = rfc6962.mth(entries[place : place + 1])
            assert rfc6962.root_of_path(place, size, leaf, path) == roots[size]
        for old in range(1, size + 1):
            proof = list(merkle.consistency(old, size, node))
            assert rfc6962.roots_of_proof(old, size, roots[old], proof) == (roots[old], roots[size])


@settings(max_examples=200)
@given(
    st.integers(1, 200), st.integers(1, 200), st.lists(st.integers(0, 3), max_size=10), st.randoms()
)
def test_both_verifiers_refuse_the_same_proofs(a, b, drops, rng):
    """Proofs with nodes dropped, doubled or swapped: accepted by both or by none."""
    old, size = sorted((a, b))
    entries = numbered(size)
    old_root, root = rfc6962.mth(entries[:old]), rfc6962.mth(entries)
    proof = rfc6962.proof(old, entries)
    for what in drops[:2]:
        at = rng.randrange(len(proof) + 1)
        match what:
            case 0:
                proof = proof[:at] + proof[at + 1 :]
            case 1:
                proof = [*proof[:at], bytes(32), *proof[at:]]
            case 2:
                proof = proof[::-1]
            case _:
                proof = [*proof[:at], *proof[:1], *proof[at:]]
    try:
        theirs = rfc6962.roots_of_proof(old, size, old_root, proof) == (old_root, root)
    except ValueError:
        theirs = False
    try:
        merkle.check_consistency(old, old_root, size, root, proof)
        ours = True
    except ValueError:
        ours = False
    assert ours == theirs
