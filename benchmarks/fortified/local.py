"""An epoch of plain PyTorch, and of PyTorch with Opacus. Flower's nodes run this function too.

``python -m benchmarks.fortified.local`` runs one epoch in a process of its own: a job in JSON on
standard input, its figures in JSON as the last line of standard output.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.fortified.workload import Workload, accuracy, load, model


@dataclass(frozen=True, slots=True)
class How:
    """``mode``: Opacus's ``grad_sample_mode``, or ``""`` for none. ``physical``: records evaluated
    at once; a step sums as many of these as it takes. ``channels_last``: the memory layout.
    ``keep_pages``: malloc gives no memory back to the system, which spares page faults."""

    mode: str = ""
    physical: int = 64
    channels_last: bool = False
    keep_pages: bool = False

    def __str__(self) -> str:
        layout = ", channels last" if self.channels_last else ""
        pages = ", pages kept" if self.keep_pages else ""
        return f"{self.mode or 'eager'}, {self.physical} at once{layout}{pages}"

    @property
    def environment(self) -> dict[str, str]:
        """glibc's settings for the process, see mallopt(3)."""
        if not self.keep_pages:
            return {}
        sizes = {"MMAP_THRESHOLD": 32, "TRIM_THRESHOLD": 33, "TOP_PAD": 28}
        return {f"MALLOC_{name}_": str(1 << bits) for name, bits in sizes.items()}


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds by the clock and of this process's CPU time; records evaluated, steps made."""

    seconds: float
    cpu: float
    records: int
    steps: int


def epoch(module: Any, images: Any, labels: Any, work: Workload, how: How, seed: int) -> Took:
    """One epoch of ``module`` in place, on numpy arrays; ``work.noise`` only with ``how.mode``."""
    import torch

    if bool(how.mode) != bool(work.noise):
        raise ValueError("noise goes with Opacus, and Opacus with noise")
    torch.manual_seed(seed)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    if how.channels_last:
        module.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=work.lr)
    start, cpu = time.monotonic(), time.process_time()
    count, steps = (_opacus if how.mode else _plain)(module, optimizer, x, y, work, how)
    return Took(time.monotonic() - start, time.process_time() - cpu, count, steps)


def _plain(
    module: Any, optimizer: Any, x: Any, y: Any, work: Workload, how: How
) -> tuple[int, int]:
    """The sum over a Poisson sample, over the expected batch: casemate's step without privacy."""
    import torch
    from torch.nn.functional import cross_entropy

    count = 0
    for _ in range(work.steps):
        chosen: Any = (torch.rand(len(y)) < work.rate).nonzero()[:, 0]
        optimizer.zero_grad(set_to_none=True)
        for part in chosen.split(how.physical):
            loss: Any = cross_entropy(module(x[part]), y[part], reduction="sum") / work.batch
            loss.backward()
        optimizer.step()
        count += len(chosen)
    return count, work.steps


def _opacus(
    module: Any, optimizer: Any, x: Any, y: Any, work: Workload, how: How
) -> tuple[int, int]:
    """As Opacus documents it: ``make_private`` with Poisson sampling, ``BatchMemoryManager``."""
    import warnings

    opacus = importlib.import_module("opacus")
    manager = importlib.import_module("opacus.utils.batch_memory_manager")
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    warnings.filterwarnings("ignore", module="opacus|torch")
    ghost = how.mode == "ghost"
    made = opacus.PrivacyEngine().make_private(
        module=module,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=work.batch),
        noise_multiplier=work.noise,
        max_grad_norm=work.clip,
        poisson_sampling=True,
        grad_sample_mode=how.mode,
    )
    private, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if ghost else nn.CrossEntropyLoss()
    count = 0
    with manager.BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=how.physical, optimizer=optimizer
    ) as parts:
        for a, b in parts:
            optimizer.zero_grad()
            criterion(private(a), b).backward()
            optimizer.step()
            count += len(b)
    private.remove_hooks()
    return count, len(loader)


def main() -> None:
    """Spawned at ``job["spawned"]`` on CLOCK_MONOTONIC, so that start and import count."""
    job = json.load(sys.stdin)
    import torch

    torch.set_num_threads(1)
    if job["how"]["mode"]:
        importlib.import_module("opacus")
    imported = time.monotonic()
    work, how = Workload(**job["work"]), How(**job["how"])
    module, (images, labels) = model(work.seed), load(work, "train")
    ready = time.monotonic()
    if job.get("warm"):  # a probe: what the first call alone pays is not asked for
        few = how.physical
        tiny = Workload(**{**job["work"], "images": few, "batch": few})
        epoch(model(1), images[:few], labels[:few], tiny, how, 1)
    took = epoch(module, images, labels, work, how, job["seed"])
    result: dict[str, Any] = {
        **asdict(took),
        "fixed": {
            "process and imports": imported - job["spawned"],
            "data and model": ready - imported,
        },
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if not job.get("warm"):
        fresh = model(work.seed)
        fresh.load_state_dict(module.state_dict())
        result["accuracy"], result["evaluation"] = accuracy(fresh, work)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
