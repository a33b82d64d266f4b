"""Structured logs: one JSON object a line, with a closed list of fields.

What is not on the list does not reach a log, and neither does a text that is not of its field's
form: no message, no path, no name, no value from a request. An exception is logged by its class and
the line of our code that raised it, never by its words.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Callable
from pathlib import PurePath
from typing import Final

import h11

from casemate.seams import Clock

FIELDS: Final[dict[str, type | re.Pattern[str]]] = {
    "route": re.compile(r"/[a-z0-9_./{}]{0,80}\Z"),
    "method": re.compile(r"[A-Z]{1,10}\Z"),
    "status": int,
    "code": re.compile(r"[a-z0-9.-]{1,80}\Z"),
    "boot": re.compile(r"[0-9a-f]{32}\Z"),
    "job": re.compile(r"job_[0-9a-f]{32}\Z"),
    "dataset": re.compile(r"ds_[0-9a-f]{40}\Z"),
    "model": re.compile(r"model_[0-9a-f]{32}\Z"),
    "state": re.compile(r"[a-z]{1,20}\Z"),
    "phase": re.compile(r"[a-z]{1,20}\Z"),
    "tee": re.compile(r"[a-z0-9-]{1,20}\Z"),
    "error": re.compile(r"[A-Za-z_]{1,60}\Z"),
    "place": re.compile(r"[a-z_]+\.py:[0-9]{1,6}\Z"),
    "count": int,
    "port": int,
}
EVENTS: Final = frozenset(
    {
        "ready",
        "stop",
        "request",
        "fault",
        "job",
        "dataset",
        "worker-end",
        "server",
        "witness",
        "model",
    }
)


class Log:
    """Writes allowed fields; ``write`` takes one line without its end."""

    def __init__(self, write: Callable[[str], None], clock: Clock) -> None:
        self._write = write
        self._clock = clock

    def event(self, event: str, **fields: str | int | None) -> None:
        """Log ``event`` of :data:`EVENTS`; a field off the list, or off its form, is left out."""
        line: dict[str, str | int | float] = {
            "time": round(self._clock.wall(), 3),
            "event": event if event in EVENTS else "server",
        }
        for name, value in fields.items():
            form = FIELDS.get(name)
            if isinstance(form, re.Pattern):
                if isinstance(value, str) and form.match(value):
                    line[name] = value
            elif form is int and type(value) is int:
                line[name] = value
        self._write(json.dumps(line, separators=(",", ":")))

    def fault(self, error: BaseException, **fields: str | int | None) -> None:
        """Log an unexpected exception: its class, and the last line of our code it passed."""
        place = None
        for frame in traceback.extract_tb(error.__traceback__):
            path = PurePath(frame.filename)
            if "casemate" in path.parts:
                place = f"{path.name}:{frame.lineno}"
        self.event("fault", error=type(error).__name__, place=place, **fields)


class Bridge(logging.Handler):
    """Other libraries' loggers: that something happened, at which level; never its text."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        # A peer that breaks off HTTP/1.1 in the middle of a body is no fault of ours.
        if error is not None and not isinstance(error, h11.ProtocolError):
            self._log.fault(error)
        else:
            self._log.event("server", state=record.levelname.lower())
