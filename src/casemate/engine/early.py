"""Gradients that are formed are formed as soon as their operands are there.

Half of a network's values are inputs and output gradients of normalisations and biases, whose
gradients are small: nothing else need hold them until the clip factors are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from casemate.engine.forms import Formed, Make, Site
from casemate.engine.nodes import Runner
from casemate.engine.replay import At, Call
from casemate.graph.joint import entry


def forming(
    runner: Runner, sites: Sequence[Site], operands: Sequence[str]
) -> tuple[list[Call], list[str]]:
    """Calls that form what the chosen ways take their norms from; and what is still wanted: what
    they make, and those of the ``operands`` that other sites read."""
    groups: dict[tuple[str, ...], list[Formed]] = {}
    late: set[str] = set()
    for site in sites:
        reads = runner.reads_behind(list(site.totals))
        if site.way.formed:  # both tensors of a normalisation are had in one pass
            groups.setdefault(reads, []).extend(site.way.formed)
        else:
            late.update(reads)
    calls = [_call(reads, formed) for reads, formed in groups.items()]
    return calls, [*(o for o in operands if o in late), *(key for c in calls for key in c.made)]


def _call(reads: Sequence[str], formed: Sequence[Formed]) -> Call:
    makes: list[Make] = [f.make for f in formed]

    def make(*values: Any) -> list[torch.Tensor]:
        env = dict(zip(reads, values, strict=True))
        return [of(env) for of in makes]

    return Call(make, [At(r) for r in reads], {}, [f.key for f in formed])


def summed_of(runner: Runner, names: Sequence[str]) -> set[str]:
    """What these sums are made of where nothing is formed: as ``Runner.reads_behind``, but for what
    a convolution's backward reads for the input's gradient alone, its weight."""
    return {
        r
        for node in runner.sums_behind(names)
        for r in runner.reads[node.name][: 2 if entry(node).site == "convolution" else None]
    }
