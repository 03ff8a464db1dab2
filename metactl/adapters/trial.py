"""A forward pass on a fixed input that leaves no trace: how a knob's effect is seen."""

import contextlib
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metactl.adapters.base import AttachError, unwrapped

_SEED = 20
_N_TOKENS = 16
_MOST_BYTES, _MOST_ENTRIES, _DEPTH = 1 << 24, 4096, 2  # of a tensor, of a container, in it
_OF_ANY_MODULE = frozenset(vars(nn.Module()))  # parameters, buffers, hooks, flags


@contextmanager
def sealed(model: nn.Module | None = None, *, training: bool | None = None) -> Iterator[None]:
    """Within, nothing that is done shows afterwards: random states, modes, buffers and what else
    modules keep (a cached table's length, a generator of their own) return.

    Args:
        model: Whose training flags, buffers and attributes are kept.
        training: Mode of the model within; as it is by default.
    """
    modules = [] if model is None else list(model.modules())
    flags = [module.training for module in modules]
    plain = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    buffers = [(module, dict(module._buffers)) for module in plain]
    values = [] if model is None else [(b, b.detach().clone()) for b in model.buffers()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # it holds weights from before the step
    if model is not None and training is not None:
        model.train(training)
    kept = _Attributes(plain)  # in that mode: who merges weights for it remembers so
    try:
        with torch.no_grad():
            yield
    finally:
        kept.put_back()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_autocast_cache_enabled(cached)
        if model is not None and training is not None:
            model.train(flags[0])  # by its own way: some merge weights, and part them again
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
        for module, held in buffers:  # a forward pass may have put others in their places
            module._buffers.clear()
            module._buffers.update(held)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


class _Attributes:
    """What modules keep beside parameters and buffers: their tables, counters and generators.

    Torch's own modules, whose wrappers set themselves up in their first pass, are left alone; so
    are large tensors and containers, and what is not a plain one.

    Args:
        modules: Whose attributes are to be put back.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._held = [(m, self._own(m)) for m in modules if not _is_torchs_own(type(m))]
        self._undo: dict[int, Callable[[], None]] = {}  # by what changes in place
        for _, held in self._held:
            for value in held.values():
                self._remember(value)

    @staticmethod
    def _own(module: nn.Module) -> dict[str, Any]:
        return {name: v for name, v in vars(module).items() if name not in _OF_ANY_MODULE}

    def _remember(self, value: Any, depth: int = _DEPTH) -> None:
        if id(value) in self._undo:
            return
        kind = type(value)
        if issubclass(kind, Tensor):
            if _is_small_and_plain(value):
                held = value.detach().clone()
                self._undo[id(value)] = partial(_restore_tensor, value, value._version, held)
        elif kind in _GENERATORS:
            read, write = _GENERATORS[kind]
            self._undo[id(value)] = partial(write, value, read(value))
        elif kind in _CONTAINERS and len(value) <= _MOST_ENTRIES:
            self._undo[id(value)] = partial(_restore_container, value, value.copy())
            if depth:
                for each in value.values() if isinstance(value, dict) else value:
                    self._remember(each, depth - 1)

    def put_back(self) -> None:
        for module, held in self._held:
            now = vars(module)
            for name in self._own(module):
                if name not in held:
                    del now[name]
            now.update(held)
        for undo in self._undo.values():
            with contextlib.suppress(Exception):  # of one kind that cannot, the others still can
                undo()


def _is_torchs_own(kind: type) -> bool:
    """Whether no class of it is somebody else's, also where torch has made a class of that."""
    own = (each for each in kind.__mro__ if each not in nn.Module.__mro__)
    return all(each.__module__.partition(".")[0] == "torch" for each in own)


def _is_small_and_plain(tensor: Tensor) -> bool:
    plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested
    if not plain or tensor.is_inference() or tensor.is_quantized:
        return False
    return 0 < tensor.nbytes <= min(_MOST_BYTES, tensor.untyped_storage().nbytes())


def _restore_tensor(tensor: Tensor, version: int, held: Tensor) -> None:
    if tensor.shape != held.shape:
        tensor.data = held
    elif tensor._version != version:
        tensor.data.copy_(held)


def _restore_container(value: Any, held: Any) -> None:
    if _inside(value) != _inside(held):
        value.clear()
        (value.extend if isinstance(value, list | deque) else value.update)(held)


def _inside(value: Any) -> list[int]:
    """Which objects a container holds; what these are, tensors could not say of each other."""
    entries = chain.from_iterable(value.items()) if isinstance(value, dict) else value
    return [id(entry) for entry in entries]


_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
_GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    torch.Generator: (torch.Generator.get_state, lambda g, state: g.set_state(state)),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    np.random.Generator: (
        lambda g: g.bit_generator.state,
        lambda g, state: setattr(g.bit_generator, "state", state),
    ),
}


def make_trial(model: nn.Module, example: Any = None) -> Callable[[bool], Tensor]:
    """A function from the mode (training or not) to the model's output on a fixed input.

    Args:
        model: The model, called as `model(example)`, `model(*example)` or `model(**example)`.
        example: An input: a tensor, tuple or mapping. By default what the model's own
            `trial_input(training)` gives, else token ids within its first embedding.
    """

    def trial(training: bool) -> Tensor:
        given = _usual_input(model, training) if example is None else example
        with sealed(model, training=training):
            torch.manual_seed(_SEED)
            try:
                if isinstance(given, Mapping):
                    output = model(**given)
                else:
                    output = model(*given) if isinstance(given, tuple | list) else model(given)
            except Exception as error:
                raise AttachError(
                    f"the model cannot be tried ({type(error).__name__}: {error}); give attach an "
                    f"input that it takes, as example="
                ) from error
            tensors = [t.detach().double().flatten() for t in _float_tensors(output)]
        if not tensors:
            raise AttachError(f"the model returns no tensor of floats, but {type(output).__name__}")
        return torch.cat(tensors)

    return trial


def length_of(example: Any) -> int | None:
    """Tokens per sequence of an input, where it has token ids."""
    if isinstance(example, Mapping):
        example = [example["input_ids"]] if "input_ids" in example else []
    for given in example if isinstance(example, list | tuple) else (example,):
        if isinstance(given, Tensor) and not given.is_floating_point() and given.dim() >= 1:
            return given.shape[-1]
    return None


def _usual_input(model: nn.Module, training: bool) -> Any:
    inner: Any = unwrapped(model)
    if hasattr(inner, "trial_input"):
        return inner.trial_input(training)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            ids = torch.arange(_N_TOKENS, device=module.weight.device) % module.num_embeddings
            return ids[None]
    raise AttachError("what the model takes is not known; give attach an input as example=")


def _float_tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _float_tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _float_tensors(value)
