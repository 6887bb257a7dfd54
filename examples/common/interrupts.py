"""Ctrl-C, and SIGTERM, by which schedulers of clusters announce the end, in the processes that load images."""

import signal


def ignore_interrupts(_: int) -> None:
    """Both signals reach worker processes too; only the main one shall act on them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
