"""Reads training dynamics off a foreign optimizer, without waiting for the device at every step."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metactl.arrays import to_json
from metactl.knobs import FloatArray
from metactl.run import Measurement

logger = logging.getLogger(__name__)

_SUMS = ("losses", "loss", "loss_squared", "norms", "norm")
_CHUNK = 256  # numbers that are kept one by one
_PATIENCE = 64  # losses without an optimizer step before something must be wrong


class Meter:
    """Keeps losses and gradient norms on the device; one copy to the host per control step.

    Optimizer steps are counted by hooks on the optimizer, so that gradient accumulation and steps
    that a gradient scaler skips count as what they are.

    Args:
        optimizer: Whose steps are measured.

    Attributes:
        steps: Optimizer steps taken since the start.
        attentive: Whether the next optimizer step also measures the gradient's norm.
        armed: Whether the next optimizer step also measures the size of its update.
    """

    _last: int | None  # norms that were there before the step just taken
    _ratios: Tensor | None  # median and maximum

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.device = self._parameters()[0].device
        self.steps, self.attentive, self.armed = 0, True, False
        self._since_step, self._warned = 0, False
        self._open = False  # between the hooks of a step; a subclass's may call its parent's
        self._before: list[Tensor] | None = None
        self._error: Exception | None = None  # of a hook, which must not stop the owner's step
        self._forget()
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def note(self, loss: Tensor | float, gradient_norm: Tensor | float | None) -> None:
        """Takes in one minibatch; what fails is kept back, so that all processes hear of it."""

        def look() -> None:
            self.add_loss(loss)
            if gradient_norm is not None:
                self.correct_norm(gradient_norm)

        self._kept_back(look)

    def add_loss(self, loss: Tensor | float) -> None:
        """Notes one minibatch's loss.

        Args:
            loss: One number, see `require_number`.
        """
        self._losses.append(loss)
        self._since_step += 1
        if self._since_step > _PATIENCE and not self._warned:
            self._warned = True
            logger.warning(
                "%d losses and no step of the optimizer that was attached: is it another one "
                "that trains the model?",
                self._since_step,
            )

    def correct_norm(self, norm: Tensor | float) -> None:
        """Replaces the gradient norm of the last optimizer step, where the caller knows it better.

        What is seen at the step is the gradient as clipped.
        """
        if self._last is not None:
            self._norms.cut(self._last)
            self._norms.append(norm)
            self._last = None

    def require_working(self) -> None:
        """Raises what went wrong in a hook on the optimizer's step."""
        if self._error is not None:
            raise self._error

    def read(self, known: Mapping[str, float | None]) -> Measurement:
        """What was seen since the last reading; forgets it.

        Args:
            known: Further fields of the measurement.
        """
        (losses, loss, squared, norms, norm), ratios = self._seen()
        self._forget()
        mean = loss / losses if losses else math.nan
        spread = math.sqrt(max(squared / losses - mean * mean, 0.0)) if losses > 1 else math.nan
        median, largest = ratios or (None, None)
        fields = {
            "train_loss_std": spread,
            "gradient_norm": norm / norms if norms else None,
            "update_ratio_median": median,
            "update_ratio_max": largest,
            **known,
        }
        rows: dict[str, Any] = {name: _row(value) for name, value in fields.items()}
        return Measurement(
            train_loss=np.array([mean]),
            diverged=np.array([not math.isfinite(mean)]),
            **rows,
        )

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self._parameters())

    def state_dict(self) -> dict[str, Any]:
        sums, ratios = self._seen()
        return {
            "steps": self.steps,
            "sums": to_json(sums),
            "ratios": to_json(ratios) if ratios else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        if len(state["sums"]) != len(_SUMS):
            raise ValueError(f"a meter has {len(_SUMS)} sums, got {len(state['sums'])}")
        self._forget()
        self._sums = [float(value) for value in state["sums"]]
        if state["ratios"] is not None:
            ratios = torch.tensor([float(value) for value in state["ratios"]], dtype=torch.float64)
            self._ratios = ratios.to(self.device, _exact(self.device))

    def _seen(self) -> tuple[list[float], list[float]]:
        """The sums since the last reading, added in the order of steps, and the update ratios."""
        parts = [self._losses.all(), self._norms.all()]
        parts += [] if self._ratios is None else [self._ratios]
        seen = iter(torch.cat(parts).tolist())
        losses, loss, squared, norms, norm = self._sums
        for value in itertools.islice(seen, len(self._losses)):
            losses, loss, squared = losses + 1, loss + value, squared + value * value
        for value in itertools.islice(seen, len(self._norms)):
            if math.isfinite(value):  # else the step was skipped, for overflow
                norms, norm = norms + 1, norm + value
        return [losses, loss, squared, norms, norm], list(seen)

    def _forget(self) -> None:
        self._sums = [0.0] * len(_SUMS)  # of a state that was loaded
        self._losses, self._norms = _Pending(self.device), _Pending(self.device)
        self._last, self._ratios = None, None

    def _parameters(self) -> list[Tensor]:
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _before_step(self) -> None:
        if self._open and self._last is not None:  # a step within a step, or after one that raised
            self._norms.cut(self._last)
        self._open, self._last, self._before = True, len(self._norms), None
        self._kept_back(self._look_before)

    def _after_step(self) -> None:
        if not self._open:
            return
        self._open = False
        self.steps += 1
        self._since_step = 0
        if self._before is not None:
            self._kept_back(self._look_after)

    def _kept_back(self, look: Callable[[], None]) -> None:
        """The training step is its owner's: what fails in measuring it is raised later."""
        try:
            with torch.no_grad():
                look()
        except Exception as error:
            self._error = self._error or error

    def _look_before(self) -> None:
        norm = self._gradient_norm() if self.attentive else None
        # Without a gradient yet, a closure makes it after this hook: the caller may know its norm.
        if norm is not None:
            self._norms.append(norm)
        if self.armed:
            self._before = [p.detach().clone() for p in self._parameters()]

    def _gradient_norm(self) -> Tensor | None:
        norm = gradient_norm(self._parameters())
        scale = getattr(self.optimizer, "grad_scale", None)  # a scaler that unscales in the step
        return norm if norm is None or scale is None else norm / scale.to(norm)

    def _look_after(self) -> None:
        assert self._before is not None
        pairs = list(zip(self._parameters(), self._before, strict=True))
        # What had no part in the step, as an expert that was not asked, has no update. (Of parts of
        # a whole all processes must ask alike.)
        trained = [pair for pair in pairs if pair[0].grad is not None or _is_sharded(pair[0])]
        self._before = None
        tensors = [before for _, before in trained or pairs]
        sizes = self._sizes(tensors)
        for now, before in trained or pairs:
            before.sub_(now)
        ratios = self._sizes(tensors) / sizes
        # A tensor that was 0 has no ratio; indexing by a mask would wait for the device.
        known = torch.where(torch.isfinite(ratios), ratios, torch.nan)
        self._ratios = torch.stack((known.nanmedian(), known.nan_to_num(0.0).max()))

    def _sizes(self, tensors: list[Tensor]) -> Tensor:
        norms: Iterable[Tensor]
        if any(map(_is_sharded, tensors)):
            norms = [whole(torch.linalg.vector_norm(tensor)) for tensor in tensors]
        else:
            norms = torch._foreach_norm(tensors)
        return torch.stack([n.to(self.device) for n in norms]).to(_exact(self.device))


class _Pending:
    """Numbers that wait on the device, so that they can be copied to the host together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stacked: list[Tensor] = []
        self._single: list[Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self._stacked)) + len(self._single)

    def append(self, value: Tensor | float) -> None:
        """Takes a copy: a compiled program may write its next loss into the same place."""
        if len(self._single) >= _CHUNK:
            self._stacked.append(torch.stack(self._single))
            self._single = []
        if isinstance(value, Tensor):
            number = whole(value.detach().clone())
        else:
            number = torch.as_tensor(float(value), dtype=torch.float64)
        self._single.append(number.to(_exact(self._device)).to(self._device).reshape(()))

    def cut(self, n: int) -> None:
        """Forgets all but the first n; only what was appended since the last but one."""
        del self._single[len(self._single) - (len(self) - n) :]

    def all(self) -> Tensor:
        """`[n]`."""
        single = [torch.stack(self._single)] if self._single else []
        everything = [*self._stacked, *single]
        nothing = torch.zeros(0, dtype=_exact(self._device), device=self._device)
        return torch.cat([nothing, *everything])


def require_number(name: str, value: Any) -> None:
    """Refuses what is not one number.

    Raises:
        TypeError: With the name, and what was given.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"{name} must be one number, got a tensor of {tuple(value.shape)}")
    elif isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        if value.shape:
            raise TypeError(f"{name} must be one number, got an array of {value.shape}")
    elif not isinstance(value, int | float | np.number):
        advice = "; where there are several, give the one that is minimised" * (name == "loss")
        raise TypeError(f"{name} must be one number, got {type(value).__name__}{advice}")


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor | None:
    """The norm of all gradients that are there, but for sparse ones; of parts, of the whole."""
    gradients = [g for p in parameters if (g := p.grad) is not None and not g.is_sparse]
    sharded = [g for g in gradients if _is_sharded(g)]
    plain = [g for g in gradients if not _is_sharded(g)] if sharded else gradients
    norms = list(torch._foreach_norm(plain)) if plain else []
    if sharded:  # one exchange between the processes
        parts = torch.stack(list(torch._foreach_norm(sharded)))
        norms.append(whole(torch.linalg.vector_norm(parts)))
    if not norms:
        return None
    device = norms[0].device
    return torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]).to(_exact(device)))


def _exact(device: torch.device) -> torch.dtype:
    """What accumulates over a long control step must not depend on its order."""
    return torch.float32 if device.type == "mps" else torch.float64


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process has a part (FSDP's DTensor), put together."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _row(value: float | None) -> FloatArray | None:
    return None if value is None else np.array([value], dtype=np.float64)
