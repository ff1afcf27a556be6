"""What holds for every test."""

from __future__ import annotations

import signal

from hypothesis import settings

# How long an example takes says something of the machine, nothing of the code.
settings.register_profile("trtune", deadline=None)
settings.load_profile("trtune")

# A shell starts what it puts in the background with Ctrl-C ignored, and its children inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
