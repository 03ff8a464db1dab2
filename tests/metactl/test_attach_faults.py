"""What goes wrong on a controlled run: the run goes on, and nothing is left behind."""

import json

import numpy as np
import pytest
import torch
from test_attach import STEPS, Loop, moving, same
from torch import nn

import metactl.meter
from metactl import AttachError, Controller
from metactl.adapters.optimizer import LearningRateKnob, WeightDecayKnob, forget_factor
from metactl.controllers import Schedule
from metactl.meter import Meter, gradient_norm


def stepped(optimizer):
    """By how much a step moves each group's parameter at a gradient of 1."""
    parameters = [group["params"][0] for group in optimizer.param_groups]
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return [float((b - p.detach()).mean()) for b, p in zip(before, parameters, strict=True)]


@pytest.mark.parametrize("place", ["before", "after"])
def test_what_fails_in_measuring_never_stops_a_step(place, monkeypatch, caplog):
    alone = Loop().train(STEPS)

    def broken(*args):
        raise RuntimeError("cannot be measured")

    if place == "before":
        monkeypatch.setattr(metactl.meter, "gradient_norm", broken)
    else:
        monkeypatch.setattr(Meter, "_sizes", broken)
    watched = Loop(moving(), mode="shadow").train(STEPS)
    assert watched.losses == alone.losses and same(watched.weights(), alone.weights())
    assert watched.controller.mode == "off"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "cannot be measured" in caplog.text


def test_gradients_that_are_sparse_or_not_there_are_left_out():
    dense, sparse, none = (
        nn.Linear(2, 1, bias=False),
        nn.Embedding(5, 2, sparse=True),
        nn.Linear(1, 1),
    )
    dense(sparse(torch.tensor([1, 2]))).sum().backward()
    parameters = [*dense.parameters(), *sparse.parameters(), *none.parameters()]
    assert float(gradient_norm(parameters)) == pytest.approx(float(dense.weight.grad.norm()))
    assert gradient_norm(none.parameters()) is None


def test_a_factor_that_was_left_stays_in_force_once_and_can_be_taken_away():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    knob = LearningRateKnob(optimizer)
    knob.write(0.25)
    knob.close()
    assert stepped(optimizer) == [0.25]
    again = LearningRateKnob(optimizer)
    assert again.read() == 0.25 and stepped(optimizer) == [0.25]  # and not twice
    again.write(0.5)
    again.close()
    assert stepped(optimizer) == [0.5]
    forget_factor(optimizer)
    forget_factor(optimizer)
    assert stepped(optimizer) == [1.0] and not optimizer._optimizer_step_pre_hooks
    assert set(optimizer.param_groups[0]) == set(
        torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0).param_groups[0]
    )


def test_groups_that_are_added_later_move_with_the_others_and_come_back():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0, weight_decay=0.2)
    rate, decay = LearningRateKnob(optimizer), WeightDecayKnob(optimizer)
    rate.write(0.5)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "weight_decay": 0.1})
    assert stepped(optimizer) == [0.5, 0.5]
    decay.write(0.4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.4, 0.2]
    for knob in (rate, decay):
        knob.restore()
        knob.close()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.1]
    assert not optimizer._optimizer_step_pre_hooks


def test_a_knob_that_cannot_be_put_back_is_named_and_the_others_are(monkeypatch, caplog):
    run = Loop(moving())
    before = run.model.drop.p
    run.train(STEPS // 2)
    monkeypatch.setattr(WeightDecayKnob, "restore", lambda self: [][0])
    assert run.model.drop.p != before
    run.controller.detach()
    assert run.model.drop.p == before and run.controller.mode == "off"
    assert "knob 'weight_decay' cannot be put back" in caplog.text
    monkeypatch.undo()
    moving().attach(run.model, run.optimizer)  # it can be controlled again


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        ([1.0, 2.0], "gradient_norm must be one number, got list"),
        (torch.ones(2), r"got a tensor of \(2,\)"),
        (np.ones(2), r"got an array of \(2,\)"),
        (np.array("1"), "got ndarray"),
    ],
)
def test_a_gradient_norm_that_is_not_one_number_is_refused(norm, message):
    run = Loop(moving())
    with pytest.raises(TypeError, match=message):
        run.controller.step(loss=1.0, gradient_norm=norm)


