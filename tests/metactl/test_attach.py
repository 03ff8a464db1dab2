"""A controller on a plain training loop."""

import doctest
import logging

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import metactl.adapters.base
import metactl.attach
from metactl import AttachError, Controller, FunctionKnob, Knob
from metactl.adapters.optimizer import LearningRateKnob
from metactl.controllers import BaseController, RandomMoves, Static
from metactl.meter import Meter

STEPS, N = 24, 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.drop = nn.Dropout(0.1)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.norm(x.flatten(0, 1)).view_as(x)
        return self.out(self.drop(x))


class Constant(BaseController):
    def __init__(self, action):
        self.action = action

    def act(self, observation):
        if isinstance(self.action, Exception):
            raise self.action
        return np.full((self.n_runs, len(self.codec.knobs)), self.action)


class Loop:
    """A user's training loop: accumulation, clipping, a schedule, a probe."""

    def __init__(self, controller=None, accumulate=1, probe=True, total_steps=STEPS, **options):
        torch.manual_seed(0)
        self.model, self.accumulate = Net(), accumulate
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, STEPS)
        self.data = torch.Generator().manual_seed(1)
        self.held_out = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(2))
        self.controller, self.losses, self.decisions, self.logged = controller, [], [], []
        if controller is not None:
            controller.attach(
                self.model,
                self.optimizer,
                total_steps=total_steps,
                probe=self.probe if probe else None,
                **{"log": lambda *entry: self.logged.append(entry), **options},
            )

    def probe(self):
        assert not self.model.training
        torch.rand(3)  # a probe that draws: it must not show
        return self.loss(self.held_out)

    def loss(self, tokens):
        return nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), tokens.flatten())

    def train(self, n_steps):
        for _ in range(n_steps):
            self.optimizer.zero_grad()
            for i in range(self.accumulate):
                loss = self.loss(torch.randint(11, (4, 6), generator=self.data))
                (loss / self.accumulate).backward()
                if i == self.accumulate - 1:
                    nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
                    self.optimizer.step()
                    self.schedule.step()
                self.losses.append(loss.item())
                decision = self.controller.step(loss=loss) if self.controller else None
                if decision is not None:
                    self.decisions.append(decision)
        return self

    def weights(self):
        return [p.detach().clone() for p in (*self.model.parameters(), *self.model.buffers())]


def moving(**options):
    return Controller(RandomMoves(3), n_control_steps=N, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", ["off", "shadow"])
def test_modes_that_do_not_act_leave_the_run_bit_identical(mode):
    alone, noise = Loop().train(STEPS), torch.rand(3)
    watched, noise_after = Loop(moving(), mode=mode).train(STEPS), torch.rand(3)
    assert watched.losses == alone.losses
    assert same(watched.weights(), alone.weights())
    assert torch.equal(noise, noise_after)
    assert len(watched.decisions) == (N - 1 if mode == "shadow" else 0)
    assert not any(decision.applied for decision in watched.decisions)


def test_acting_moves_what_it_says_and_nothing_moves_at_the_end():
    run = Loop(moving()).train(STEPS)
    assert [d.step for d in run.decisions] == [4, 8, 12, 16, 20]
    last = run.decisions[-1]
    assert run.model.drop.p == last.values["dropout"]
    assert run.optimizer.param_groups[0]["weight_decay"] == last.values["weight_decay"]
    assert last.previous == run.decisions[-2].values
    assert len({d.values["dropout"] for d in run.decisions}) > 1
    logged = {tag for tag, _, _ in run.logged}
    assert {"train/loss", "probe/loss", "knob/dropout", "signal/generalisation_gap"} <= logged
    assert {step for _, _, step in run.logged} == {4, 8, 12, 16, 20, 24}
    shown = {step: value for tag, value, step in run.logged if tag == "knob/dropout"}
    in_force = {d.step: d.previous["dropout"] for d in run.decisions}
    assert shown == {**in_force, 24: last.values["dropout"]}  # at which the loss beside it was made
    assert {value for tag, value, _ in run.logged if tag == "guard/vetoes"} == {0.0}
    before = run.weights()
    run.train(4)
    assert not same(before, run.weights())
    assert len(run.decisions) == 5


def test_the_learning_rate_is_multiplied_within_the_step_only():
    controller = Controller(Constant(1.0), n_control_steps=N)
    run = Loop(controller, knobs=["learning_rate_multiplier"])
    plain = Loop().train(STEPS)
    run.train(STEPS)
    assert run.decisions[-1].values["learning_rate_multiplier"] == pytest.approx(4.0)
    assert run.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]
    assert not same(run.weights(), plain.weights())


