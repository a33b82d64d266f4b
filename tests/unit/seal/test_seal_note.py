"""Signed notes: the specification's and Go's own vectors, every refusal, hostile signers."""

import base64
import random

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from casemate.seal import note
from casemate.seal.note import Line, Note, Verifier
from casemate.spec.errors import CasemateError
from support import vectors_tlog as vectors
from support.fuzzing import feed
from support.mutation import COUNT, scrambled

# Two seeds whose keys have one id (dfcc4e10) under this name and type 4: a birthday's work.
COLLIDING = "witness.example/w"
COLLIDING_SEEDS = (81128, 95178)


def key(seed: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(seed.to_bytes(32, "big"))


def public(seed: int) -> bytes:
    return key(seed).public_key().public_bytes_raw()


def by(seed: int, name: str = "log.example/a", kind: int = note.SIGNATURE) -> Verifier:
    return Verifier(name, kind, public(seed))


def signed(text: str, *seeds: int) -> Note:
    lines = [note.sign(text, f"log.example/{s}", public(s), key(s).sign) for s in seeds]
    return Note(text, tuple(lines))


def code_of(call, *args):
    with pytest.raises(CasemateError) as e:
        call(*args)
    return e.value.code


# Vectors.


def test_the_specifications_example_is_read_and_written():
    found = note.parse(vectors.POEM)
    assert str(found) == vectors.POEM
    assert found.text.endswith("sole:\n\ned è subito sera.\n")
    assert [line.name for line in found.lines] == ["quasimodo.example/salvatore"]
    assert found.lines[0].id.hex() == "367ba04b" and len(found.lines[0].signature) == 64
    assert note.parse(vectors.POEM.encode()) == found


def test_the_specifications_cosignature_is_read():
    found = note.parse(vectors.SOFA + "\n" + vectors.SOFA_LINE + vectors.SOFA_COSIGNATURE)
    witness = found.lines[1]
    assert len(witness.signature) == 8 + 64
    assert int.from_bytes(witness.signature[:8], "big") == vectors.SOFA_SECONDS
    assert str(found.lines[0]) == vectors.SOFA_LINE
    assert [str(x) for x in found.lines][1] == vectors.SOFA_COSIGNATURE


def test_a_witness_signs_the_specifications_message():
    seen = []
    note.cosign(vectors.SOFA, "w", public(1), lambda m: seen.append(m) or bytes(64), 1679315147)
    assert seen == [vectors.SOFA_SIGNED_MESSAGE.encode()]


def test_the_specifications_answer_is_read():
    found = note.lines(vectors.WITNESS_ANSWER)
    assert [line.name for line in found] == ["witness.example/w1"] * 2 + ["witness.example/w2"]
    assert "".join(map(str, found)) == vectors.WITNESS_ANSWER


def test_the_checksum_databases_note_verifies():
    log = note.verifier(vectors.SUM_KEY)
    assert note.verify(note.parse(vectors.SUM_NOTE), [log]) == {log: None}
    assert str(note.parse(vectors.SUM_NOTE)) == vectors.SUM_NOTE


def test_go_signs_the_same():
    seed = base64.b64decode(vectors.PETER_SEED)[1:]
    peter = note.verifier(vectors.PETER)
    private = Ed25519PrivateKey.from_private_bytes(seed)
    assert private.public_key().public_bytes_raw() == peter.key
    assert str(note.sign(vectors.GO_TEXT, "PeterNeumann", peter.key, private.sign)) == (
        vectors.PETER_LINE
    )


def test_go_verifies_the_same():
    peter, enoch = map(note.verifier, (vectors.PETER, vectors.ENOCH))
    found = note.parse(vectors.GO_TEXT + "\n" + vectors.PETER_LINE + vectors.ENOCH_LINE)
    assert note.verify(found, [peter]) == {peter: None}
    assert note.verify(found, [peter, enoch]) == {peter: None, enoch: None}
    assert note.verify(found, [peter, peter]) == {peter: None}
    assert code_of(note.verify, found, []) == "receipt.note-unsigned"


@pytest.mark.parametrize(
    "message",
    [
        vectors.GO_TEXT,
        vectors.GO_TEXT + "\n",
        vectors.GO_TEXT + "\n" + vectors.PETER_LINE[:-1],
        "\x01" + vectors.GO_TEXT + "\n" + vectors.PETER_LINE,
        vectors.GO_TEXT + "\n" + vectors.PETER_LINE.replace("PeterNeumann", "Bad Name"),
        vectors.GO_TEXT + "\n" + vectors.PETER_LINE + "Unexpected line.\n",
        vectors.GO_TEXT + "\n" + vectors.PETER_LINE * 101,
    ],
)
def test_go_refuses_the_same(message):
    assert code_of(note.parse, message) == "format.note"


def test_go_refuses_the_same_signature():
    line = vectors.PETER_LINE[:60] + "ABCD" + vectors.PETER_LINE[60:]
    found = note.parse(vectors.GO_TEXT + "\n" + line)
    assert code_of(note.verify, found, [note.verifier(vectors.PETER)]) == "receipt.note-signature"


@pytest.mark.parametrize("vkey", [vectors.PETER, vectors.ENOCH, vectors.SUM_KEY])
def test_keys_of_logs(vkey):
    assert note.verifier(vkey).kind == note.SIGNATURE and str(note.verifier(vkey)) == vkey


@pytest.mark.parametrize("vkey", vectors.WITNESS_KEYS)
def test_keys_of_witnesses_that_run(vkey):
    found = note.verifier(vkey)
    assert found.kind == note.COSIGNATURE and str(found) == vkey
    assert found.name == vkey.split("+")[0] and found.id.hex() == vkey.split("+")[1]


def test_a_policys_witnesses_cosign():
    found = note.witnesses(vectors.WITNESS_KEYS)
    assert [str(v) for v in found] == vectors.WITNESS_KEYS and note.witnesses([]) == ()
    with pytest.raises(CasemateError) as e:
        note.witnesses([vectors.WITNESS_KEYS[0], vectors.SUM_KEY])
    assert (e.value.code, e.value.where) == ("format.note", "sum.golang.org")


@pytest.mark.parametrize(
    ("vkey", "where"),
    [
        ("n" * 90, "n" * 80),
        ("name+00000000", "name+00000000"),
        ("log+00000000+" + base64.b64encode(b"\x02" + bytes(32)).decode(), "log"),
        ("log+00000000+" + base64.b64encode(b"\x01" + bytes(32)).decode(), "log"),
    ],
)
def test_a_refused_key_is_named(vkey, where):
    with pytest.raises(CasemateError) as e:
        note.verifier(vkey)
    assert (e.value.code, e.value.where) == ("format.note", where)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("x" * 70, "x" * 60),
        ("\u2014 " + "n" * 70 + " AAAA", "n" * 60),
        ("\u2014 log.example AAAA", "log.example"),
        ("\u2014 log.example A AAAA", ""),
    ],
)
def test_a_refused_line_is_named(text, where):
    with pytest.raises(CasemateError) as e:
        note.line(text)
    assert (e.value.code, e.value.where) == ("format.note", where)


