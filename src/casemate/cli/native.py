"""``casemate native``: a job's step as one small program (docs/native.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from casemate.cli import config, output
from casemate.spec.errors import UsageError


@click.group()
def native() -> None:
    """A job's private step as a program without Python and libtorch."""


def _manifest(path: Path) -> dict[str, Any]:
    """A manifest that an earlier build has written. Raises ``UsageError`` ``usage.file``."""
    try:
        found = json.loads(path.read_text())
        good = isinstance(found["artifact"], str) and isinstance(found["ways"], list)
        good = good and all(isinstance(way, str) for way in found["ways"])
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise UsageError(
            "usage.file",
            f"{path} is no manifest of a native step.",
            mend="Name the FILE.json that casemate native build wrote.",
            where=str(path),
        )
    return dict(found)


def _differs(manifest: dict[str, object], wanted: str, same: str) -> UsageError:
    return UsageError(
        "usage.native-differs",
        f"The program is another one: {manifest['artifact']}, not {wanted}.",
        mend=f"Build with {same}.",
    )


@native.command()
@click.argument("job", metavar="JOB")
@click.option("--model", required=True, metavar="FILE.cmm", help="The packed model of the job.")
@click.option(
    "-o", "--out", required=True, metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
    help="Where the program goes; its manifest beside it, FILE.json.",
)  # fmt: skip
@click.option(
    "--like", metavar="MANIFEST", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Make the same again; refuse where a byte differs.",
)  # fmt: skip
@config.target_options
@output.format_option
def build(
    job: str, model: str, out: Path, like: Path | None, target: config.Target, form: str
) -> None:
    """Compile the whole private step of JOB, a job or the digest of a quote, ahead of time.

    The program is tried against the engine before it is written: its clipped sums agree, and a
    record's bits do not depend on its slot. Where the quote names a native step it is made as
    there, and refused where a byte differs.
    """
    from casemate.client import models
    from casemate.engine import native as compilers
    from casemate.engine.aot import make

    before = None if like is None else _manifest(like)
    try:
        compilers.compiler()
    except OSError:
        raise UsageError(
            "usage.compiler", "There is no C++ compiler here.", mend="Install g++ or clang."
        ) from None
    with target.connect() as enclave:
        jobs = enclave.jobs
        digest = jobs.status(job).quote_digest if job.startswith("job_") else job
        quote = jobs.quote(digest).quote
        schemas = [enclave.datasets.show(use.dataset).info.schema for use in quote.request.datasets]
    packed = models.load(model)
    if packed.digest != quote.plan.model_digest:
        raise UsageError(
            "usage.model",
            f"{model} is not the model that the quote names.",
            mend="Give the file that the job was quoted for.",
            where=model,
        )
    said = quote.execution
    ways = before["ways"] if before is not None else list(said.ways) or None
    made = make.make(
        packed.data, quote.plan, quote.request.train, schemas, quote.request.inputs, ways
    )
    manifest = made.manifest(quote.plan)
    if before is not None and before["artifact"] != manifest["artifact"]:
        changed = [k for k in ("torch", "compiler", "cpu", "model") if before.get(k) != manifest[k]]
        raise _differs(
            manifest, before["artifact"], f"the same {', '.join(changed) or 'source'} as {like}'s"
        )
    if said.artifact and said.artifact != f"sha256:{manifest['artifact']}":
        raise _differs(manifest, said.artifact[7:], "the compiler, torch and CPU of the enclave")
    out.write_bytes(made.artifact.program)
    out.chmod(0o755)
    out.with_name(out.name + ".json").write_text(json.dumps(manifest, indent=2) + "\n")
    output.emit(
        form, manifest,
        lambda: f"{out}: {len(made.artifact.program):,} bytes, sha256 {made.artifact.digest}",
    )  # fmt: skip
