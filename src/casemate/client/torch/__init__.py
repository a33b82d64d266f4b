"""From a PyTorch module to a packed model, and the weights back. The client's only torch.

``export`` traces the module once with ``torch.export`` on made-up inputs (no data), with the batch
as the only symbol, and writes the graph in casemate's own format.
"""

from casemate.client.torch.export import export
from casemate.client.torch.modules import groupnorm, load_weights
from casemate.client.torch.optim import optimizer, schedule

__all__ = ["export", "groupnorm", "load_weights", "optimizer", "schedule"]
