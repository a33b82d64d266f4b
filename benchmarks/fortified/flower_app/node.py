# mypy: disable-error-code="import-not-found,untyped-decorator"
"""A node: one epoch over its own share of the records, by the function that PyTorch alone runs."""

from __future__ import annotations

import json
import time

import torch
from benchmarks.fortified.local import How, epoch
from benchmarks.fortified.workload import Workload, load, model, of_owner
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    job = json.loads(str(context.run_config["job"]))
    torch.set_num_threads(1)
    work, how = Workload(**job["work"]), How(**job["how"])
    node = int(context.node_config["partition-id"])
    module = model(work.seed)
    arrays = message.content.array_records["arrays"]
    module.load_state_dict(arrays.to_torch_state_dict())
    mine = of_owner(*load(work, "train"), node, work.nodes)
    # One machine, one monotonic clock: the way here, the process, its imports and the data.
    setup = time.monotonic() - float(message.content.config_records["config"]["sent"])
    own = work.of_node(job["node_noise"])
    took = epoch(module, *mine, own, how, work.seed * work.nodes + node + job["seed"])
    metrics: dict[str, float | int] = {
        "num-examples": own.images,
        "setup": setup,
        "epoch": took.seconds,
        "cpu": took.cpu,
        "records": took.records,
        "steps": took.steps,
    }
    content = {"arrays": ArrayRecord(module.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(content=RecordDict(content), reply_to=message)
