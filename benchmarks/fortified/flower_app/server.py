# mypy: disable-error-code="import-not-found,untyped-decorator"
"""The server: one round of FedAvg (McMahan et al. 2017), timed, then the accuracy."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from benchmarks.fortified.workload import Workload, accuracy, model
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


def together(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
    """What the slowest node took; the sum of work and CPU time."""
    found = [c.metric_records["metrics"] for c in contents]
    most = {k: max(float(m[k]) for m in found) for k in ("setup", "epoch", "steps")}
    return MetricRecord(
        {**most, **{k: sum(float(m[k]) for m in found) for k in ("cpu", "records")}}
    )


@app.main()
def main(grid: Grid, context: Context) -> None:
    job = json.loads(str(context.run_config["job"]))
    torch.set_num_threads(1)
    work = Workload(**job["work"])
    module = model(work.seed)
    while len(list(grid.get_node_ids())) < work.nodes:
        time.sleep(0.1)
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=work.nodes,
        min_available_nodes=work.nodes,
        train_metrics_aggr_fn=together,
    )
    start = time.monotonic()
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(module.state_dict()),
        num_rounds=1,
        timeout=1e6,
        train_config=ConfigRecord({"sent": start}),
    )
    seconds = time.monotonic() - start
    metrics = dict(result.train_metrics_clientapp[1])
    module.load_state_dict(result.arrays.to_torch_state_dict())
    share, evaluation = accuracy(module, work)
    out = Path(job["out"])
    found = {**metrics, "round": seconds, "start": start}
    found |= {"accuracy": share, "evaluation": evaluation}
    out.with_suffix(".part").write_text(json.dumps(found))
    out.with_suffix(".part").rename(out)
