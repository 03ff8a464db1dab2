"""A controller on somebody else's training run."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metactl.adapters import KNOWN, AttachError, KnobAdapter, find_adapters
from metactl.adapters.checks import check_attachment
from metactl.adapters.trial import sealed
from metactl.arrays import from_json, to_json
from metactl.controllers import BaseController, Guard, Learned
from metactl.knobs import KnobSet, unknown_name
from metactl.log import Log, tagged
from metactl.meter import Meter
from metactl.policy import Policy
from metactl.ranks import Ranks
from metactl.signals import Codec, History

logger = logging.getLogger(__name__)

MODES = ("act", "shadow", "off")
_FIRST_BUDGET = 1000  # optimizer steps, where nobody says how many there will be
_FULL = 0.75  # of an estimated budget: from there it doubles
_STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a controller decided at one control step.

    Args:
        step: Optimizer steps taken so far.
        values: By knob: the value decided on, in force from now if `applied`.
        previous: By knob: the value in force until now.
        applied: Whether the values were put in force (mode `"act"`).
        vetoed: Whether the guard decided instead of the controller.
        reason: The guard's, in words; empty where it let the controller decide.
    """

    step: int
    values: dict[str, float]
    previous: dict[str, float]
    applied: bool
    vetoed: bool
    reason: str


