"""From a PyTorch module to a graph: traced once with ``torch.export``, in casemate's own format."""

from casemate.engine.capture.loss import make as make_loss
from casemate.engine.capture.metrics import frozen
from casemate.engine.capture.metrics import head as metrics_head
from casemate.engine.capture.modules import groupnorm, load_weights
from casemate.engine.capture.optim import optimizer, schedule
from casemate.engine.capture.outputs import capture_outputs
from casemate.engine.capture.trace import capture, module_of, specs_of

__all__ = [
    "capture", "capture_outputs", "frozen", "groupnorm", "load_weights", "make_loss",
    "metrics_head", "module_of", "optimizer", "schedule", "specs_of",
]  # fmt: skip