def test_every_part_and_every_flip_of_a_key_is_refused():
    vkey = vectors.PETER
    for i in range(len(vkey)):
        for j in range(i + 1, len(vkey) + 1):
            if (i, j) != (0, len(vkey)):
                assert code_of(note.verifier, vkey[i:j]) == "format.note"
        assert code_of(note.verifier, vkey[:i] + chr(ord(vkey[i]) + 1) + vkey[i + 1 :])


@pytest.mark.parametrize(
    "vkey",
    [
        vectors.PETER_LONG,
        vectors.PETER_UNKNOWN_TYPE,
        *vectors.BAD_KEYS,
        *("", "++", "a+b+", "\ud800+00+AA=="),
    ],
)
def test_keys_that_are_none(vkey):
    assert code_of(note.verifier, vkey) == "format.note"


def test_a_keys_id_is_its_own():
    vkey = vectors.PETER.replace("c74f20a3", "C74F20A3")
    assert code_of(note.verifier, vkey) == "format.note"


# Form.


@pytest.mark.parametrize(
    "name", ["", "a b", "a+b", "a\tb", "a\u2003b", "a\u00a0", "\x1f", "\ud800", "\u2028", "a\n"]
)
def test_names_that_are_none(name):  # fmt: skip
    assert code_of(note.check_name, name) == "format.note"