def test_what_is_measured_is_what_a_user_would_compute():
    run = Loop(Controller(Static(), n_control_steps=N), tokens_per_step=24)
    run.train(3)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.train(1)
    column = {name: values[0, -1] for name, values in run.controller._run._history.columns.items()}
    assert column["train_loss"] == pytest.approx(np.mean(run.losses), rel=1e-6)
    assert column["train_loss_std"] == pytest.approx(np.std(run.losses), rel=1e-4)
    ratios = [
        ((now - old).norm() / old.norm()).item()
        for now, old in zip(run.model.parameters(), before, strict=True)
        if old.norm() > 0
    ]
    assert column["update_ratio_max"] == pytest.approx(max(ratios), rel=1e-4)
    assert column["gradient_norm"] == pytest.approx(0.5, rel=1e-3)  # as clipped
    assert column["tokens_seen"] == 96


def test_a_given_gradient_norm_counts_instead_of_the_clipped_one():
    run = Loop(Controller(Static(), n_control_steps=N), probe=False)
    run.train(1)
    run.controller.step(loss=1.0, gradient_norm=torch.tensor(2.5))
    run.controller.step(loss=1.0, gradient_norm=9.0)  # no step of the optimizer since
    run.train(3)
    assert run.controller._run._history["gradient_norm"][0, -1] == pytest.approx((2.5 + 1.5) / 4)


def test_micro_batches_count_as_the_optimizer_steps_they_make():
    run = Loop(moving(), accumulate=3).train(STEPS)
    assert [d.step for d in run.decisions] == [4, 8, 12, 16, 20]


def test_a_controller_that_raises_is_off_with_one_warning_and_training_goes_on(caplog):
    with caplog.at_level(logging.WARNING, logger="metactl"):
        run = Loop(Controller(Constant(RuntimeError("boom")), n_control_steps=N)).train(STEPS)
    assert len(caplog.records) == 1
    assert [d.reason for d in run.decisions] == ["the controller failed and is off"] * 5
    assert run.losses == Loop().train(STEPS).losses


def test_a_strict_controller_raises():
    with pytest.raises(RuntimeError, match="boom"):
        controller = Controller(Constant(RuntimeError("boom")), n_control_steps=N, strict=True)
        Loop(controller).train(STEPS)


def test_a_log_that_fails_does_not_stop_training(caplog):
    def full(tag, value, step):
        raise OSError("disk full")

    run = Loop(moving(), log=full)
    with caplog.at_level(logging.WARNING, logger="metactl"):
        run.train(STEPS)
    assert len(caplog.records) == 1
    assert len(run.decisions) == N - 1


def test_a_failing_probe_is_masked_with_one_warning(caplog):
    run = Loop(moving())
    run.held_out = torch.full((2, 2), 99)  # no such token
    with caplog.at_level(logging.WARNING, logger="metactl"):
        run.train(STEPS)
    assert len(caplog.records) == 1
    assert len(run.decisions) == N - 1
    assert run.model.training


def test_a_loss_out_of_its_band_brings_back_the_good_knobs_and_says_so():
    controller = Controller(Constant(0.5), n_control_steps=N)
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller.attach(model, optimizer, total_steps=6, knobs=["dropout"], example=torch.ones(1, 2))
    decisions = []
    for loss in (1.0, 0.9, 0.9, 5.0, float("nan")):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        decisions.append(controller.step(loss=loss))
    assert [d.vetoed for d in decisions] == [False, False, False, True, True]
    assert "back to the last good knobs" in decisions[3].reason
    assert decisions[3].values["dropout"] == pytest.approx(decisions[1].values["dropout"])


