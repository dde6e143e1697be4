"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def release_freed() -> None:
    """Give back to the system what was freed: glibc keeps a heap per thread, each with pages that
    no other thread can use."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
