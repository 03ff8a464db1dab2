"""Models, optimizers and loops as other people write them."""

import dataclasses
import gc
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from test_attach import STEPS, Loop, moving
from torch import nn
from torch.nn import functional as F

from metactl import AttachError, Controller, FunctionKnob, Knob
from metactl.adapters import find_adapters
from metactl.adapters.dropout import DropoutKnob
from metactl.adapters.optimizer import LearningRateKnob
from metactl.controllers import RandomMoves, Static
from metactl.meter import Meter

X = torch.linspace(-1, 1, 24).reshape(6, 4)


class Falling:
    """A run whose loss only falls, whatever anybody does."""

    def __init__(self, probe=None, **options):
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.controller = Controller(Static())
        self.controller.attach(self.model, self.optimizer, example=X, probe=probe, **options)

    def train(self, n_steps):
        reasons = []
        for step in range(n_steps):
            self.optimizer.step()
            decision = self.controller.step(loss=2 + 8 * float(np.exp(-step / 150)))
            reasons += [decision.reason] if decision is not None and decision.vetoed else []
        return reasons


def test_an_estimated_budget_never_forgets_how_the_run_began():
    run = Falling()
    assert run.train(4200) == []
    history = run.controller._run._history
    assert history.first("train_loss")[0] > 8
    assert len(history) <= 41
    steps = history["progress"][0] * run.controller._run._total
    assert steps[np.isfinite(steps)].tolist() == sorted(set(steps[np.isfinite(steps)]))


def test_a_probe_that_fails_in_a_run_leaves_nothing_to_compare_training_losses_with():
    asked = []

    def probe():
        asked.append(1)
        if len(asked) > 12:
            raise OSError("gone")
        return 2 + 3 * 0.5 ** len(asked)  # falls below what training losses ever do

    assert Falling(probe=probe, total_steps=1200).train(1200) == []
    assert len(asked) == 13


def test_a_checkpoint_from_within_a_step_that_raised_holds_the_owners_rate():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    knob = LearningRateKnob(optimizer)
    knob.write(4.0)

    def closure():
        assert optimizer.param_groups[0]["lr"] == 0.5
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.5


@pytest.mark.parametrize(
    "name", ["hidden_dropout", "activation_dropout", "dropout_rate", "resid_pdrop", "dropout_prob"]
)
def test_dropout_under_any_usual_name_moves_with_the_others(name):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.1)
            setattr(self, name, 0.2)

        def forward(self, x):
            return self.drop(F.dropout(x, getattr(self, name), self.training))

    block = Block()
    (knob,), missing = find_adapters(["dropout"], block, SimpleNamespace(), X)
    assert not missing
    knob.write(0.4)
    assert (getattr(block, name), block.drop.p) == (0.4, 0.2)
    knob.restore()
    assert (getattr(block, name), block.drop.p) == (0.2, 0.1)


def test_a_config_that_cannot_change_does_not_keep_dropout_from_moving():
    @dataclasses.dataclass(frozen=True)
    class Config:
        dropout: float = 0.1

    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    model.config = Config()
    knob = DropoutKnob(model, lambda training: model.train(training)(X))
    knob.write(0.3)
    assert model[1].p == 0.3 and model.config.dropout == 0.1


def test_an_expert_that_was_not_asked_has_no_update_ratio():
    asked, idle = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    optimizer = torch.optim.SGD([*asked.parameters(), *idle.parameters()], lr=0.1)
    meter = Meter(optimizer)
    meter.armed = True
    asked(X).square().mean().backward()
    optimizer.step()
    meter.note(1.0, None)
    ratio = meter.read({}).update_ratio_median
    assert ratio is not None and ratio[0] > 1e-4


def test_a_probe_inside_of_autocast_sees_the_weights_of_now():
    layer, probed = nn.Linear(4, 4), []
    model = nn.Sequential(layer, nn.Dropout(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)

    def probe():
        probed.append(float(model(X).square().mean()))
        return probed[-1]

    controller = Controller(Static(), n_control_steps=2)
    controller.attach(model, optimizer, total_steps=2, probe=probe, example=X, mode="shadow")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        controller.step(loss=loss)
        assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert probed[-1] == float(model.eval()(X).square().mean())


class Merging(nn.Linear):
    """As adapters that are merged into the weights for evaluation: then nothing is trained."""

    def __init__(self):
        super().__init__(4, 4)
        self.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.ones(1, 4)), nn.Parameter(torch.zeros(4, 1))
        self.merged = False

    def train(self, mode=True):
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        plain = super().forward(x)
        return plain if self.merged else plain + x @ self.down.T @ self.up.T


