"""Every parser under fuzz, in one table: 20,000 inputs each in the test run, 1,000,000 by
``make fuzz``. What is read or refused is fine; a crash, another exception, 50 ms of processor time
or 64 MiB for one input is not (:mod:`support.fuzzing`).

The parsers of evidence have their own tests, beside their vectors; :data:`ELSEWHERE` names them,
and they are fed by the same harness."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import re
import socket
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import cbor2
import pytest

from casemate.attest import cbor, jws, x509
from casemate.attest.snp import abi as snp_abi
from casemate.attest.snp import uvm
from casemate.attest.trust import Trust
from casemate.attest.verify import verify_attestation
from casemate.client import anchors, receipts, replay
from casemate.client.data import encode, load_schema
from casemate.graph import check as graph_check
from casemate.graph import pack
from casemate.graph.model import Graph
from casemate.plan import check as plan_check
from casemate.plan import state as plan_state
from casemate.seal import anchors as anchor_files
from casemate.seal import checkpoint, dsse, hpke, note, requests, stream, tiles
from casemate.seal.identity import Identity
from casemate.server import backup
from casemate.spec import canonical, codec, frames, merkle, messages, tensors
from casemate.spec.data import Column, DatasetInfo
from casemate.spec.errors import CasemateError
from casemate.spec.evidence import Attestation
from casemate.spec.job import JobRequest
from casemate.spec.receipt import LogEntry, ReceiptProof
from casemate.tee import snp_certificates
from support import contract, evidence, fuzzing, ledgers, publog, snp
from support.disk import SimDisk
from support.mutation import COUNT, mutated, reformed, scrambled
from support.server import job_request, mlp, schema, table

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/unit/spec/golden"
DEFAULT = 20_000
Change = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Parser:
    """``parse`` reads bytes or raises one of ``refusals``; ``changes`` make inputs of ``seeds``.
    ``part``: of the count, for those that cost more. ``whole``: a seed is itself an input."""

    parse: fuzzing.Parse
    seeds: Sequence[bytes]
    changes: Sequence[Change] = (mutated,)
    part: float = 1.0
    whole: bool = True
    refusals: fuzzing.Refusals = (CasemateError,)


def headed(data: bytes, draw: random.Random, at: int = 0) -> bytes:
    """The JSON behind a length of 8 bytes, reformed, with its length and padding right again."""
    size = int.from_bytes(data[at : at + 8], "little")
    text = reformed(data[at + 8 : at + 8 + size], draw)
    text += b" " * (-len(text) % 8)
    return data[:at] + len(text).to_bytes(8, "little") + text + data[at + 8 + size :]


def second_headed(data: bytes, draw: random.Random) -> bytes:
    return headed(data, draw, 8 + int.from_bytes(data[:8], "little"))


def lines(data: bytes, draw: random.Random) -> bytes:
    return scrambled(data, draw, b"\n\n +=A0\x00\xff")


def golden(*kinds: type) -> list[bytes]:
    """The golden files of these shared formats, or of all."""
    names = {k.__casemate_type__ for k in kinds or codec.registered().values()}  # type: ignore[attr-defined]
    found = [p.read_bytes().rstrip(b"\n") for p in sorted(GOLDEN.glob("*.json"))]
    return [x for x in found if json.loads(x)["type"] in names]


def text(parse: Callable[[str], object]) -> fuzzing.Parse:
    return lambda data: parse(data.decode("utf-8", "replace"))


@cache
def folder() -> Path:
    """Where inputs lie that are read from a file."""
    made = tempfile.TemporaryDirectory()
    folder.made = made  # type: ignore[attr-defined]
    return Path(made.name)


def filed(name: str, parse: Callable[[Path], object]) -> fuzzing.Parse:
    path = folder() / name

    def read(data: bytes) -> object:
        path.unlink(missing_ok=True)  # a file written over would be waited for by the disk
        path.write_bytes(data)
        return parse(path)

    return read


# The rows, made when they are asked for.


def _values() -> Parser:
    kinds = list(codec.registered().values())
    return Parser(lambda d: frames.decode(kinds, d), golden(), (reformed, reformed, mutated))


def _frames() -> Parser:
    kinds = (messages.Ready, messages.Checked, messages.Prepared, messages.Locked, messages.State,
             messages.Done, messages.Failed)  # fmt: skip

    def read(data: bytes) -> object:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.setblocking(False)
            theirs.send(data)  # as much as there is room for
            theirs.shutdown(socket.SHUT_WR)
            return frames.receive(ours, kinds, timeout=5.0)

    def reframed(data: bytes, draw: random.Random) -> bytes:
        body = reformed(data[frames.HEAD :], draw)
        return len(body).to_bytes(frames.HEAD, "big") + body

    seeds = [len(x).to_bytes(4, "big") + x for x in golden(*kinds)]
    return Parser(read, seeds, (mutated, reframed))


def _graph() -> Parser:
    """What the worker does with a model before torch sees it."""
    bounds = {"y": (0, 1)}

    def admit(data: bytes) -> object:
        graph, weights = pack.unpack(data)
        infos = {name: info for name, (info, _) in weights.items()}
        return graph_check.check(graph, infos, bounds=bounds)

    changes = (headed, headed, headed, second_headed, mutated)
    return Parser(admit, [mlp().data], changes, part=0.5)


def _golden_graph() -> Parser:
    from support.rawgraph import graph, infos, ls, node, r

    made = graph(
        node("a", "linear.default", r("t"), r("m")),
        node("b", "softmax.int", r("a"), 2),
        node("c0", "reshape.default", r("b"), ls(-1, 12)),
        node("e0", "embedding.default", r("e"), r("i")),
        node("v", "conv2d.default", r("im"), r("k")),
    )
    of = infos(made)

    def admit(data: bytes) -> object:
        return graph_check.check(codec.decode(Graph, data), of, bounds={"i": (0, 9)})

    return Parser(admit, [codec.encode(made)], (reformed,), part=0.5)


def _dataset() -> Parser:
    """A table as the worker meets it: under its own commitment, so that only its form can be
    wrong."""
    from casemate.worker import dataset

    key, salt = bytes(32), bytes(32)

    def load(wire: bytes) -> object:
        fd = os.memfd_create("table")
        try:
            os.write(fd, b"".join(stream.encrypt(key, [wire])))
            name = "ds_" + hashlib.sha256(dataset.DOMAIN + salt + wire).hexdigest()[:40]
            columns = dataset.load(name, schema(rows=8), key, salt, fd)
            return dataset.check(schema(rows=8), columns)
        finally:
            os.close(fd)

    return Parser(load, [table(8)], (headed, mutated), part=0.5)


def _job() -> Parser:
    info = codec.decode(DatasetInfo, golden(DatasetInfo)[0])
    request = job_request("id_" + "0" * 40, [info], mlp())

    def read(data: bytes) -> object:
        made = codec.decode(JobRequest, data)
        return plan_check.check_request(made, [schema()] * len(made.datasets))

    return Parser(read, [codec.encode(request)], (reformed,), part=0.25)


def _state() -> Parser:
    of = json.loads(golden(messages.Run)[0])
    plan = codec.from_json(messages.Plan, of["plan"])
    train = codec.from_json(JobRequest, json.loads(golden(JobRequest)[0])).train
    plan = replace(plan, steps=10)
    named = {"job": plan_state.job(plan, train), "step": (3).to_bytes(8, "little")}
    made = tensors.dump({
        name: (kind, shape, named.get(name, bytes(tensors.DTYPES[kind][1] * math.prod(shape))))
        for name, (kind, shape) in plan_state.layout(train, 20).items()
    })  # fmt: skip
    return Parser(
        lambda data: plan_state.check(data[: plan_state.HEAD_BYTES], len(data), plan, train),
        [made], (headed, mutated),
    )  # fmt: skip


def _stream() -> Parser:
    key = bytes(32)
    sealed = b"".join(stream.encrypt(key, [bytes(300)], chunk=64))

    def read(data: bytes) -> object:
        fd = os.memfd_create("stream")
        try:
            os.write(fd, data)
            reader = stream.Reader(key, fd)
            assert b"".join(stream.decrypt(key, [data])) == reader.read(0, reader.size)
        finally:
            os.close(fd)
        return None

    return Parser(read, [sealed, b"".join(stream.encrypt(key, [b""]))])


def _signed_request() -> Parser:
    who, boot, url, body = Identity.generate("a"), bytes(16), "https://x.example/v1/jobs", b"{}"
    head = requests.sign(who, "POST", url, {}, body, boot=boot)

    def read(data: bytes) -> object:
        pairs = [x.partition(": ")[::2] for x in data.decode("latin-1").split("\n")]
        found = requests.verify(
            "POST", url, pairs, body, boot=boot, lookup={who.id: who.public}.get
        )
        assert found == who.id
        return None

    return Parser(read, ["\n".join(f"{k}: {v}" for k, v in head.items()).encode()],
                  (mutated, lines))  # fmt: skip


def _dsse() -> Parser:
    who = Identity.generate("a")
    made = dsse.sign("t", b"payload", who.sign, "k")

    def read(data: bytes) -> object:
        assert dsse.verify(data, {"k": who.public.sign_key}) == ("t", b"payload")
        return None

    return Parser(read, [made.encode()], (reformed, mutated))


def _log() -> dict[str, Callable[[], Parser]]:
    log = publog.PublicLog().pad(300)
    signed = log.sign()
    proof = str(log.prove(7, signed)).encode()
    asked = str(checkpoint.Request(9, merkle.consistency(9, 300, merkle.tree(log.leaves)), signed))
    tile = tiles.Tile(tiles.ENTRIES, 0, 256)
    partial_tile = tiles.Tile(0, 1, 44)

    nothing = anchor_files.Anchor(log.verifier)
    first = anchor_files.post(nothing, log.sign(9), ())
    proved = merkle.consistency(9, 300, merkle.tree(log.leaves))
    anchor = str(anchor_files.post(first, signed, proved))
    log.leaves.append(contract.commit(300))
    shown = ReceiptProof(
        receipt=f"sha256:{contract.RECEIPT.hex()}", salt=contract.SALT, entry=log.leaves[300],
        key=log.public, proof=str(log.prove(300, log.sign())),
    )  # fmt: skip

    def anchored(data: bytes) -> object:
        return anchors.check(codec.decode(ReceiptProof, data))

    def entry(data: bytes) -> object:
        found = checkpoint.read_proof(data.decode("utf-8", "replace"))
        return checkpoint.verify_proof(found, log.leaves[7], log.verifier)

    return {
        "note": lambda: Parser(lambda d: checkpoint.verify(note.parse(d), log.verifier),
                               [str(signed).encode()], (lines,)),
        "vkey": lambda: Parser(text(note.verifier),
                               [b"PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"],
                               (lines,)),
        "proof": lambda: Parser(entry, [proof], (lines,)),
        "anchor": lambda: Parser(anchor_files.read, [anchor.encode()], (lines,), part=0.5),
        "anchored": lambda: Parser(anchored, [codec.encode(shown)], (reformed, lines), part=0.5),
        "witness-request": lambda: Parser(checkpoint.read_request, [asked.encode()], (lines,)),
        "tile-path": lambda: Parser(text(tiles.read_path), [tile.path.encode(),
                                    partial_tile.path.encode(), b"tile/3/x123/x456/789.p/9"]),
        "entries": lambda: Parser(partial(tiles.unbundle, tile), [log.file(tile.path)],
                                  part=0.5),
        "tile": lambda: Parser(partial(tiles.check, partial_tile),
                               [log.file(partial_tile.path)]),
    }  # fmt: skip


def _replay() -> Parser:
    """A ledger's entries with one of them changed."""
    store = ledgers.open_store(SimDisk(), 1)
    name = ledgers.push(store, "a")
    ledgers.run(store, ledgers.queue(store, "job", (name,)))
    leaves = [codec.encode(e) for e in ledgers.entries(store)]
    store.close()
    at = {leaf: i.to_bytes(2, "big") for i, leaf in enumerate(leaves)}

    def changed(leaf: bytes, draw: random.Random) -> bytes:
        tree = json.loads(leaf)
        tree["body"] = jws.url_encode(reformed(codec.decode(LogEntry, leaf).body, draw))
        return at[leaf] + canonical.encode(tree)

    def read(data: bytes) -> object:
        place = int.from_bytes(data[:2], "big")
        return replay.replay([*leaves[:place], data[2:], *leaves[place + 1 :]])

    read(at[leaves[0]] + leaves[0])
    return Parser(read, leaves, (changed,), part=0.1, whole=False)