class Controller:
    """Watches a training run and moves its knobs, from within the training loop.

    In mode `"shadow"` it decides and logs, and moves nothing; in mode `"off"` it does nothing. In
    both the run is bit for bit what it would be alone.

    Args:
        controller: Who decides: a policy, or any controller of `metactl.controllers`.
        n_control_steps: Decisions per run.
        strict: Raise what goes wrong in a control step, instead of switching off with a warning.

    Example:
        >>> from metactl.controllers import Schedule
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> half_way = Schedule(np.array([0.0, 1.0]), np.array([[0.5], [0.5]]), 2)
        >>> controller = Controller(half_way, n_control_steps=2)
        >>> controller.attach(
        ...     model, optimizer, total_steps=4, knobs=["dropout"], example=torch.ones(1, 4)
        ... )
        >>> for _ in range(4):
        ...     loss = model(torch.ones(1, 4)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     decision = controller.step(loss=loss)
        ...     if decision is not None:
        ...         print(decision.step, round(model[1].p, 2))
        2 0.3
    """

    def __init__(
        self,
        controller: BaseController | Policy,
        *,
        n_control_steps: int | None = None,
        strict: bool = False,
    ) -> None:
        if isinstance(controller, Policy):
            if n_control_steps is None:
                n_control_steps = controller.card.n_control_steps
            controller = Learned(controller)
        self.n_control_steps = 40 if n_control_steps is None else n_control_steps
        if self.n_control_steps < 2:
            raise ValueError(f"n_control_steps must be at least 2, got {n_control_steps}")
        self.controller, self.strict = controller, strict
        self.mode = "off"
        self.adapters: dict[str, KnobAdapter] = {}
        self._meter: Meter | None = None

    @classmethod
    def from_pretrained(cls, policy: str | Path, **options: Any) -> "Controller":
        """A controller by a policy.

        Args:
            policy: Folder of a policy, as `metactl train` leaves it.
            options: Of the constructor.

        Raises:
            PolicyError: If there is none, or it is damaged.
        """
        return cls(Policy.load(policy), **options)

    @classmethod
    def of(cls, policy: "str | Path | Controller") -> "Controller":
        """A controller as it is, or one by a policy."""
        return policy if isinstance(policy, Controller) else cls.from_pretrained(policy)

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int | None = None,
        probe: Callable[[], float | Tensor] | None = None,
        tokens_per_step: float | None = None,
        unique_tokens: float | None = None,
        mode: str = "act",
        knobs: Sequence[str | KnobAdapter] | None = None,
        on_unsupported: str | None = None,
        example: Any = None,
        log: Any = None,
    ) -> None:
        """Takes charge of a training run; every knob is tried first, and put back.

        Args:
            model: The model.
            optimizer: The one that trains it; its own object, without wrappers.
            total_steps: Optimizer steps of the whole run; estimated where not known.
            probe: Returns the loss on a few fixed held-out batches, in nats per token. It is called
                with the model in evaluation mode, without gradients, at control steps only.
            tokens_per_step: Tokens of one optimizer step.
            unique_tokens: Distinct training tokens that there are.
            mode: `"act"`, `"shadow"` or `"off"`.
            knobs: Names or adapters of the knobs to move; by default those that the policy knows.
            on_unsupported: What becomes of a knob that this run does not have: `"mask"` leaves it
                out with a warning, `"raise"` refuses. By default asked-for knobs raise.
            example: An input of the model, for trying knobs; token ids by default.
            log: A TensorBoard `SummaryWriter`, or a function of (tag, value, step).

        Raises:
            AttachError: If the run cannot be controlled as asked.
        """
        if mode not in MODES:
            raise AttachError(unknown_name("mode", mode, MODES))
        if self._meter is not None:
            raise AttachError("this controller is attached already; detach it first")
        if mode == "off":
            return
        tokens = (tokens_per_step, unique_tokens)
        self._log = Log(log, strict=self.strict)
        check_attachment(model, optimizer, total_steps, tokens, on_unsupported)
        self.adapters = self._find(knobs, model, optimizer, on_unsupported, example)
        self._model, self._probe, self.mode = model, probe, mode
        self._known_total = total_steps is not None
        self._total = _FIRST_BUDGET if total_steps is None else total_steps
        self._n = min(self.n_control_steps, self._total)
        self._per_step, self._unique = tokens_per_step, unique_tokens
        self._knobs = KnobSet([adapter.knob for adapter in self.adapters.values()])
        self._codec = Codec(self._knobs)
        self._history = History(1, self._n + 1)
        self._guard = Guard(self.controller, n_control_steps=self._n, strict=self.strict)
        try:
            self._guard.begin(self._codec, 1)
        except ValueError as error:
            self._let_go()
            raise AttachError(str(error)) from error
        self._written = {name: adapter.read() for name, adapter in self.adapters.items()}
        self._positions = self._position_of(self._written)
        self._last_moves = np.zeros_like(self._positions)
        self._index = 0
        self._meter = Meter(optimizer)
        self._ranks = Ranks(self._meter.device)
        if self._ranks.rank != 0:
            self._log = Log(None)
        start = {"progress": np.zeros(1)}
        loss = self._probe_loss()
        if loss is not None:
            start["probe_loss"] = np.array([loss])
        self._history.reset([0], start)
        self._arm()

    def step(
        self, loss: Tensor | float, gradient_norm: Tensor | float | None = None
    ) -> Decision | None:
        """Call it after every minibatch (and after `optimizer.step()` where there was one).

        Args:
            loss: The minibatch's training loss, in nats per token.
            gradient_norm: Of the optimizer step just taken, before clipping; for runs that clip.

        Returns:
            A decision at control steps, else None.
        """
        if self.mode == "off" or self._meter is None:
            return None
        self._meter.add_loss(loss)
        if gradient_norm is not None:
            self._meter.correct_norm(gradient_norm)
        try:
            decision = None
            if self._meter.steps >= self._next:
                decision = self._control()
            self._arm()
            return decision
        except Exception:
            if self.strict:
                raise
            logger.warning("The controller failed and is off; training goes on", exc_info=True)
            self._let_go()
            return None

    def detach(self, restore: bool = True) -> None:
        """Lets go of the run.

        Args:
            restore: Put the knobs back to what they were at `attach`; else they stay.
        """
        if restore:
            for adapter in self.adapters.values():
                adapter.restore()
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """All that determines how the controller goes on, as JSON values."""
        if self._meter is None:
            return {"version": _STATE_VERSION, "mode": "off"}
        return {
            "version": _STATE_VERSION,
            "mode": self.mode,
            "knobs": dict(self._written),
            "total": self._total,
            "index": self._index,
            "positions": dict(zip(self._written, to_json(self._positions[0]), strict=True)),
            "last_moves": dict(zip(self._written, to_json(self._last_moves[0]), strict=True)),
            "history": {name: to_json(column) for name, column in self._history.columns.items()},
            "meter": self._meter.state_dict(),
            "guard": self._guard.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; `attach` to the same kind of run comes first.

        Raises:
            AttachError: If the state is of another version, damaged, or of another run.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != _STATE_VERSION:
            raise AttachError(f"state has version {version!r}; this metactl reads {_STATE_VERSION}")
        if self._meter is None or state.get("mode") == "off":
            return
        known = state.get("knobs", {})
        if set(known) != set(self.adapters):
            raise AttachError(
                f"the state has the knobs {', '.join(known)}; "
                f"this run has {', '.join(self.adapters)}"
            )
        if self._known_total and state.get("total") != self._total:
            raise AttachError(
                f"the state is of a run of {state.get('total')} optimizer steps, "
                f"this one has {self._total}"
            )
        try:
            written = {name: float(known[name]) for name in self.adapters}
            if not all(math.isfinite(value) for value in written.values()):
                raise ValueError(f"knobs must be finite, got {written}")
            total, index = int(state["total"]), int(state["index"])
            for name, target in (
                ("positions", self._positions),
                ("last_moves", self._last_moves),
            ):
                target[0] = [float(state[name][knob]) for knob in self.adapters]
            for name, column in self._history.columns.items():
                self._history.columns[name] = from_json(state["history"][name], column)
            self._meter.load_state_dict(state["meter"])
            self._guard.load_state_dict(state["guard"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise AttachError(f"the state does not fit this run: {error}") from error
        self._total, self._index, self._written = total, index, written
        for name, value in self._written.items() if self.mode == "act" else ():
            self.adapters[name].write(value)
        self._arm()

    # One control step ---------------------------------------------------------------------------

    def _control(self) -> Decision | None:
        meter = self._meter
        assert meter is not None  # for the type checker: step() asked
        self._estimate(meter.steps)
        self._index = max(self._index + 1, self._n * meter.steps // self._total)
        measurement = self._ranks.mean(meter.read(self._measure(meter)))
        self._together(self._note_changes_by_hand)
        progress = np.array([min(meter.steps / self._total, 1.0)])
        self._history.append(progress, measurement)
        observation = self._codec.observe(
            self._history, self._positions, self._last_moves, np.ones_like(self._positions)
        )
        seen = tagged(measurement, self._codec.names, observation[0])
        seen |= {f"knob/{name}": value for name, value in self._written.items()}
        if self._known_total and self._index >= self._n:
            self._log.write(seen, meter.steps)
            return None  # the end: nothing left to decide for
        action = self._guard.act(observation, measurement.diverged)
        moved = self._knobs.move(self._positions, action, progress=1 / self._n)
        moved = self._ranks.gather(moved[0].tolist())[:1]  # the first process decides
        values = {name: float(v[0]) for name, v in self._knobs.values(moved).items()}
        previous = dict(self._written)
        if self.mode == "act":
            self._together(lambda: self._apply(values, moved))
        suffix = "" if self.mode == "act" else "_proposed"
        seen |= {f"knob/{name}{suffix}": value for name, value in values.items()}
        self._log.write(seen, meter.steps)
        reason = self._guard.reasons[0]
        if reason:
            logger.info("Step %d: %s", meter.steps, reason)
        return Decision(
            step=meter.steps,
            values=values,
            previous=previous,
            applied=self.mode == "act",
            vetoed=bool(reason),
            reason=reason,
        )

    def _together(self, act: Callable[[], None]) -> None:
        """Does something that may fail in one process, and fails in all of them then."""
        error: Exception | None = None
        try:
            act()
        except Exception as caught:
            error = caught
        self._ranks.require(error)

    def _apply(self, values: dict[str, float], moved: np.ndarray) -> None:
        for name, value in values.items():
            if value != self._written[name]:
                self.adapters[name].write(value)
                read = self.adapters[name].read()
                if not _close(read, value):
                    raise AttachError(f"knob {name!r}: wrote {value:g}, read back {read:g}")
                self._written[name] = value
        largest = np.array([knob.max_move for knob in self._knobs.knobs]) / self._n
        self._last_moves = (moved - self._positions) / largest
        self._positions = moved

    def _note_changes_by_hand(self) -> None:
        """Where somebody else moved a knob, the controller goes on from there."""
        for i, (name, adapter) in enumerate(self.adapters.items()):
            read = adapter.read()
            if not _close(read, self._written[name]):
                logger.info("Knob %r was changed to %g from outside", name, read)
                self._written[name] = read
                self._positions[:, i] = self._position_of(self._written)[:, i]

    def _estimate(self, steps: int) -> None:
        """Doubles an estimated budget that is nearly used up; the past shrinks with it."""
        while not self._known_total and steps > _FULL * self._total:
            self._total *= 2
            self._index //= 2
            self._history.columns["progress"] /= 2

    def _measure(self, meter: Meter) -> dict[str, float | None]:
        per_step = self._per_step
        return {
            "probe_loss": self._probe_loss(),
            "tokens_seen": None if per_step is None else per_step * meter.steps,
            "unique_tokens": self._unique,
            "n_parameters": float(meter.n_parameters()),
        }

    def _probe_loss(self) -> float | None:
        if self._probe is None:
            return None
        try:
            with sealed(self._model, training=False):
                return float(self._probe())
        except Exception:
            if self.strict:
                raise
            logger.warning("The probe failed; going on without it", exc_info=True)
            self._probe = None
            return None

    # House-keeping ------------------------------------------------------------------------------

    def _find(
        self,
        knobs: Sequence[str | KnobAdapter] | None,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        on_unsupported: str | None,
        example: Any,
    ) -> dict[str, KnobAdapter]:
        missing: dict[str, str] = {}
        wanted: Sequence[str | KnobAdapter] = KNOWN if knobs is None else knobs
        if knobs is None and isinstance(self.controller, Learned):
            names = [knob.name for knob in self.controller.policy.card.knobs]
            missing = {n: "no way to move it in this model" for n in names if n not in KNOWN}
            wanted = [name for name in names if name in KNOWN]
        found, refused = find_adapters(wanted, model, optimizer, example)
        missing |= refused
        strict = knobs is not None if on_unsupported is None else on_unsupported == "raise"
        if not found or (missing and strict):
            for adapter in found:
                adapter.close()
            raise AttachError(f"cannot move {_listed(missing) or 'anything: knobs is empty'}")
        if missing:
            everything = knobs is None and not isinstance(self.controller, Learned)
            level = logging.INFO if everything else logging.WARNING
            logger.log(level, "Left alone: %s", _listed(missing))
        return {adapter.knob.name: adapter for adapter in found}

    def _position_of(self, values: Mapping[str, float]) -> np.ndarray:
        inside = {
            knob.name: min(max(values[knob.name], knob.low), knob.high)
            for knob in self._knobs.knobs
        }
        return self._knobs.positions(inside, 1)

    def _arm(self) -> None:
        """Sets the next control step; the optimizer step that ends in it measures its update."""
        if self._meter is None:
            return
        index = self._index + 1
        finished = self._known_total and index > self._n
        self._next = math.inf if finished else round(index * self._total / self._n)
        self._meter.armed = self._meter.steps + 1 >= self._next and not finished

    def _let_go(self) -> None:
        for adapter in self.adapters.values():
            adapter.close()
        if self._meter is not None:
            self._meter.close()
        self._meter, self.adapters, self.mode = None, {}, "off"


def _listed(missing: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in missing.items())


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
