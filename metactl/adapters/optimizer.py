"""Knobs of any torch optimizer: a multiplier of its learning rate, and its weight decay."""

import inspect
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from metactl.adapters.base import AttachError, KnobAdapter, same
from metactl.knobs import Knob

_KEY = "learning_rate_multiplier"
_INITIAL = "initial_weight_decay"
_OWN = (_KEY, _INITIAL)
# What schedulers write into groups, which is no option of an optimizer.
_SCHEDULED = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
_LEFT = "_metactl_factor"  # an optimizer's attribute: who keeps a factor in force


def weight_decay_knob(default: float) -> Knob:
    """The knob of a run whose weight decay is `default`, above 0."""
    low, high = min(1e-4, default), max(1.0, default)
    return Knob(name="weight_decay", low=low, high=high, default=default, scale="log2")


class LearningRateKnob(KnobAdapter):
    """Multiplies the learning rate of every group, beside whatever schedule sets it.

    The factor is in force while the optimizer updates, and in no closure or hook of a step: a
    scheduler that reads or scales the rates never sees it. It is kept in the groups, so that a
    checkpoint of the optimizer carries it.
    Let go while it is not 1, it stays in force until the next controller or `forget_factor`.

    Args:
        optimizer: The optimizer.
    """

    knob = Knob(name=_KEY, low=0.1, high=4.0, default=1.0, scale="log2", unit="factor")

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if any("lr" not in group for group in optimizer.param_groups):
            raise AttachError(f"the groups of {type(optimizer).__name__} have no 'lr'")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise AttachError("LBFGS asks for the loss several times in a step")
        forgotten = optimizer.__dict__.pop(_LEFT, None)
        if forgotten is not None:
            forgotten.remove_hooks()
        self.optimizer = optimizer
        self._kept: list[tuple[Any, Any]] = []  # by group: its rate, and what is in force
        self.write(float(optimizer.param_groups[0].get(_KEY, 1.0)))
        self._around = [
            optimizer.register_step_pre_hook(self._begin_update),
            optimizer.register_step_post_hook(lambda *_: self._return()),
        ]
        self._handles = [
            *self._around,
            # A checkpoint that is made where a step raised must not hold the multiplied rate.
            optimizer.register_state_dict_pre_hook(lambda *_: self._return()),
        ]
        self._before = optimizer.__dict__.get("step")  # a scheduler's, say
        self._step = self._returning(optimizer)
        optimizer.__dict__["step"] = self._step

    def _returning(self, optimizer: torch.optim.Optimizer) -> MethodType:
        """The optimizer's step, after which the rates are its own, also where it raised."""
        plain = optimizer.step

        @wraps(getattr(plain, "__func__", plain))
        def step(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            for handle, last in zip(self._around, (True, False), strict=True):
                hooks = handle.hooks_dict_ref()  # whoever registered since stays outside
                if hooks is not None and handle.id in hooks:
                    hooks.move_to_end(handle.id, last=last)
            try:
                return plain(*args, **kwargs)
            finally:
                self._return()

        return MethodType(step, optimizer)  # bound, as schedulers want it

    def read(self) -> float:
        return float(self.optimizer.param_groups[0].get(_KEY, 1.0))

    def write(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group[_KEY] = value

    def restore(self) -> None:
        self.write(1.0)

    def close(self) -> None:
        if any(group.get(_KEY, 1.0) != 1.0 for group in self.optimizer.param_groups):
            self.optimizer.__dict__[_LEFT] = self
            return
        self.remove_hooks()
        for group in self.optimizer.param_groups:
            group.pop(_KEY, None)

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self.optimizer.__dict__.get("step") is self._step:  # else it is inside of another
            del self.optimizer.__dict__["step"]
            if self._before is not None:
                self.optimizer.__dict__["step"] = self._before

    def verify(self) -> None:
        def update(value: float) -> Tensor:
            small, parameter = _small(self.optimizer)
            adapter = LearningRateKnob(small)
            small.step()  # some read the rate in their first step alone
            adapter.write(value)
            small.step()
            return parameter.detach()

        if same(update(1.0), update(self.far())):
            raise AttachError("moving it does not change the update")
        if not same(update(1.0), update(1.0)):
            raise AttachError("the optimizer's update is not reproducible")

    def _begin_update(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a step, whose closure, if any, is to see the rates as their owner has them."""
        self._multiply()
        own = args[1:]  # the first is the optimizer
        if own and callable(own[0]):
            args = (args[0], self._outside(own[0]), *own[1:])
        elif callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": self._outside(kwargs["closure"])}
        return args, kwargs

    def _outside(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def called() -> Any:
            self._return()
            try:
                return closure()
            finally:
                self._multiply()

        return called

    def _multiply(self) -> None:
        self._return()  # where the step before raised, or this one is within another
        everywhere = self.read()  # a group that was added later has none of its own
        for group in self.optimizer.param_groups:
            rate, factor = group["lr"], group.get(_KEY, everywhere)
            if isinstance(rate, Tensor):  # in place: a captured graph reads this very tensor
                self._kept.append((rate.clone(), None))
                rate.mul_(factor)
            else:
                group["lr"] = rate * factor
                self._kept.append((rate, group["lr"]))

    def _return(self) -> None:
        for group, (rate, raised) in zip(self.optimizer.param_groups, self._kept, strict=False):
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(rate)
            elif group["lr"] == raised:  # else somebody has set another since
                group["lr"] = rate
        self._kept = []


def forget_factor(optimizer: torch.optim.Optimizer) -> None:
    """Takes away a factor that was left in force, at the end of a training."""
    left = optimizer.__dict__.get(_LEFT)
    if left is not None:
        left.restore()
        del optimizer.__dict__[_LEFT]
        left.close()


class WeightDecayKnob(KnobAdapter):
    """Moves the weight decay of the groups that have one, keeping their proportions.

    The first values are kept in the groups, as schedulers keep `initial_lr`: an optimizer that was
    loaded from a checkpoint still knows them.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._first: list[float] = []
        self._take_in()
        self._lead = max(range(len(self._first)), key=self._first.__getitem__)
        default = float(self._first[self._lead])
        if default <= 0:
            self.close()
            raise AttachError("no group of the optimizer has a weight decay above 0")
        self.knob = weight_decay_knob(default)

    def read(self) -> float:
        self._take_in()
        return float(self.optimizer.param_groups[self._lead]["weight_decay"])

    def write(self, value: float) -> None:
        self._take_in()
        share = value / self._first[self._lead]
        for group, first in zip(self.optimizer.param_groups, self._first, strict=True):
            if first:
                group["weight_decay"] = first * share

    def restore(self) -> None:
        self._take_in()
        for group, first in zip(self.optimizer.param_groups, self._first, strict=True):
            if first:
                group["weight_decay"] = first

    def close(self) -> None:
        for group in self.optimizer.param_groups:
            group.pop(_INITIAL, None)

    def _take_in(self) -> None:
        """Also the groups that were added since; the knob is in force there, too."""
        groups, known = self.optimizer.param_groups, len(self._first)
        for group in groups[known:]:
            new = _INITIAL not in group
            first = group.setdefault(_INITIAL, group.get("weight_decay", 0.0))
            self._first.append(first)
            if known and new and first:
                lead = groups[self._lead]["weight_decay"] / self._first[self._lead]
                group["weight_decay"] = first * lead

    def verify(self) -> None:
        def update(value: float) -> Tensor:
            small, parameter = _small(self.optimizer, weight_decay=value)
            small.step()
            return parameter.detach()

        if same(update(self.knob.low), update(self.knob.high)):
            raise AttachError("moving it does not change the update")


def _small(optimizer: torch.optim.Optimizer, **changes: Any) -> tuple[Any, Tensor]:
    """An optimizer of the same kind over one parameter, about to take a step."""
    parameter = torch.nn.Parameter(torch.linspace(-2.0, 2.0, 8).reshape(2, 4))
    parameter.grad = torch.linspace(1.0, 3.0, 8).reshape(2, 4)
    left_out = {"params", *_OWN, *(set(_SCHEDULED) - set(optimizer.defaults))}
    options = {k: v for k, v in optimizer.param_groups[0].items() if k not in left_out}
    # A warm-up begins at 0, where no update can differ; capturing needs a GPU.
    tame = {"lr": 1e-2, "capturable": False, "fused": None}
    options |= {name: value for name, value in tame.items() if name in options}
    options |= changes
    kind: Any = type(optimizer)
    try:
        accepted = inspect.signature(kind).parameters
        given = {name: options[name] for name in options if name in accepted}
        if "lr" in accepted:
            given["lr"] = 1e-2
        return kind([{"params": [parameter], **options}], **given), parameter
    except Exception as error:
        reason = ": ".join(filter(None, (type(error).__name__, str(error))))
        raise AttachError(f"{type(optimizer).__name__} cannot be tried ({reason})") from error