_FLOORS = (b"Genoa = { bootloader = 10, tee = 0, snp = 25, microcode = 84 }, "
           b"Turin = { fmc = 1, bootloader = 1, tee = 1, snp = 4, microcode = 81 }")  # fmt: skip
TRUST = b"""
preset = "bare-metal-snp"
[sev-snp]
measurements = ["%s"]
chip_ids = ["%s"]
reported_tcb = { %s }
""" % (b"11" * 48, b"22" * 64, _FLOORS)
CSV = b'x,y,name\n1.5,0,anna\n-2,1,"otto, jr"\n0.25,0,"q""q"\n'
COLUMNS = (Column(name="x", dtype="f32", low=-4.0, high=4.0),
           Column(name="y", dtype="i64", low=0, high=1, role="label"))  # fmt: skip
SCHEMA = (b'name = "t"\nlabel = "y"\nunit = "who"\nrows_per_unit = 2\n[columns.x]\ndtype = "f32"\n'
          b'shape = [2, 3]\nlow = -4.0\nhigh = 4\nscale = "unit"\n'
          b'[columns.y]\nclasses = ["no", "yes"]\n')  # fmt: skip


def arrow_table() -> Any:
    import pyarrow as pa

    words = pa.array(["a", "b"]).dictionary_encode()
    rows = pa.array([[1.0, 2.0], [0.5, -1.0]], pa.list_(pa.float32(), 2))
    return pa.table({"x": rows, "y": pa.array([0, 1]), "w": words,
                     "d": pa.array([1, 2], pa.decimal128(5, 2))})  # fmt: skip


