"""``casemate``: command groups, each in its own file and loaded when used."""

from __future__ import annotations

import sys
from typing import Final

import click

from casemate.cli import output
from casemate.cli.lazy import LazyGroup
from casemate.spec.errors import CasemateError, InternalError, UsageError

# Group to (module, attribute, one line of help): help needs none of the modules.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "audit": ("casemate.cli.audit:audit", "Audit the enclave's log: replay, mirror, compare."),
    "dataset": ("casemate.cli.dataset:dataset", "Push, list and govern datasets (data owner)."),
    "demo": (
        "casemate.cli.demo.command:demo",
        "Two hospitals and a startup, end to end, on this machine.",
    ),
    "doctor": ("casemate.cli.doctor:doctor", "Check this machine and say what is missing."),
    "contest": ("casemate.cli.contest:contest", "Enter a model in a contest; the leaderboard."),
    "enclave": ("casemate.cli.enclave:enclave", "Verify an enclave's evidence; name enclaves."),
    "identity": ("casemate.cli.identity:identity", "Make and show one's keys."),
    "job": ("casemate.cli.job:job", "Quote, submit, approve and watch jobs."),
    "model": ("casemate.cli.model:model", "Check and pack a model on this machine; deploy it."),
    "native": ("casemate.cli.native:native", "A job's private step as one small program."),
    "predict": ("casemate.cli.served:predict", "Call a deployed model, sealed end to end."),
    "receipt": ("casemate.cli.receipt:receipt", "Verify and read receipts offline."),
    "serve": ("casemate.cli.serve:serve", "Run a server (operator)."),
    "state": ("casemate.cli.state:state", "Back up, upgrade and recover a state (operator)."),
    "witness": (
        "casemate.cli.witness:witness",
        "Cosign logs, so that no rollback or fork goes unseen.",
    ),
}


def _version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        from casemate import __version__

        click.echo(f"casemate {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    lazy=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: docs/cli.md. Settings: ~/.config/casemate/config.toml and CASEMATE_*.",
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version,
    help="Show the version.",
)  # fmt: skip
def cli() -> None:
    """Confidential, differentially private deep learning for several parties."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every failure ends as one error shape and a documented exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    as_json = output.wants_json(given)
    try:
        code = cli.main(args=given, prog_name="casemate", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("aborted", err=True)
        code = 130
    except click.ClickException as e:
        output.show_error(output.usage_error(e), as_json)
        code = 2
    except CasemateError as e:
        output.show_error(e, as_json)
        code = e.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except OSError as e:  # a full disk, a folder that is not there: of the machine, not of casemate
        if output.debug():
            raise
        error = UsageError(
            "usage.file",
            f"{e.filename or 'A file'} cannot be read or written: {e.strerror or e}.",
            mend="Look at the folder, its permissions and the room on its disk, then try again.",
            where=str(e.filename or ""),
        )
        output.show_error(error, as_json)
        code = error.exit_code
    except Exception as e:  # a fault of casemate: never a bare traceback
        if output.debug():
            raise
        output.show_error(
            InternalError(
                "internal.fault",
                f"{type(e).__name__}: {str(e)[:300]}.",
                mend="Report it; CASEMATE_DEBUG=1 shows where it happened.",
            ),
            as_json,
        )
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