def test_a_loss_that_was_never_finite_brings_the_knobs_to_their_defaults():
    controller = Controller(Constant(1.0), n_control_steps=N)
    run = Loop(controller, probe=False, knobs=["dropout"], mode="act")
    run.loss = lambda tokens: run.model(tokens).sum() * float("nan")
    run.train(STEPS)
    assert all(d.vetoed and "not finite" in d.reason for d in run.decisions)
    assert all(d.values["dropout"] == pytest.approx(0.1) for d in run.decisions)


class Told(Loop):
    told = None

    def probe(self):
        return super().probe() if self.told is None else self.told


def test_a_probe_that_is_not_finite_any_more_is_a_loss_out_of_its_band():
    run = Told(moving()).train(12)
    run.told = float("nan")
    run.train(STEPS - 12)
    assert [d.vetoed for d in run.decisions[-2:]] == [True, True]
    assert "not finite" in run.decisions[-1].reason


@pytest.mark.parametrize("spike", [9.0, float("inf")])
def test_a_best_loss_is_remembered_past_a_probe_that_was_not_finite(spike):
    run = Told(moving()).train(8)
    for run.told in (spike, 9.0, 9.0):
        run.train(STEPS // N)
    assert [d.vetoed for d in run.decisions[-3:]] == [True, True, True]


def test_a_probe_below_zero_is_refused_and_a_loss_that_falls_below_it_is_warned_of_once(caplog):
    run = Told()
    run.told = -1.0
    with pytest.raises(AttachError, match="a loss above 0, such as nats per token, got -1"):
        moving().attach(run.model, run.optimizer, total_steps=STEPS, probe=run.probe)
    run = Told(moving()).train(8)
    run.told = -1.0
    with caplog.at_level(logging.WARNING):
        run.train(STEPS - 8)
    assert [r.message for r in caplog.records if "below 0" in r.message] == [
        "metactl: a loss is below 0: controller and guard see nothing of such losses; give "
        "one that is above 0, such as nats per token"
    ]


def test_a_knob_of_the_users_own_moves_and_a_dead_one_is_refused():
    state = {"noise": 0.5}
    knob = Knob(name="noise", low=0.0, high=1.0, default=0.5)
    own = FunctionKnob(knob, lambda: state["noise"], lambda value: state.update(noise=value))
    Loop(Controller(Constant(1.0), n_control_steps=N), knobs=[own]).train(STEPS)
    assert state["noise"] == 1.0
    dead = FunctionKnob(knob, lambda: 0.5, lambda value: None)
    with pytest.raises(AttachError, match=r"noise: 0 was written and 0\.5 read back"):
        Loop(moving(), knobs=[dead])


def test_a_knob_that_the_policy_does_not_know_is_warned_of(caplog):
    knob = Knob(name="smoothing", low=0.0, high=0.3, default=0.1)
    state = {"smoothing": 0.1}
    own = FunctionKnob(
        knob, lambda: state["smoothing"], lambda value: state.update(smoothing=value)
    )
    with caplog.at_level(logging.WARNING, logger="metactl"):
        loop = Loop(Controller.from_pretrained("default"), knobs=["dropout", own]).train(STEPS)
    assert len(loop.decisions) > 0 and state == {"smoothing": 0.1}
    (record,) = caplog.records
    assert "never moves smoothing" in record.message and "it moves rope_base" in record.message


@pytest.mark.parametrize(
    ("loss", "message"),
    [(torch.ones(2), r"a tensor of \(2,\)"), ((1.0, 2.0), "give the one that is minimised")],
)
def test_a_loss_that_is_not_one_number_is_refused(loss, message):
    run = Loop(moving())
    with pytest.raises(TypeError, match=message):
        run.controller.step(loss=loss)


@pytest.mark.parametrize("clipped", [False, True])
def test_between_decisions_a_controlled_step_would_never_keep_a_gpu_waiting(waits, clipped):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # AdamW itself reads on a CPU
    controller, x = Controller(RandomMoves(0), n_control_steps=4), torch.randn(3, 4)
    controller.attach(model, optimizer, total_steps=40, example=x, tokens_per_step=3)
    seen = {}
    for step in range(1, 40):
        with waits() as at_step:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0) if clipped else None
            optimizer.step()
            decision = controller.step(loss, norm)
        assert (decision is None) == (step % 10 != 0)
        seen[step] = at_step
    assert not set().union(*(seen[step] for step in seen if step % 10))
    assert "tolist" in seen[10]  # at a decision it reads


