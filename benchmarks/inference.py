"""What a sealed call to a deployed model costs beside the bare forward pass of the same module.

``python -m benchmarks.inference [--calls 300] [--format json]``: a real server process, the SDK,
and in the SDK's process the module by itself, ten of each in turn, so that whatever else the
machine does is shared by both. One thread each. Figures: docs/inference.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import processes, serving

# Milliseconds that the bare pass is to take; widths are found by doubling.
WANTED: Final = 10.0
WARM: Final = 20
TURN: Final = 10


def mlp(width: int) -> tuple[Any, tuple[int, ...]]:
    from torch import nn

    layers: list[Any] = [nn.Linear(256, width), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10)), (256,)


def convolutions(width: int) -> tuple[Any, tuple[int, ...]]:
    from torch import nn

    def block(into: int, out: int, stride: int) -> list[Any]:
        return [
            nn.Conv2d(into, out, 3, stride=stride, padding=1), nn.BatchNorm2d(out), nn.ReLU(),
        ]  # fmt: skip

    layers = [*block(3, width, 1), *block(width, width, 1), *block(width, 2 * width, 2)]
    layers += block(2 * width, 2 * width, 1)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)]
    return nn.Sequential(*layers, *head), (3, 32, 32)


def encoder(width: int) -> tuple[Any, tuple[int, ...]]:
    from torch import nn

    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2), (32, width)


def one_layer(width: int) -> tuple[Any, tuple[int, ...]]:
    """Next to nothing: what is left is the call."""
    from torch import nn

    return nn.Linear(256, width), (256,)


MODELS: Final[dict[str, tuple[Callable[[int], Any], int, int]]] = {
    # The maker, the first width, the records of a call.
    "mlp": (mlp, 256, 32),
    "convolutions": (convolutions, 8, 8),
    "encoder": (encoder, 64, 4),
    "one layer": (one_layer, 10, 32),
}


@dataclass(frozen=True, slots=True)
class Figures:
    """Milliseconds of each call."""

    model: str
    records: int
    bare: list[float]
    called: list[float]

    def row(self) -> dict[str, Any]:
        def at(values: list[float], part: float) -> float:
            return sorted(values)[min(len(values) - 1, round(part * len(values)))]

        p50 = [statistics.median(v) for v in (self.bare, self.called)]
        p99 = [at(v, 0.99) for v in (self.bare, self.called)]
        return {
            "model": self.model,
            "records": self.records,
            "calls": len(self.bare),
            "bare p50 ms": round(p50[0], 2),
            "called p50 ms": round(p50[1], 2),
            "ratio p50": round(p50[1] / p50[0], 3),
            "added p50 ms": round(p50[1] - p50[0], 2),
            "bare p99 ms": round(p99[0], 2),
            "called p99 ms": round(p99[1], 2),
            "best of each ms": [round(min(self.bare), 2), round(min(self.called), 2)],
        }


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def sized(make: Callable[[int], Any], width: int, records: int) -> tuple[Any, Any]:
    """A module that is wide enough to take long enough, and its inputs."""
    import torch

    while True:
        torch.manual_seed(0)
        module, shape = make(width)
        module.eval()
        x = torch.randn(records, *shape)
        with torch.inference_mode():
            module(x)
            took = min(timed(lambda m=module, x=x: m(x)) for _ in range(20))  # type: ignore[misc]
        if took >= 0.8 * WANTED or make is one_layer:
            return module, x
        width += max(8, (width // 4) // 8 * 8)


def measure(enclave: Any, name: str, calls: int) -> Figures:
    import torch

    import casemate as cm

    make, width, records = MODELS[name]
    module, x = sized(make, width, records)
    policy = cm.ServePolicy([enclave.identity.id], calls=10**6, records=records)
    model = enclave.deploy(module, policy, example=x, name=name)
    bare: list[float] = []
    called: list[float] = []
    with torch.inference_mode():
        for _ in range(WARM):
            enclave.predict(model, x)
        while len(bare) < calls:  # in turns: a caller does not run the model itself between calls
            bare += [timed(lambda: module(x)) for _ in range(TURN)]
            called += [timed(lambda: enclave.predict(model, x)) for _ in range(TURN)]
        torch.testing.assert_close(enclave.predict(model, x), module(x), rtol=1e-3, atol=1e-3)
    enclave.models.undeploy(model)
    return Figures(name, records, bare, called)


def run(calls: int, names: list[str], folder: Path) -> list[dict[str, Any]]:
    import torch

    import casemate as cm

    torch.set_num_threads(1)
    state = folder / "state"
    rows = []
    with serving.started(
        processes.command("server", folder, str(state)), state, folder / "log"
    ) as (
        facts,
        _,
    ):
        trust = cm.Trust.simulated(facts["root"])
        me = cm.Identity.generate("caller")
        with cm.connect(facts["url"], trust=trust, identity=me, memory=None) as enclave:
            for name in names:
                rows.append(measure(enclave, name, calls).row())
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--model", action="append", choices=sorted(MODELS))
    parser.add_argument("--format", choices=("table", "json"), default="table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="casemate-bench-") as folder:
        rows = run(given.calls, given.model or list(MODELS), Path(folder))
    if given.format == "json":
        print(json.dumps(rows, indent=2))
        return 0
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load}")
    for row in rows:
        print(", ".join(f"{k} {v}" for k, v in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
