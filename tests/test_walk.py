"""A forward pass that pauses at chosen layers, and what its threads leave behind."""

import os
import platform
import threading

import pytest
import torch
from torch import nn

from kronbert.memory import release_freed
from kronbert.walk import Walk, watched


def test_a_walk_pauses_where_it_is_watched():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.randn(3, 6)
    with watched({"last": model[2]}, outputs=False), watched({"first": model[0]}, outputs=True):
        walk = Walk(model, x)
        first = walk.advance()
        assert first.name == "first"
        assert torch.equal(first.value, model[0](x))  # an ordinary call passes through
        assert not first.value.requires_grad
        assert walk.advance().name == "last"
        assert walk.advance() is None
        walk.close()
        left = Walk(model, x)
        left.advance()
        left.close()
        assert not left._thread.is_alive()
        Walk(model, x).close()  # one that never started
    assert not model[0]._forward_hooks


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's heap")
def test_what_a_thread_freed_is_given_back():
    """Small pieces lie in the thread's own heap, and the last of them keeps it from shrinking."""
    pinned = []

    def resident():
        with open("/proc/self/statm") as pages:
            return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def walk():
        pieces = [torch.ones(16_000) for _ in range(4000)]
        pinned.append(pieces[-1])

    thread = threading.Thread(target=walk)
    thread.start()
    thread.join()
    before = resident()
    release_freed()
    assert before - resident() > 100e6  # of 256 MB
