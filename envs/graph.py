"""Fusing what a step computes, and recording what a GPU does, to replay it without Python."""

import abc
import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3  # runs before recording: libraries set themselves up, the allocator settles

Computation = Callable[[], tuple[Tensor, ...]]


class Graph:
    """A computation that is recorded as a CUDA graph when first called, then replayed.

    A replay launches all kernels at once, on the tensors that were there when it was recorded:
    what changes between calls must be changed in place, and what is computed must depend on
    numbers on the device only.

    Args:
        compute: Returns tensors; their contents are good until the next call.
        state: Tensors that it changes. Warming up leaves them as they were.
    """

    def __init__(self, compute: Computation, state: Sequence[Tensor]) -> None:
        self._compute, self._state = compute, state
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: tuple[Tensor, ...] = ()

    def __call__(self) -> tuple[Tensor, ...]:
        if self._graph is None:
            self._record()
        assert self._graph is not None
        self._graph.replay()
        return self._results

    def _record(self) -> None:
        device = self._state[0].device
        kept = [tensor.clone() for tensor in self._state]
        current, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._compute()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            self._results = self._compute()
        self._graph = graph
        with torch.no_grad():
            for tensor, before in zip(self._state, kept, strict=True):
                tensor.copy_(before)


class OwnPrograms(abc.ABC):
    """Has programs made of its own methods and tensors; so a copy makes its own, and shares none.

    Attributes:
        programs: Names of the attributes that `build_programs` sets, and no state has.
    """

    programs: tuple[str, ...] = ()

    @abc.abstractmethod
    def build_programs(self) -> None:
        """Sets the attributes anew, of what is there now."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.programs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.build_programs()


def as_it_is(compute: Callable[..., Any]) -> Callable[..., Any]:
    """What is neither fused nor recorded."""
    return compute


def has_compiler() -> bool:
    """Whether the system has what `torch.compile` needs."""
    return any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))))


def fused(compute: Callable[..., Any]) -> Callable[..., Any]:
    """The same computation by `torch.compile`, for shapes that do not change."""

    def own(*arguments: Any) -> Any:
        return compute(*arguments)

    own.__code__ = own.__code__.replace()  # torch.compile keeps few versions of the same code
    about_complex = "Torchinductor does not support code generation for complex"
    warnings.filterwarnings("ignore", message=about_complex)  # tables of turns; nothing to fuse
    return torch.compile(own, dynamic=False)


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """How exact float32 products are for a while; torch's own setting is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
