"""Private inference on this machine, in under a minute: python examples/private_inference.py

A laboratory has a model that nobody may copy; a clinic has measurements that nobody may see. The
laboratory deploys the model, sealed, into an enclave server; the clinic calls it. The server is
real, its TEE is simulated, and says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import casemate as cm


@contextmanager
def served() -> Iterator[dict]:
    """`casemate serve --dev` on a free port, and what it says of itself."""
    with tempfile.TemporaryDirectory(prefix="casemate-example-") as folder:
        state = Path(folder) / "state"
        process = subprocess.Popen(
            [sys.executable, "-m", "casemate", "serve", "--dev", "--state", str(state),
             "--port", "0", "--spares", "0"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            while not (state / "server.json").exists():
                time.sleep(0.05)
            yield json.loads((state / "server.json").read_text())
        finally:
            process.terminate()
            process.wait()


def cohort(people: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve measurements of each person, and which of three findings there is."""
    made = torch.Generator().manual_seed(seed)
    rule = torch.randn(12, 3, generator=torch.Generator().manual_seed(99))
    measured = torch.randn(people, 12, generator=made)
    return measured, (measured @ rule).argmax(1)


def trained() -> nn.Module:
    """The laboratory's model, on data of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, y = cohort(2000, seed=1)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    with served() as facts:
        trust = cm.Trust.simulated(facts["root"])
        print(
            "Each party verifies the enclave's evidence. The TEE is SIMULATED and protects nothing."
        )
        laboratory, clinic, stranger = (
            cm.connect(facts["url"], trust=trust, identity=cm.Identity.generate(name), memory=None)
            for name in ("laboratory", "clinic", "stranger")
        )

        model = trained()
        policy = cm.ServePolicy([clinic.identity.id], calls=3, records=256)
        deployed = laboratory.deploy(model, policy, example=torch.zeros(1, 12), name="findings")
        print(f"\nThe laboratory deploys its model:\n{deployed}")

        measured, found = cohort(256, seed=2)
        scores = clinic.predict(deployed.id, measured)
        with torch.inference_mode():
            same = torch.allclose(scores, model(measured), atol=1e-5)
        accuracy = (scores.argmax(1) == found).float().mean()
        print(
            f"\nThe clinic calls it with {len(measured)} records: held-out accuracy {accuracy:.1%};"
        )
        print(f"the scores are those of the model itself: {same}.")

        print("\nWhat is refused:")
        for name, work in {
            "a stranger": lambda: stranger.predict(deployed.id, measured),
            "the laboratory": lambda: laboratory.predict(deployed.id, measured),
            "too many records": lambda: clinic.predict(deployed.id, measured.repeat(2, 1)),
        }.items():
            try:
                work()
            except cm.CasemateError as e:
                print(f"  {name}: {e.code}")
        for _ in range(2):
            clinic.predict(deployed.id, measured[:1])
        try:
            clinic.predict(deployed.id, measured[:1])
        except cm.CasemateError as e:
            print(f"  a fourth call: {e.code}. {e.message}")

        class Mixing(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x - x.mean(0)

        try:
            laboratory.deploy(Mixing(), policy, example=torch.zeros(1, 12))
        except cm.CasemateError as e:
            print(f"  a model that looks at other records: {e.code}. {e.message}")
        laboratory.models.undeploy(deployed)
        print("\nThe laboratory undeploys it: the key is destroyed.")


if __name__ == "__main__":
    main()
