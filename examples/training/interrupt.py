"""Ctrl-C, and SIGTERM, by which schedulers of clusters announce the end."""

import signal
from typing import Any

from training.processes import any_of


class Stopped(KeyboardInterrupt):
    """Ctrl-C, as it is raised between two steps."""


class Interrupt:
    """Ctrl-C waits for the end of the step in progress; a second Ctrl-C does not."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGINT, self)
        signal.signal(signal.SIGTERM, self)

    def __call__(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def check(self) -> None:
        """Stop all processes where one was asked to."""
        if any_of(self.asked):
            raise Stopped
