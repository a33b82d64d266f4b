"""``casemate audit``: the enclave's log, checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from casemate.cli import config, output
from casemate.cli.audit_report import Report
from casemate.cli.serve import state_folder
from casemate.spec.errors import LedgerError, UsageError

if TYPE_CHECKING:
    from casemate.attest.trust import Trust
    from casemate.client.heads import Witnesses
    from casemate.client.log import Log
    from casemate.client.memory import Memory, Seen

_FOLDER: Final = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def audit() -> None:
    """Check the enclave's log."""


@audit.command()
@click.option(
    "--receipt",
    type=click.Path(dir_okay=False),
    help="A receipt's bundle, whose commit must stand in the log.",
)
@click.option(
    "--dir",
    "folder",
    type=_FOLDER,
    help="Offline: a folder of the log's files, as `casemate audit mirror` makes it.",
)
@click.option(
    "--starts",
    type=click.Choice(["all", "last"]),
    default="all",
    show_default=True,
    help="Whose evidence to judge, now, under the trust policy.",
)
@config.witness_options
@config.target_options
@output.format_option
def verify(
    receipt: str | None,
    folder: Path | None,
    starts: str,
    witnesses: Witnesses,
    target: config.Target,
    form: str,
) -> None:
    """Replay the whole log and recompute the ledger, every charge and every epsilon.

    Checks the entries against the signed head, the head against what this client saw before, and
    the evidence of every start; refuses what no honest ledger can have written. No identity is
    needed.
    """
    from casemate.client import heads
    from casemate.client import log as logs
    from casemate.client.memory import Memory, Seen

    if folder is not None:
        trust = target.offline_trust()
        found, get = logs.read(folder, trust), logs.folder_files(folder)
        judged = logs.starts(found, get, trust, last=starts == "last")
    else:
        trust = config.load_trust(target.place().trust)
        with target.line() as connection:
            found = logs.fetch(connection)
            judged = logs.starts(found, logs.files(connection), trust, last=starts == "last")
    head = Seen(found.key, found.signed, found.head)
    checks = [witnesses.check(found.signed), heads.seen_before(head, Memory())]
    if receipt is not None:
        _stands(receipt, found, trust)
    report = Report(found, judged, tuple(checks))
    output.emit(form, report.json(), report.table)


def _stands(receipt: str, found: Log, trust: Trust) -> None:
    from casemate.client import receipts
    from casemate.spec.errors import ReceiptError

    bundle = receipts.load_bundle(receipt)
    receipts.verify_receipt(bundle, trust=trust)
    if bundle.entry not in found.leaves:
        raise ReceiptError(
            "receipt.log-absent",
            "The receipt's entry does not stand in this log.",
            mend="The log was replaced since: keep both and ask the operator.",
        )


@audit.command()
@config.target_options
@output.format_option
def sync(target: config.Target, form: str) -> None:
    """See the log's newest head and keep its hashes, for checks offline.

    Every connection does this; the command says what is known then. Exit code 20 when the log
    was rolled back, forked or replaced; the two heads that show it are kept.
    """
    with target.line() as connection:
        seen = connection.line().seen
    assert seen is not None  # the command line always remembers
    shape = {
        "origin": seen.head.origin,
        "entries": seen.head.size,
        "new": seen.head.size - seen.before,
        "checkpoint": str(seen.signed),
        "vkey": str(seen.key),
    }
    rows = [(name, shape[name]) for name in ("origin", "entries", "new", "vkey")]
    output.emit(form, shape, lambda: output.rows_table("Seen of the log", (), rows))


