"""Time, randomness, disk and network as objects, so that a whole run can be simulated.

Only this package touches ``time``, ``os.urandom``, the state folder and sockets on behalf of
``ledger``, ``server`` and the job queue; they take these objects as arguments.
"""

from casemate.seams.clock import Clock, SystemClock
from casemate.seams.disk import Disk, File, OsDisk
from casemate.seams.net import HttpNet, Net, Unreachable
from casemate.seams.rng import OsRng, Rng

__all__ = [
    "Clock",
    "Disk",
    "File",
    "HttpNet",
    "Net",
    "OsDisk",
    "OsRng",
    "Rng",
    "SystemClock",
    "Unreachable",
]
