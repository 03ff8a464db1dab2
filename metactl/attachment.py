"""A training run under control, from attaching to letting go: measure, decide, move, read back."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metactl.adapters import AttachError, KnobAdapter
from metactl.arrays import to_json
from metactl.controllers import BaseController, Guard
from metactl.decision import Decision
from metactl.homeostasis import Balance, SetPoints
from metactl.knobs import KnobSet
from metactl.log import Log, tagged
from metactl.meter import Meter
from metactl.probe import Probe
from metactl.ranks import Ranks
from metactl.run import Measurement
from metactl.signals import Codec, History

logger = logging.getLogger(__name__)

STATE_VERSION = 1
_FIRST_BUDGET = 1000  # optimizer steps, where nobody says how many there will be
_NORMS = 4  # gradients of a control step whose norm is measured, at most
_LONGEST = 10**15  # optimizer steps
_FULL = 0.75  # of an estimated budget: from there it doubles


@dataclass(frozen=True)
class Given:
    """What the owner of a run says about it; see `Controller.attach`."""

    total_steps: int | None
    probe: Callable[[], float | Tensor] | None
    tokens_per_step: float | None
    unique_tokens: float | None


class Attachment:
    """One training run and the controller that watches it.

    Args:
        controller: Who decides, inside the guard.
        adapters: The knobs, tried.
        model: The model.
        optimizer: The one that trains it.
        given: What is known of the run.
        act: Whether decisions are put in force.
        n_control_steps: Decisions per run, at most one per optimizer step.
        log: Where measurements and knobs are written.
        set_points: Of healthy runs, so that the log says how far from balance this one is.
        strict: Raise what goes wrong in a probe or in the controller.

    Raises:
        ValueError: If the controller cannot move these knobs.
    """

    def __init__(
        self,
        controller: BaseController,
        adapters: Mapping[str, KnobAdapter],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        given: Given,
        *,
        act: bool,
        n_control_steps: int,
        log: Log,
        set_points: SetPoints | None = None,
        strict: bool,
    ) -> None:
        self.adapters, self.act = dict(adapters), act
        self._given, self._strict = given, strict
        self.optimizer = optimizer
        self._probe = Probe(given.probe, model, strict=strict)
        self._known_total = given.total_steps is not None
        self._total = _FIRST_BUDGET if given.total_steps is None else int(given.total_steps)
        self._n = min(int(n_control_steps), self._total)
        self._knobs = KnobSet([adapter.knob for adapter in adapters.values()])
        self._codec = Codec(self._knobs)
        self._history = History(1, self._n + 1)
        self._guard = Guard(controller, strict=strict)
        self._guard.keep_pace(self._n)
        self._guard.begin(self._codec, 1)
        self._written = {name: adapter.read() for name, adapter in adapters.items()}
        self._positions = self._position_of(self._written)
        self._last_moves = np.zeros_like(self._positions)
        self._index, self._warned, self._blind = 0, False, False
        start = {"progress": np.zeros(1)}
        if (loss := self._probe.first()) is not None:
            start["probe_loss"] = np.array([loss])
        self._history.reset([0], start)
        self._meter = Meter(optimizer)
        self._ranks = Ranks(self._meter.device)
        self._balance = Balance(set_points, self._codec, self._positions)
        self._log = log if self._ranks.rank == 0 else Log(None)
        self._arm()

    def note(self, loss: Tensor | float, gradient_norm: Tensor | float | None) -> None:
        """Takes in one minibatch; both are one number."""
        self._meter.note(loss, gradient_norm)

    def step(self) -> Decision | None:
        """A decision, where a control step is due."""
        decision = self._control() if self._meter.steps >= self._next else None
        self._arm()
        if self._known_total and self._meter.steps > self._total and not self._warned:
            self._warned = True
            logger.warning(
                "metactl: the run goes on past its total_steps=%d; nothing is decided any more, "
                "and the knobs stay where they are",
                self._total,
            )
        return decision

    def close(self, *, restore: bool) -> None:
        """Lets go of the run; with `restore`, the knobs go back to what they were.

        A knob that cannot be put back is named in a warning; the others are.
        """
        self._meter.close()
        failures = []
        for name, adapter in self.adapters.items():
            try:
                if restore:
                    adapter.restore()
                adapter.close()
            except Exception as error:
                failures.append(error)
                logger.warning("metactl: knob %r cannot be put back", name, exc_info=True)
        if failures and self._strict:
            raise failures[0]

    def state_dict(self) -> dict[str, Any]:
        """All that determines how the controller goes on, as JSON values."""
        return {
            "version": STATE_VERSION,
            "mode": "act" if self.act else "shadow",
            "knobs": dict(self._written),
            "total": self._total,
            "index": self._index,
            "positions": dict(zip(self._written, to_json(self._positions[0]), strict=True)),
            "last_moves": dict(zip(self._written, to_json(self._last_moves[0]), strict=True)),
            "history": self._history.state_dict(),
            "meter": self._meter.state_dict(),
            "guard": self._guard.state_dict(),
            "balance": self._balance.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of this version.

        Raises:
            AttachError: If it is damaged, or of another run.
        """
        self._require_knobs(state)
        before = self._meter.state_dict(), self._guard.state_dict(), self._history.columns
        try:
            written, positions, last_moves = (
                self._numbers_of(state[name]) for name in ("knobs", "positions", "last_moves")
            )
            if not all(0 <= position <= 1 for position in positions.values()):
                raise ValueError(f"positions must be in [0, 1], got {positions}")
            total, index = int(state["total"]), int(state["index"])
            n = np.shape(state["history"]["progress"])[-1] - 1
            if not (2 <= total <= _LONGEST and 0 <= index <= n):
                raise ValueError(f"control step {index} of {n}, in {total:.6g} optimizer steps")
            self._require_plausible(written)
            self._history.load_state_dict(state["history"])
            self._meter.load_state_dict(state["meter"])
            if self._meter.steps < 0:
                raise ValueError(f"it took {self._meter.steps} optimizer steps")
            if self._known_total and self._meter.steps > self._total:
                raise ValueError(f"it took {self._meter.steps} optimizer steps of {self._total}")
            self._guard.load_state_dict(state["guard"])
            if "balance" in state:  # not in states of older versions
                self._balance.load_state_dict(state["balance"])
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            self._meter.load_state_dict(before[0])
            self._guard.load_state_dict(before[1])
            self._history.columns = before[2]
            raise AttachError(f"the state does not fit this run: {error}") from error
        self._index, self._written = index, written
        self._positions[0] = list(positions.values())
        self._follow_ranges()
        self._last_moves[0] = list(last_moves.values())
        self._go_on_as_of(total, n)
        self._write(written)
        self._arm()

    def put_knobs(self, state: Mapping[str, Any]) -> None:
        """Puts the knobs of an earlier state in force, where decisions are.

        Raises:
            AttachError: If it has other knobs.
        """
        self._require_knobs(state)
        try:
            self._write(self._numbers_of(state["knobs"]))
        except (TypeError, ValueError) as error:
            raise AttachError(f"the state does not fit this run: {error}") from error

    def _write(self, values: Mapping[str, float]) -> None:
        for name, value in values.items() if self.act else ():
            self.adapters[name].write(value)

    def _require_knobs(self, state: Any) -> None:
        known = state.get("knobs", {}) if isinstance(state, Mapping) else state
        if not isinstance(known, Mapping):
            raise AttachError(f"the state does not fit this run: its knobs are {known!r}")
        if set(known) != set(self.adapters):
            raise AttachError(
                f"the state has the knobs {', '.join(known)}; "
                f"this run has {', '.join(self.adapters)}"
            )

    def _numbers_of(self, values: Mapping[str, Any]) -> dict[str, float]:
        numbers = {knob: float(values[knob]) for knob in self.adapters}
        if not all(math.isfinite(number) for number in numbers.values()):
            raise ValueError(f"knobs must be finite, got {numbers}")
        return numbers

    def _require_plausible(self, values: Mapping[str, float]) -> None:
        """Of a state: knobs within their ranges, or where their owner has put them."""
        for knob in self._knobs if self.act else ():
            value, now = values[knob.name], self.adapters[knob.name].read()
            ends = (knob.low, knob.high, now)
            if not (knob.low <= value <= knob.high or any(_close(value, end) for end in ends)):
                raise ValueError(
                    f"{knob.name} is {value:g}, and here it may be {knob.low:g} to {knob.high:g}, "
                    f"unless you set it so yourself before"
                )

    def _follow_ranges(self) -> None:
        """Where a range is another than in the run of a state, its value counts, not its place."""
        values = self._knobs.values(self._positions)
        for i, (name, written) in enumerate(self._written.items()):
            if not _close(float(values[name][0]), written):
                self._positions[:, i] = self._position_of(self._written)[:, i]

    def _go_on_as_of(self, total: int, n_control_steps: int) -> None:
        """After loading the state of a run of so many optimizer and control steps."""
        if not self._known_total:
            self._total = total
        elif total != self._total or n_control_steps != self._n:
            logger.warning(
                "metactl: the run was to have %d optimizer steps (%d control steps), now it has %d "
                "(%d); the controller goes on as of that",
                *(total, n_control_steps, self._total, self._n),
            )
            self._index = self._n * self._meter.steps // self._total
            self._history.columns["progress"] *= total / self._total
            while len(self._history) > max(self._index + 2, 3):
                self._history.thin()

    def _control(self) -> Decision | None:
        meter = self._meter
        self._estimate(meter.steps)
        self._index = max(self._index + 1, self._n * meter.steps // self._total)
        known: dict[str, float | None] = {}
        self._together(lambda: known.update(self._measure()))
        measurement = self._ranks.mean(meter.read(known))
        if measurement.probe_loss is not None:
            measurement.diverged[:] |= ~np.isfinite(measurement.probe_loss)
        self._together(self._note_changes_by_hand)
        self._warn_of_signs(measurement)
        progress = np.array([min(meter.steps / self._total, 1.0)])
        self._history.append(progress, measurement)
        observation = self._codec.observe(
            self._history, self._positions, self._last_moves, np.ones_like(self._positions)
        )
        seen = tagged(measurement, self._codec.names, observation[0])
        seen |= {f"knob/{name}": value for name, value in self._written.items()}
        seen |= self._balance.read(observation)
        if self._known_total and self._index >= self._n:
            self._log.write(seen, meter.steps)
            return None  # the end: nothing left to decide for
        action = self._guard.act(observation, measurement.diverged)
        seen["guard/vetoes"] = float(self._guard.vetoes[0])
        moved = self._knobs.move(self._positions, action, progress=1 / self._n)
        moved = self._ranks.gather(moved[0].tolist())[:1]  # the first process decides
        previous = dict(self._written)
        values = dict(previous)  # also where somebody has set one out of range
        for i, (name, value) in enumerate(self._knobs.values(moved).items()):
            if moved[0, i] != self._positions[0, i]:
                values[name] = float(value[0])
        if self.act:
            self._together(lambda: self._apply(values, moved))
        proposed = {f"knob/{name}_proposed": value for name, value in values.items()}
        self._log.write(seen if self.act else seen | proposed, meter.steps)
        reason = self._guard.reasons[0]
        if reason:
            logger.info("Step %d: %s", meter.steps, reason)
        return Decision(
            step=meter.steps,
            values=values,
            previous=previous,
            applied=self.act,
            vetoed=bool(reason),
            reason=reason,
            drive=None if self._balance.drive is None else float(self._balance.drive[0]),
        )

    def _warn_of_signs(self, measurement: Measurement) -> None:
        """Signals are ratios of losses, so they say nothing of those that are not above 0."""
        losses = (measurement.train_loss, measurement.probe_loss)
        if self._blind or not any(loss is not None and loss[0] < 0 for loss in losses):
            return
        self._blind = True
        logger.warning(
            "metactl: a loss is below 0: controller and guard see nothing of such losses; give "
            "one that is above 0, such as nats per token"
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
                    self.adapters[name].write(self._written[name])
                    raise AttachError(f"knob {name!r}: wrote {value:g}, read back {read:g}")
                self._written[name] = value
        largest = self._knobs.max_moves / self._n
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
            self._history.thin()  # as seen at control steps of twice the length

    def _measure(self) -> dict[str, float | None]:
        self._meter.require_working()
        per_step = self._given.tokens_per_step
        return {
            "probe_loss": self._probe.loss(),
            "tokens_seen": None if per_step is None else per_step * self._meter.steps,
            "unique_tokens": self._given.unique_tokens,
            "n_parameters": float(self._meter.n_parameters()),
        }

    def _position_of(self, values: Mapping[str, float]) -> np.ndarray:
        inside = {k.name: min(max(values[k.name], k.low), k.high) for k in self._knobs}
        return self._knobs.positions(inside, 1)

    def _arm(self) -> None:
        """Sets the next control step; the optimizer step that ends in it measures its update."""
        index = self._index + 1
        finished = self._known_total and index > self._n
        self._next = math.inf if finished else round(index * self._total / self._n)
        before = self._next - self._meter.steps - 1
        self._meter.armed = before <= 0
        self._meter.attentive = before % math.ceil(self._total / self._n / _NORMS) == 0


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