@pytest.mark.parametrize("number", [np.array, np.float32, torch.tensor])
def test_a_loss_is_one_number_whatever_holds_it(number):
    runs = Loop(moving()), Loop(moving())
    for run, kind in zip(runs, (number, float), strict=True):
        for i in range(8):
            run.controller.step(loss=kind(2.0**-i), gradient_norm=kind(1.0))
    states = [run.controller.state_dict() for run in runs]
    assert states[0] == states[1]


def test_numpys_whole_numbers_are_whole_numbers():
    run = Loop()
    Controller(moving().controller, n_control_steps=np.int64(6)).attach(
        run.model, run.optimizer, total_steps=np.int64(24), unique_tokens=np.int64(1000)
    )
    with pytest.raises(ValueError, match=r"n_control_steps must be a whole number.*got 2\.5"):
        Controller(moving().controller, n_control_steps=2.5)
    with pytest.raises(AttachError, match="Unknown mode 'None'"):
        Controller(moving().controller).attach(run.model, run.optimizer, mode=None)


@pytest.mark.parametrize(
    "damage",
    [
        {"total": float("inf")},
        {"total": 0},
        {"index": -1},
        {"index": 10**9},
        {"total": 10**400},
        {"knobs": None},
        {"positions": None},
        {"meter": []},
        {"guard": {}},
    ],
)
def test_a_damaged_state_is_refused_in_words(damage):
    state = json.loads(
        json.dumps(Loop(moving(), total_steps=None).train(6).controller.state_dict())
    )
    run = Loop(moving(), total_steps=None)
    with pytest.raises(AttachError, match="the state does not fit this run"):
        run.controller.load_state_dict({**state, **damage})


def test_a_schedule_of_other_knobs_is_refused():
    narrow = Schedule(np.array([0.0, 1.0]), np.array([[0.5], [0.5]]))
    with pytest.raises(AttachError, match=r"one column of positions per knob, 3 of them, got"):
        Loop(Controller(narrow, n_control_steps=6))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"knobs": {"dropout": -5.0}}, r"dropout is -5, and here it may be 0 to 0\.6"),
        ({"knobs": {"learning_rate_multiplier": 1e30}}, r"multiplier is 1e\+30, .* 0\.1 to 4"),
        ({"meter": {"steps": -50}}, "it took -50 optimizer steps"),
        ({"guard": {"_good": [[float("nan")] * 3]}}, r"positions must be in \[0, 1\], got \[\[nan"),
    ],
)
def test_a_state_with_a_number_that_nobody_wrote_moves_nothing(damage, message):
    state = Loop(moving()).train(6).controller.state_dict()
    run = Loop(moving())
    before = run.model.drop.p, run.optimizer.param_groups[0]["learning_rate_multiplier"]
    damaged = {**state, **{name: {**state[name], **part} for name, part in damage.items()}}
    with pytest.raises(AttachError, match=message):
        run.controller.load_state_dict(damaged)
    after = run.model.drop.p, run.optimizer.param_groups[0]["learning_rate_multiplier"]
    assert after == before
    run.controller.load_state_dict(state)


def test_a_knob_that_does_not_take_a_value_is_left_where_it_was(caplog):
    loop = Loop(moving(), knobs=["dropout", "learning_rate_multiplier"]).train(9)
    (adapter,) = (a for a in loop.controller._run.adapters.values() if a.knob.name == "dropout")
    before, written = loop.model.drop.p, []

    def write(value):
        written.append(value)
        loop.model.drop.p = before if value == before else float("nan")

    adapter.write = write
    loop.train(15)
    assert "read back nan" in caplog.text
    assert loop.model.drop.p == before and len(written) == 2
