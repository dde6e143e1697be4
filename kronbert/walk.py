"""`Walk`: a forward pass that pauses at chosen layers, so that a layer can be fitted on the inputs
of all batches before any of them goes on.

Fitting a model layer by layer by running it again from the start for every layer costs layers²
products. Here every batch is a forward pass in a thread of its own and only one thread runs at a
time: each pass is paid once, whatever the model's code looks like.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_HERE = threading.local()
"""The `Walk` whose thread this is."""


class Stop(NamedTuple):
    """Where a walk pauses: the layer's full name, and its input or output."""

    name: str
    value: Tensor


class _Enough(BaseException):
    """Ends a forward pass from inside; no model's ``except Exception`` keeps it."""


class Walk:
    """One forward pass of ``model`` on ``batch``, pausing at the layers that are `watched`.

    batch: a mapping or one tensor. A mapping is keyword arguments, for an `nn.Sequential` (as a
    SentenceTransformer is) its one argument. Nothing runs before the first `advance`."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self._model, self._batch = model, batch
        self._stop: Stop | None = None
        self._error: BaseException | None = None
        self._closed = self._started = False
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def advance(self) -> Stop | None:
        """Go on to the next watched layer; None after the last. Raises what the model raised."""
        self._stop = None
        if not self._started:
            self._started = True
            self._thread.start()
        else:
            self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return self._stop

    def close(self) -> None:
        """Leave the pass where it is and drop what it holds."""
        self._closed, self._stop = True, None
        if self._started:
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        _HERE.walk = self
        try:
            with torch.no_grad():
                if not isinstance(self._batch, Mapping):
                    self._model(self._batch)
                elif isinstance(self._model, nn.Sequential):
                    self._model(dict(self._batch))
                else:
                    self._model(**self._batch)
        except _Enough:
            pass
        except BaseException as error:  # handed to the thread that asked
            self._error = error
        finally:
            self._paused.release()

    def _pause(self, stop: Stop) -> None:
        self._stop = stop
        del stop
        self._paused.release()
        self._go.acquire()
        if self._closed:
            raise _Enough


@contextmanager
def watched(modules: Mapping[str, nn.Module], *, outputs: bool) -> Iterator[None]:
    """Walks pause at these modules (by full name): before them with their input, or after them with
    their output. Other forward passes do not notice."""

    def pause(name: str, value: Tensor) -> None:
        walk = getattr(_HERE, "walk", None)
        if walk is not None:
            walk._pause(Stop(name, value))

    def before(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            pause(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    def after(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            pause(name, output)

        return hook

    handles = []
    try:
        for name, module in modules.items():
            if outputs:
                handles.append(module.register_forward_hook(after(name)))
            else:
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