@pytest.mark.parametrize(
    "name", ["a", "example.com/log", "é", "日本", "oid/1.2.3", "!", "a—b", "\x7f", "\ue000"]
)
def test_names(name):
    assert note.check_name(name) == name


@pytest.mark.parametrize(
    "text",
    ["", "AA", "AA=", "AAB=", "A A=", "AA==\n", "-_8=", "AAA=A", "====", "é", "AAAAA", "\ud800"],
)
def test_base64_has_one_spelling(text):
    assert code_of(note.octets, text) == "format.note"


def test_octets():
    assert note.octets("AA==") == b"\0" and note.octets("+/8=") == b"\xfb\xff"


@pytest.mark.parametrize(
    "text",
    [
        *("", "- a AAAAAAA=", "— a", "—a AAAAAAA=", "— a AAAAAA=="),
        *("— a  AAAAAAA=", "—  AAAAAAA=", "— a AAAAAAA= ", "x— a AAAAAAA="),
    ],
)
def test_lines_that_are_none(text):
    assert code_of(note.line, text) == "format.note"


def test_the_shortest_line():
    assert note.line("— a AAAAAAA=") == Line("a", bytes(4), b"\0")


def test_as_many_signatures_as_there_may_be():
    line = "— a AAAAAAA=\n"
    assert note.MAX_SIGNATURES >= 16  # the specification's least
    assert len(note.lines(line * note.MAX_SIGNATURES)) == note.MAX_SIGNATURES
    assert code_of(note.lines, line * (note.MAX_SIGNATURES + 1)) == "format.note"
    for text in ("", "\n", line[:-1], "\n" + line, line + "\n"):
        assert code_of(note.lines, text) == "format.note"


def test_a_note_is_as_long_as_it_may_be():
    tail = "\n— a AAAAAAA=\n"
    room = note.MAX_NOTE - len(tail.encode()) - 1
    assert note.parse("x" * room + "\n" + tail).text == "x" * room + "\n"
    assert code_of(note.parse, "x" * (room + 1) + "\n" + tail) == "format.note"
    assert code_of(note.parse, "é" * (room // 2 + 1) + "\n" + tail) == "format.note"


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\n\n", "x", "x\n", "x\n\n", "\n\n— a AAAAAAA=\n", "x\n— a AAAAAAA=\n"),
        *("x\r\n\n— a AAAAAAA=\n", "x\0\n\n— a AAAAAAA=\n", "x\n\n— a AAAAAAA=\n\n"),
        *(b"\xff\n\n\xe2\x80\x94 a AAAAAAA=\n", "\ud800\n\n— a AAAAAAA=\n"),
    ],
)
def test_notes_that_are_none(data):
    assert code_of(note.parse, data) == "format.note"


def test_the_last_empty_line_parts_text_and_signatures():
    found = note.parse("a\n\n— b AAAAAAA=\n\n— c AAAAAAA=\n")
    assert found.text == "a\n\n— b AAAAAAA=\n" and [x.name for x in found.lines] == ["c"]
    assert note.parse("a\n\n\n— c AAAAAAA=\n").text == "a\n\n"
    assert note.parse("\n\n\n— c AAAAAAA=\n").text == "\n\n"


def test_of_one_key_the_newest_line_stays():
    first, second = Line("a", b"1234", b"x"), Line("a", b"1234", b"y")
    other, another = Line("b", b"1234", b"x"), Line("a", b"1235", b"x")
    assert Note("t\n", (first,)).add([second, other, another]).lines == (second, other, another)
    assert Note("t\n", (first, other)).add([]).lines == (first, other)


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), min_size=1).filter(
    lambda s: "+" not in s and not any(c.isspace() for c in s)
)
some_lines = st.builds(Line, names, st.binary(min_size=4, max_size=4), st.binary(min_size=1))
texts = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc",), include_characters="\n")
).map(lambda s: "x" + s + "\n")


