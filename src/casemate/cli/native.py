"""``casemate native``: a job's step as one small program (docs/native.md)."""

from __future__ import annotations

import json
from pathlib import Path

import click

from casemate.cli import config, output
from casemate.spec.errors import UsageError


@click.group()
def native() -> None:
    """A job's private step as a program without Python and libtorch."""


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
    """Compile the whole private step of the quote JOB (its digest) ahead of time.

    The program is tried against the engine before it is written: its clipped sums agree, and a
    record's bits do not depend on its slot.
    """
    from casemate.client import models
    from casemate.engine.aot import make

    with target.connect() as enclave:
        quote = enclave.jobs.quote(job).quote
        schemas = [enclave.datasets.show(use.dataset).info.schema for use in quote.request.datasets]
    packed = models.load(model)
    if packed.digest != quote.plan.model_digest:
        raise UsageError(
            "usage.model",
            f"{model} is not the model that the quote names.",
            mend="Give the file that the job was quoted for.",
            where=model,
        )
    before = json.loads(like.read_text()) if like is not None else None
    made = make.make(
        packed.data, quote.plan, quote.request.train, schemas, quote.request.inputs,
        None if before is None else before["ways"],
    )  # fmt: skip
    manifest = made.manifest(quote.plan)
    if before is not None and before["artifact"] != manifest["artifact"]:
        changed = [k for k in ("torch", "compiler", "cpu", "model") if before[k] != manifest[k]]
        raise UsageError(
            "usage.native-differs",
            f"The program is another one: {manifest['artifact']}, not {before['artifact']}.",
            mend=f"Build with the same {', '.join(changed) or 'source'} as the manifest's.",
            where=str(like),
        )
    out.write_bytes(made.artifact.program)
    out.chmod(0o755)
    out.with_name(out.name + ".json").write_text(json.dumps(manifest, indent=2) + "\n")
    output.emit(
        form, manifest,
        lambda: f"{out}: {len(made.artifact.program):,} bytes, sha256 {made.artifact.digest}",
    )  # fmt: skip
