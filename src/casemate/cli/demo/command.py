"""``casemate demo``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from casemate.cli.lazy import LazyGroup
from casemate.spec.errors import InternalError, UsageError

# Further demos, each in a module beside this one; it loads when called.
OTHERS = {
    "sms": ("casemate.cli.demo.sms.command:sms", "SMS spam with a pretrained encoder."),
}


def _present(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


@click.group(
    cls=LazyGroup,
    lazy={name: v for name, v in OTHERS.items() if _present(v[0].partition(":")[0])},
    invoke_without_command=True,
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 10),
    default=5,
    show_default=True,
    help="Jobs behind each mean.",
)
@click.option(
    "--epsilon",
    type=click.FloatRange(0.1, 4),
    default=2.0,
    show_default=True,
    help="Privacy of each job.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    default="out/demo",
    show_default=True,
    help="Folder for the chart, the weights, the receipt and the server's log.",
)
@click.pass_context  # fmt: skip
def demo(ctx: click.Context, jobs: int, epsilon: float, out: str) -> None:
    """Two hospitals and a startup, end to end, on this machine, with a SIMULATED TEE."""
    if ctx.invoked_subcommand is not None:
        return
    missing = [name for name in ("torch", "numpy", "starlette", "sklearn") if not find_spec(name)]
    if missing:
        raise UsageError(
            "usage.extra",
            f"The demo needs packages that are not installed: {', '.join(missing)}.",
            mend="Run pip install 'casemate[server]' scikit-learn matplotlib.",
        )
    from casemate.cli import output
    from casemate.cli.demo import chart, story
    from casemate.cli.demo.show import Teller

    teller = Teller(output.console())
    folder = Path(out)
    figures = story.run(teller, folder, jobs=jobs, epsilon=epsilon)
    teller.closing(figures, chart.draw(figures, folder), folder)
    if None in figures.refused.values():
        raise InternalError(
            "internal.demo", "A request that must be refused was not.", mend="Report it."
        )