def test_a_model_whose_modes_do_work_is_left_in_its_mode():
    model = nn.Sequential(Merging(), nn.Dropout(0.1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    controller = Controller(Static(), n_control_steps=2)
    probe = lambda: model(X).square().mean()  # noqa: E731
    controller.attach(model, optimizer, total_steps=4, probe=probe, example=X, mode="shadow")
    for _ in range(4):
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        controller.step(loss=loss)
    assert controller.mode == "shadow" and not model[0].merged


def test_whoever_was_off_stays_off_after_a_resume(caplog):
    run = Loop(moving())
    run.train(STEPS // 2).controller.detach()
    state = run.controller.state_dict()
    resumed = Loop(moving())
    resumed.controller.load_state_dict(state)
    assert resumed.controller.mode == "off"
    assert "it stays off" in caplog.text
    assert resumed.train(STEPS // 2).decisions == []


def test_two_controllers_do_not_move_the_same_knob_of_a_model():
    run = Loop(moving(), knobs=["dropout", "learning_rate_multiplier"])
    other = torch.optim.SGD(run.model.parameters(), lr=0.1)
    with pytest.raises(AttachError, match=r"another controller moves dropout of this model"):
        moving().attach(run.model, other, knobs=["dropout"])
    moving().attach(run.model, other, knobs=["learning_rate_multiplier"])  # its own optimizer's
    moving().attach(run.model, torch.optim.SGD(run.model.parameters(), lr=0.1), mode="shadow")
    run.controller.detach()
    moving().attach(run.model, other, knobs=["dropout"])


def test_a_controller_that_is_forgotten_lets_go_and_leaves_the_knobs():
    run = Loop(moving())
    run.train(STEPS // 2)
    moved = run.model.drop.p
    run.controller = None
    gc.collect()
    assert run.model.drop.p == moved != 0.1
    run.controller = moving()
    run.controller.attach(run.model, run.optimizer, total_steps=STEPS)


def test_a_run_that_became_longer_goes_on_as_of_its_new_length(caplog):
    state = json.loads(json.dumps(Loop(moving()).train(STEPS).controller.state_dict()))
    longer = Loop(moving(), total_steps=2 * STEPS)
    longer.controller.load_state_dict(state)
    assert (
        f"was to have {STEPS} optimizer steps (6 control steps), now it has {2 * STEPS} (6)"
        in caplog.text
    )
    progress = longer.controller._run._history["progress"][0]
    assert progress[-1] == 0.5 and np.isfinite(progress).sum() <= 3 + 2
    longer.train(STEPS)
    assert [d.step for d in longer.decisions] == [32, 40]  # of 6 control steps, the last is the end
    shorter = Loop(moving(), total_steps=STEPS - 2)
    with pytest.raises(AttachError, match=f"took {STEPS} optimizer steps of {STEPS - 2}"):
        shorter.controller.load_state_dict(state)


def test_a_state_that_is_refused_changes_nothing():
    state = Loop(moving()).train(STEPS // 2).controller.state_dict()
    run = Loop(moving()).train(4)
    before = json.dumps(run.controller.state_dict())
    for damage in ({"guard": {}}, {"positions": {**state["positions"], "dropout": "nan"}}):
        with pytest.raises(AttachError, match="does not fit this run"):
            run.controller.load_state_dict({**state, **damage})
        assert json.dumps(run.controller.state_dict()) == before


def test_numpys_numbers_do_not_get_into_a_state():
    run = Loop(moving(), total_steps=np.int64(STEPS))
    state = run.train(STEPS // 2).controller.state_dict()
    assert json.loads(json.dumps(state))["total"] == STEPS  # numpy's would be refused


def test_a_wrapped_optimizer_without_hooks_is_refused_in_words():
    run = Loop()
    wrapped = Accelerator(cpu=True).prepare(run.optimizer)
    with pytest.raises(AttachError, match="of a wrapper, give the optimizer inside"):
        moving().attach(run.model, wrapped)


def test_a_knob_that_rounds_what_is_written_is_refused_at_once():
    state = {"k": 4.0}
    whole = Knob(name="k", low=1.0, high=64.0, default=4.0, scale="log2")
    knob = FunctionKnob(whole, lambda: state["k"], lambda v: state.update(k=float(int(v))))
    run = Loop()
    with pytest.raises(AttachError, match=r"k: 4\.6\d+ was written and 4 read back"):
        moving().attach(run.model, run.optimizer, knobs=[knob])
    assert state["k"] == 4.0


def test_the_rate_of_an_optimizer_with_exclusive_options_can_be_moved():
    model = nn.Linear(4, 4)
    optimizer = transformers.Adafactor(
        model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False
    )
    found, missing = find_adapters(["learning_rate_multiplier"], model, optimizer, X)
    assert not missing and found[0].knob.name == "learning_rate_multiplier"


def test_a_trainer_that_starts_again_begins_anew_and_one_step_is_no_run(caplog):
    from metactl.integrations.trainer import take_charge

    caplog.set_level(logging.WARNING)
    controller = Controller(RandomMoves(3), n_control_steps=6)
    run = Loop()
    run.controller = controller
    place = (controller, run.model, run.optimizer)
    assert take_charge(*place, STEPS, {}, again=False)
    run.train(STEPS // 2)  # and is interrupted
    assert run.model.drop.p != 0.1
    with pytest.raises(AttachError, match="this controller is attached already"):
        take_charge(*place, STEPS, {}, again=False)  # by somebody else
    assert take_charge(*place, STEPS, {}, again=True)
    assert run.model.drop.p == 0.1 and controller.mode == "act"
    assert not take_charge(*place, 1, {}, again=True)
    assert controller.mode == "off" and "leaves nothing to decide" in caplog.text


class Blinding(Static):
    def act(self, observation):
        observation[:] = 0
        return np.ones((self.n_runs, len(self.codec.knobs)))


class Leaving(Static):
    def act(self, observation):
        raise SystemExit(3)


def test_a_controller_neither_blinds_its_guard_nor_ends_the_training(caplog):
    seen = []
    for controller in (Blinding(), Leaving()):
        run = Loop(Controller(controller, n_control_steps=6)).train(STEPS)
        assert len(run.losses) == STEPS
        seen.append(run.controller._run._guard)
    assert np.isfinite(seen[0]._best).all() and (seen[0]._best != 0).all()
    assert seen[1].failed and "The controller failed and is off" in caplog.text