@audit.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@config.target_options
@output.format_option
def mirror(folder: Path, target: config.Target, form: str) -> None:
    """Copy the whole log into FOLDER as static files; again fetches what is new.

    The files are C2SP tlog-tiles (checkpoint, tile/, tile/entries/) and attestation/: any web
    server can serve them, any tlog client can read them, `casemate audit verify --dir` audits them.
    """
    from casemate.client import log as logs
    from casemate.client import memory as memories
    from casemate.client.replay import replay

    with target.line() as connection:
        get = logs.files(connection)
        key = connection.line().attestation.binding.log_key
        copy = memories.Mirror(folder, entries=True)
        seen = copy.extend(key, get)
        for _, _, said in replay(copy.leaves()).starts:
            path = logs.attestation_path(said)
            if not (folder / path).exists():
                memories.write(folder / path, get(path))
    shape = {"folder": str(folder), "origin": seen.head.origin, "entries": seen.head.size,
             "new": seen.head.size - seen.before}  # fmt: skip
    output.emit(
        form, shape, lambda: f"{folder} holds {seen.head.size} entries of {seen.head.origin}"
    )


@audit.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--dir", "folder", type=_FOLDER, help="Offline: a mirror of the log.")
@click.option(
    "--calldata",
    is_flag=True,
    help="Print nothing but the call that posts it to a contract, in hex.",
)
@config.target_options
@output.format_option
def post(file: Path, folder: Path | None, calldata: bool, target: config.Target, form: str) -> None:
    """Post the log's newest checkpoint to FILE, an anchor: a file that only grows.

    Each checkpoint stands there with the proof that it extends the one before. Publish the file
    where nobody can take it back; docs/anchors.md has its form, and a contract for a chain.
    """
    from casemate.client import anchors, contract
    from casemate.client.memory import Memory, Mirror

    if folder is not None:
        mirror = Mirror(folder)
        seen = mirror.seen()
        if seen is None:
            raise UsageError(
                "usage.file",
                f"{folder} holds no mirror of a log.",
                mend="Name a folder of `casemate audit mirror`.",
                where=str(folder),
            )
    else:
        with target.line() as connection:
            seen = connection.line().seen
        assert seen is not None  # the command line always remembers
        mirror = Memory().mirror(seen.key.key)
    anchor, grown = anchors.post(file, seen, mirror)
    last, head = anchor.posts[-1], anchor.heads[-1]
    call = "0x" + contract.post(head.size, head.root, last.proof).hex()
    if calldata:
        click.echo(call)
        return
    shape = {"file": str(file), "origin": head.origin, "entries": head.size, "posted": grown,
             "checkpoints": len(anchor.posts), "calldata": call}  # fmt: skip
    said = "now holds" if grown else "holds already"
    output.emit(form, shape, lambda: f"{file} {said} the checkpoint of {head.size} entries")


@audit.command()
@click.argument("one", type=click.Path(exists=True, path_type=Path))
@click.argument("two", type=click.Path(exists=True, path_type=Path))
@click.option("--key", metavar="VKEY", help="The log's verifier key, if this client never saw it.")
@config.target_options
@output.format_option
def compare(one: Path, two: Path, key: str | None, target: config.Target, form: str) -> None:
    """Compare two heads of a log: of two clients, say, who may have been shown two logs.

    ONE and TWO are each a checkpoint's file, a receipt's bundle, or a folder with a mirror. What
    lies between them follows from a mirror, from what this client has seen, or, with --enclave
    given, from the enclave. Exit code 20 for a fork; both heads are then kept as proof.
    """
    from casemate.client.memory import Memory
    from casemate.seal import note

    memory = Memory()
    given = None if key is None else note.verifier(key).key
    found = _relation(one, two, given, memory)
    if found is None and target.enclave is not None:
        with target.line() as connection:
            given = given or connection.line().attestation.binding.log_key
        found = _relation(one, two, given, memory)
    if found is None:
        raise UsageError(
            "usage.undecided",
            "The log's key, or what lies between the two heads, is not known here.",
            mend="Name the enclave with --enclave, or run `casemate audit sync` first.",
        )
    first, second, relation = found
    shape = {"relation": relation, "origin": first.head.origin,
             "first": first.head.size, "second": second.head.size}  # fmt: skip
    words = {
        "equal": "both are the same head",
        "second-extends-first": "the second extends the first",
        "first-extends-second": "the first extends the second",
    }
    output.emit(
        form,
        shape,
        lambda: f"{first.head.size} and {second.head.size} entries: {words[relation]}.",
    )