@given(texts, st.lists(some_lines, min_size=1, max_size=8))
def test_any_note_is_read_as_it_was_written(text, lines):
    made = Note(text, tuple(lines))
    assert note.parse(str(made)) == made
    assert note.parse(str(made).encode()) == made


@given(
    names, st.sampled_from([note.SIGNATURE, note.COSIGNATURE]), st.binary(min_size=32, max_size=32)
)
def test_any_key_is_read_as_it_was_written(name, kind, key):
    made = Verifier(name, kind, key)
    assert note.verifier(str(made)) == made


# Signatures.


@given(texts, st.integers(0, 2**63 - 1))
def test_what_was_signed_verifies_and_nothing_else(text, seconds):
    log, witness = by(1), by(2, "w", note.COSIGNATURE)
    made = Note(
        text,
        (
            note.sign(text, log.name, log.key, key(1).sign),
            note.cosign(text, "w", witness.key, key(2).sign, seconds),
        ),
    )
    assert note.verify(made, [log, witness]) == {log: None, witness: seconds}
    assert note.verify(made, [witness, by(3)]) == {witness: seconds}
    other = Note("x" + text, made.lines)
    for known in ([log], [witness], [log, witness]):
        assert code_of(note.verify, other, known) == "receipt.note-signature"


@pytest.mark.parametrize("seconds", [-1, 2**63, 2**64])
def test_a_time_is_within_its_range(seconds):
    with pytest.raises(ValueError, match="is no time"):
        note.cosign("x\n", "w", public(1), key(1).sign, seconds)
    signature = (seconds % 2**64).to_bytes(8, "big") + key(1).sign(
        f"cosignature/v1\ntime {seconds % 2**64}\nx\n".encode()
    )
    witness = by(1, "w", note.COSIGNATURE)
    made = Note("x\n", (Line("w", witness.id, signature),))
    if seconds % 2**64 >= 2**63:
        assert code_of(note.verify, made, [witness]) == "receipt.note-signature"


def test_a_cosignature_is_eight_bytes_of_time_and_a_signature():
    line = note.cosign("x\n", "w", public(1), key(1).sign, 258)
    assert line.signature[:8].hex() == "0000000000000102"
    assert line.signature[8:] == key(1).sign(b"cosignature/v1\ntime 258\nx\n")
    assert note.verify(Note("x\n", (line,)), [by(1, "w", note.COSIGNATURE)])


def test_limits():
    assert (note.MAX_NOTE, note.MAX_SIGNATURES) == (65536, 64)


def test_unknown_keys_are_skipped_even_when_they_share_a_name_or_an_id():
    good = signed("x\n", 1)
    trusted = by(1, "log.example/1")
    noise = [
        Line("log.example/1", b"\0\0\0\0", b"junk"),
        Line("log.example/9", trusted.id, b"junk"),
        Line("other", b"1234", bytes(64)),
    ]
    assert note.verify(good.add(noise), [trusted]) == {trusted: None}
    assert note.verify(Note("x\n", (*noise, *good.lines)), [trusted]) == {trusted: None}
    with pytest.raises(CasemateError) as e:
        note.verify(Note("x\n", tuple(noise)), [trusted])
    assert (e.value.code, e.value.where) == ("receipt.note-unsigned", "")


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 63, 71, 72, 73, 200])
def test_a_bad_signature_of_a_known_key_refuses_the_note(cut):
    good = signed("x\n", 1, 2)
    known = [by(1, "log.example/1"), by(2, "log.example/2"), by(3, "w", note.COSIGNATURE)]
    cosigned = note.cosign("x\n", "w", public(3), key(3).sign, 5)
    assert len(note.verify(good.add([cosigned]), known)) == 3
    for line in (good.lines[1], cosigned):
        short = (line.signature + bytes(300))[:cut]
        if short != line.signature:
            bad = good.add([Line(line.name, line.id, short)])
            assert code_of(note.verify, bad, known) == "receipt.note-signature"
    flipped = Line("w", cosigned.id, cosigned.signature[:7] + b"\1" + cosigned.signature[8:])
    assert code_of(note.verify, good.add([flipped]), known) == "receipt.note-signature"