def test_a_knob_of_the_users_own_that_raises_is_refused_in_words():
    def write(value):
        raise OSError("read-only")

    knob = Knob(name="noise", low=0.0, high=1.0, default=0.5)
    with pytest.raises(AttachError, match="noise: OSError: read-only"):
        Loop(moving(), knobs=[FunctionKnob(knob, lambda: 0.5, write)])


def test_a_step_that_a_gradient_scaler_skips_does_not_count():
    run = Loop(moving())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for bad in (False, True, False):
        run.optimizer.zero_grad()
        loss = run.loss(torch.randint(11, (4, 6), generator=run.data))
        scaler.scale(loss * (float("inf") if bad else 1.0)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.controller.step(loss=loss)
    assert run.controller._run._meter.steps == 2


def test_a_gradient_norm_that_overflows_does_not_hide_the_others():
    run = Loop(moving(), probe=False)
    run.train(3)
    run.loss(torch.zeros(2, 2, dtype=torch.long)).backward()
    run.model.out.bias.grad[0] = torch.inf
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.optimizer.step()
    assert run.controller._run._meter.read({}).gradient_norm == pytest.approx([0.5], rel=1e-3)


def test_a_long_control_step_measures_four_gradient_norms_and_all_losses():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    model, written = nn.Module(), torch.zeros(())
    model.weight = weight
    controller = Controller(Static(), n_control_steps=2)
    value = [0.5]
    knob = Knob(name="own", low=0.0, high=1.0, default=0.5)
    own = FunctionKnob(knob, lambda: value[0], lambda new: value.__setitem__(0, new))
    controller.attach(model, optimizer, total_steps=600, knobs=[own])
    for step in range(300):
        weight.grad = torch.tensor([0.0, float(step)])
        optimizer.step()
        controller.step(loss=written.fill_(float(step)))  # as a compiled program does it
        if step == 280:
            controller.state_dict()
    history = controller._run._history
    measured = [74, 149, 224, 299]
    assert history["gradient_norm"][0, -1] == pytest.approx(np.mean(measured))
    assert history["train_loss"][0, -1] == pytest.approx(np.mean(range(300)), rel=1e-12)
    assert history["train_loss_std"][0, -1] == pytest.approx(np.std(range(300)), rel=1e-9)


def test_tensorboard_shows_what_a_function_is_given(tmp_path):
    by_function = Loop(moving()).train(STEPS).logged
    with SummaryWriter(str(tmp_path)) as writer:
        Loop(moving(), log=writer).train(STEPS)
    board = EventAccumulator(str(tmp_path)).Reload()
    shown = {
        (tag, event.step): event.value
        for tag in board.Tags()["scalars"]
        for event in board.Scalars(tag)
    }
    given = {(tag, step): value for tag, value, step in by_function}
    assert shown == pytest.approx(given, rel=1e-6, nan_ok=True)
    assert len(shown) > 20 * N


def test_losses_without_optimizer_steps_warn_once(caplog):
    run = Loop(moving())
    for _ in range(200):
        run.controller.step(loss=1.0)
    assert len(caplog.records) == 1
    assert "no step of the optimizer" in caplog.text


@pytest.mark.parametrize("module", [metactl.attach, metactl.adapters.base])
def test_the_examples_in_the_docstrings_run(module):
    failed, tried = doctest.testmod(module)
    assert (failed, tried > 0) == (0, True)


def test_a_step_that_calls_its_parents_step_counts_once():
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    weight = torch.nn.Parameter(torch.zeros(2))
    torch.optim.SGD([weight], lr=0.1)  # from now on the parent's step runs hooks of its own
    optimizer = Own([weight], lr=0.5)
    meter, rate = Meter(optimizer), LearningRateKnob(optimizer)
    rate.write(2.0)
    for _ in range(3):
        weight.grad = torch.tensor([3.0, 4.0])
        optimizer.step()
    meter.add_loss(1.0)
    assert meter.steps == 3
    assert meter.read({}).gradient_norm == pytest.approx([5.0])
    assert weight.tolist() == [-9.0, -12.0]