def _relation(
    one: Path, two: Path, key: bytes | None, memory: Memory
) -> tuple[Seen, Seen, str] | None:
    """Both heads and how they stand to each other; ``None`` where that is not known here."""
    from casemate.client import heads
    from casemate.client.memory import Mirror

    first, second = _head(one, key, memory), _head(two, key, memory)
    if first is None or second is None:
        return None
    mirrors = [Mirror(path) for path in (one, two) if path.is_dir()]
    mirrors.append(memory.mirror(first.key.key))
    relation = heads.compare(first, second, mirrors, memory.proofs)
    return None if relation is None else (first, second, relation)


def _head(path: Path, key: bytes | None, memory: Memory) -> Seen | None:
    """The signed head in a checkpoint's file, a receipt, or a mirror's folder; ``None`` where the
    log's key is not known."""
    from casemate.client import heads, receipts
    from casemate.seal import checkpoint, note

    path = path / "checkpoint" if path.is_dir() else path
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise UsageError(
            "usage.file", f"{path} cannot be read: {e.strerror}.", mend="Name another file."
        ) from None
    if raw.startswith(b"{"):
        signed = checkpoint.read_proof(receipts.load_bundle(path).proof).signed
    else:
        signed = note.parse(raw)
    key = key or memory.key_of(checkpoint.read(signed.text).origin)
    return None if key is None else heads.read(signed, key)


@audit.command()
@click.argument("state", type=click.Path(file_okay=False), required=False)
@click.option(
    "--tee",
    envvar="CASEMATE_TEE",
    default="auto",
    show_default=True,
    help="Kind of TEE that sealed the state; simulated for a server run with --dev.",
)
@click.option(
    "--release-owner",
    default="",
    envvar="CASEMATE_RELEASE_OWNER",
    metavar="HEX",
    help="Ed25519 key of who releases the sealing key, where no hardware holds one.",
)
@click.option(
    "--checkpoint",
    "kept",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A signed head of the log that a client or a witness kept; the log must extend it.",
)
@output.format_option
@click.pass_context
def fsck(
    ctx: click.Context,
    state: str | None,
    tee: str,
    release_owner: str,
    kept: Path | None,
    form: str,
) -> None:
    """Check a stopped server's STATE folder: tables, log, signatures, receipts, files.

    That the whole folder is an older copy shows only in a checkpoint from elsewhere (--checkpoint),
    or by comparing the head that is printed.

    Runs on the server's machine, whose TEE holds the key, and changes nothing. The checker shares
    no code with the server but the formats; it recomputes every charge and every epsilon with
    another accountant. Exit code 21 with findings. Needs the extras `server` and `audit`.
    """
    try:
        from casemate.ledger.fsck import extends, head
        from casemate.server.check import check
        from casemate.server.config import Config
    except ImportError as e:
        raise UsageError(
            "usage.extra",
            f"A server's state needs packages that are not installed ({e.name}).",
            mend="Run pip install 'casemate[server]'.",
        ) from None
    folder = state_folder() if state is None else Path(state)
    found = check(Config(state=folder, tee=tee, release_owner=release_owner))
    if kept is not None:
        extends(found, kept.read_text("utf-8", errors="replace"))
    newest = head(found)
    shape = {
        "origin": newest.origin,
        "entries": found.entries,
        "root": newest.root.hex(),
        "starts": len(found.started),
        "datasets": len(found.datasets),
        "jobs": len(found.jobs),
        "receipts": found.receipts,
        "findings": found.findings,
        "left": found.left,
    }
    names = ("origin", "entries", "root", "starts", "datasets", "jobs", "receipts")
    rows = [(name, shape[name]) for name in names]
    rows += [("left by a crash", name) for name in found.left]
    rows += [("FINDING", text) for text in found.findings] or [("findings", "none")]
    output.emit(form, shape, lambda: output.rows_table(f"The state in {folder}", (), rows))
    if found.findings:
        ctx.exit(LedgerError.exit_code)