def test_a_signature_and_a_cosignature_of_one_key_do_not_pass_for_each_other():
    log, witness = by(1, "w"), by(1, "w", note.COSIGNATURE)
    assert log.id != witness.id
    plain = note.sign("x\n", "w", public(1), key(1).sign)
    timed = note.cosign("x\n", "w", public(1), key(1).sign, 7)
    for line, at in ((plain, witness), (timed, log)):
        swapped = Note("x\n", (Line("w", at.id, line.signature),))
        assert code_of(note.verify, swapped, [log, witness]) == "receipt.note-signature"


def test_a_key_with_another_ones_name_and_id_stands_before_nobody():
    """Who may name a key can match the 4 bytes of another; it must gain and cost nothing."""
    honest, hostile = (by(s, COLLIDING, note.COSIGNATURE) for s in COLLIDING_SEEDS)
    assert honest.id == hostile.id and honest != hostile
    theirs = [note.cosign("x\n", COLLIDING, public(s), key(s).sign, 5) for s in COLLIDING_SEEDS]
    for known in ([honest, hostile], [hostile, honest]):
        assert note.verify(Note("x\n", (theirs[0],)), known) == {honest: 5}
        assert note.verify(Note("x\n", (theirs[1],)), known) == {hostile: 5}
        assert note.verify(Note("x\n", tuple(theirs)), known) == {honest: 5, hostile: 5}
        bad = Note("x\n", (*theirs, Line(COLLIDING, honest.id, bytes(72))))
        assert code_of(note.verify, bad, known) == "receipt.note-signature"
    assert code_of(note.verify, Note("x\n", (theirs[1],)), [honest]) == "receipt.note-signature"


def test_one_signature_counts_for_one_key():
    """Two lines of one key are one signer: k of n counts keys, not lines."""
    witness = by(1, "w", note.COSIGNATURE)
    lines = [note.cosign("x\n", "w", public(1), key(1).sign, t) for t in (1, 2, 3)]
    assert note.verify(Note("x\n", tuple(lines)), [witness]) == {witness: 3}


def test_a_key_that_is_no_point_is_refused():
    none = Verifier("w", note.SIGNATURE, b"\xff" * 32)
    made = Note("x\n", (Line("w", none.id, bytes(64)),))
    assert code_of(note.verify, made, [none]) == "receipt.note-signature"


def test_a_refusal_names_the_key():
    made = Note("x\n", (Line("log.example/a", by(1).id, bytes(64)),))
    with pytest.raises(CasemateError) as e:
        note.verify(made, [by(1)])
    assert "log.example/a" in e.value.message and e.value.where == "log.example/a"


def test_fuzz():
    """Mutated notes, keys and lines: an answer or a refusal, and never a signature that was not."""
    rng = random.Random(5)
    log = note.verifier(vectors.SUM_KEY)
    sources = [s.encode() for s in (vectors.SUM_NOTE, vectors.POEM, vectors.SUM_KEY)]
    text = note.parse(vectors.SUM_NOTE).text

    def key(data: bytes):
        try:
            assert str(note.verifier(data.decode("utf-8", "replace"))).encode() == data
        except CasemateError as e:
            assert e.code == "format.note"

    def read(data: bytes):
        key(data)
        try:
            found = note.parse(data)
            assert str(found).encode() == data
            note.verify(found, [log])
            assert found.text == text
        except CasemateError as e:
            assert e.code in ("format.note", "receipt.note-signature", "receipt.note-unsigned")
            raise

    among = b"\n\n +=A\x00\xff\xe2"
    inputs = (scrambled(sources[i % len(sources)], rng, among) for i in range(COUNT))
    assert feed(read, inputs, (CasemateError,)) < COUNT // 2