def _parquet() -> Parser:
    import pyarrow.parquet as parquet

    made = io.BytesIO()
    parquet.write_table(arrow_table(), made)
    plain = io.BytesIO()
    parquet.write_table(arrow_table(), plain, use_dictionary=False, compression="none")
    read = filed("t.parquet", lambda p: encode(p, name="t", columns=ARROW))
    return Parser(read, [made.getvalue(), plain.getvalue()], part=0.25)


ARROW = (Column(name="x", dtype="f32", shape=(2,), low=-4.0, high=4.0),
         Column(name="y", dtype="i64", low=0, high=1, role="label"),
         Column(name="d", dtype="f32", low=0.0, high=9.0))  # fmt: skip


class _Unread(Exception):
    """pyarrow could not read it."""


def _arrow() -> Parser:
    """Tables that came as Arrow's stream: reading it is pyarrow's own part."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, arrow_table().schema) as out:
        out.write_table(arrow_table())

    def read(data: bytes) -> object:
        try:
            with pa.ipc.open_stream(data) as source:
                found = source.read_all()
                found.validate(full=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
            raise _Unread from e
        return encode(found, name="t", columns=ARROW)

    refusals = (CasemateError, _Unread)
    return Parser(read, [sink.getvalue().to_pybytes()], part=0.25, refusals=refusals)


def _backup() -> Parser:
    files = {"ledger/store.db": b"x" * 600, "results/r": b"y" * 90}
    manifest = backup.Backup(software="0", checkpoint=None, files=tuple(
        backup.BackupFile(path=n, size=len(d), sha256=hashlib.sha256(d).digest())
        for n, d in files.items()
    ))  # fmt: skip
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {backup.MANIFEST: codec.encode(manifest), **files}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    read = lambda data: backup.read(SimDisk.of({"b": data}).open("b"))  # noqa: E731
    return Parser(read, [body.getvalue()], part=0.25)


def _attestation() -> Parser:
    made, trust = evidence.attestation(), Trust.simulated(evidence.tee().root)

    def read(data: bytes) -> object:
        found = codec.decode(Attestation, data)
        return verify_attestation(found, evidence.NONCE, trust, now=evidence.NOW)

    return Parser(read, [codec.encode(made)], (reformed,), part=0.1)


CBOR = {"a": [1, -(2**40), b"xyz", "é", {"b": None, "c": True}], 7: 2**63, "n": [[[]]]}


def _plain(parse: fuzzing.Parse, seeds: Callable[[], Sequence[bytes]],
           *changes: Change) -> Callable[[], Parser]:  # fmt: skip
    return lambda: Parser(parse, seeds(), changes or (mutated,))


KEY = hpke.from_secret(bytes(range(96)))
PARSERS: dict[str, Callable[[], Parser]] = {
    "canonical": _plain(canonical.decode, golden, mutated, reformed),
    "values": _values,
    "frames": _frames,
    "weights": _plain(tensors.load, lambda: [table(4), _weights()], headed, mutated),
    "model": _graph,
    "graph": _golden_graph,
    "dataset": _dataset,
    "job": _job,
    "state": _state,
    "stream": _stream,
    "sealed": _plain(lambda d: KEY.open(d, info=b"i"),
                     lambda: [hpke.seal(KEY.public, b"key", info=b"i")]),
    "seal-key": _plain(lambda d: hpke.seal(d, b"", info=b""), lambda: [KEY.public]),
    "identity": lambda: Parser(filed("id.json", _identity), [_identity_file()],
                               (reformed, mutated), part=0.25),
    "request": _signed_request,
    "dsse": _dsse,
    "statement": lambda: Parser(receipts.read_statement, [_statement()], (reformed, mutated),
                                part=0.5),
    "bundle": lambda: Parser(filed("r.json", receipts.load_bundle),
                             golden(receipts.ReceiptBundle), (reformed, mutated), part=0.25),
    **_log(),
    "replay": _replay,
    "csv": lambda: Parser(filed("t.csv", lambda p: encode(p, name="t", columns=COLUMNS)), [CSV],
                          (mutated, partial(scrambled, among=b'",\n\r\0\xff-e.')), part=0.5),
    "parquet": _parquet,
    "arrow": _arrow,
    "schema": lambda: Parser(filed("s.toml", load_schema), [SCHEMA],
                             (mutated, partial(scrambled, among=b'"[]=.\n\xff')), part=0.25),
    "backup": _backup,
    "host-certificates": _plain(snp_certificates.parse, lambda: [_auxblob()]),
    "snp": _plain(snp_abi.parse, lambda: [snp.report(), snp.report("Milan"), snp.report("Turin")]),
    "certificate": _plain(lambda d: x509.parse(d, "it"),
                          lambda: [snp.leaf("Genoa", tcb=snp.TCB["Genoa"])]),
    "jws": _plain(text(lambda d: jws.parse(d, "it")), lambda: [b"eyJhbGciOiJSUzI1NiJ9.e30.AAAA"]),
    "cbor": lambda: Parser(cbor.decode, [cbor2.dumps(CBOR)], refusals=(cbor.CborError,)),
    "endorsement": lambda: Parser(uvm.parse, [snp.endorsement()]),
    "trust": lambda: Parser(filed("t.toml", Trust.load), [TRUST],
                            (mutated, partial(scrambled, among=b'"[]{}=.\n\xff')), part=0.25),
    "attestation": _attestation,
}  # fmt: skip


def _identity(path: Path) -> object:
    path.chmod(0o600)
    return Identity.load(path)


def _identity_file() -> bytes:
    path = folder() / "made.json"
    Identity.generate("a").save(path)
    return path.read_bytes()


def _weights() -> bytes:
    packed = mlp().data
    return packed[8 + int.from_bytes(packed[:8], "little") :]


def _statement() -> bytes:
    receipt = codec.decode(receipts.Receipt, golden(receipts.Receipt)[0])
    return canonical.encode(receipts.statement(receipt))


def _auxblob() -> bytes:
    guids = list(snp_certificates._GUIDS)[:2]
    entries = [snp_certificates._ENTRY.pack(g, 200 + 8 * i, 8) for i, g in enumerate(guids)]
    return (b"".join(entries) + bytes(24)).ljust(200, b"\0") + b"A" * 16


# Parsers of evidence that are fuzzed beside their vectors, with the same count.
ELSEWHERE = {
    "azure": "unit/attest/test_attest_azure_abi.py",
    "dcap": "unit/attest/test_attest_dcap_abi.py",
    "nitro": "unit/attest/test_attest_nitro_abi.py",
    "nvidia": "unit/attest/test_attest_nvidia_abi.py",
    "tpm": "unit/attest/test_attest_tpm_abi.py",
    "tokens": "attacks/test_evidence_tokens.py",
    "cose": "unit/attest/test_attest_cose.py",
    "crl": "unit/attest/test_attest_crl.py",
}


def inputs(of: Parser, count: int, seed: int) -> Iterator[bytes]:
    draw = random.Random(seed)
    for _ in range(count):
        yield draw.choice(of.changes)(draw.choice(of.seeds), draw)


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_reads_or_refuses_within_its_limits(name: str) -> None:
    of = PARSERS[name]()
    for seed in of.seeds if of.whole else ():
        of.parse(seed)  # a seed that is refused would test little
    count = COUNT if COUNT > DEFAULT else int(COUNT * of.part)
    taken = fuzzing.feed(of.parse, inputs(of, count, seed=sum(name.encode())), of.refusals)
    assert taken < count


def test_each_kind_of_evidence_is_fuzzed() -> None:
    kinds = {p.parent.name for p in (ROOT / "src/casemate/attest").glob("*/abi.py")}
    assert kinds <= ELSEWHERE.keys() | PARSERS.keys()
    for path in ELSEWHERE.values():
        assert re.search("fuzz\\(|mutated\\(", (ROOT / "tests" / path).read_text()), path
