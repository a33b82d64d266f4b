"""From a PyTorch module to a packed model, and the weights back: the SDK's door to the exporter.

``export`` traces the module once with ``torch.export`` on made-up inputs (no data), with the batch
as the only symbol, and writes the graph in casemate's own format
(:mod:`casemate.engine.capture`); what is here says which columns feed it.
"""

from casemate.client.torch.export import (
    export,
    export_entry,
    export_metrics,
    export_onnx,
    export_outputs,
    tensors,
)
from casemate.engine.capture import groupnorm, load_weights, optimizer, schedule

__all__ = [
    "export", "export_entry", "export_metrics", "export_onnx", "export_outputs", "groupnorm",
    "load_weights", "optimizer", "schedule", "tensors",
]  # fmt: skip
