"""What a controller remembers of a run, and what it refuses to begin with."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from test_attach import STEPS, Loop, N, Net, moving, same

from metactl import AttachError, Controller, FunctionKnob, Knob
from metactl.controllers import RandomMoves, Schedule, Static
from metactl.meter import Meter


@pytest.mark.parametrize("stop", [7, 8, 9, 17])
def test_a_resumed_run_decides_and_trains_bit_identically(stop):
    whole = Loop(moving()).train(STEPS)
    first = Loop(moving()).train(stop)
    noise = torch.get_rng_state()
    saved = json.loads(json.dumps(first.controller.state_dict(), allow_nan=False))
    model, optimizer = first.model.state_dict(), copy.deepcopy(first.optimizer.state_dict())
    second = Loop(moving())
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    second.schedule.load_state_dict(first.schedule.state_dict())
    second.data.set_state(first.data.get_state())
    second.controller.load_state_dict(saved)
    assert second.model.drop.p == first.model.drop.p
    torch.set_rng_state(noise)
    second.train(STEPS - stop)
    assert second.losses == whole.losses[stop:]
    assert first.decisions + second.decisions == whole.decisions
    assert same(second.weights(), whole.weights())


def test_an_unknown_budget_is_estimated_and_corrected():
    run = Loop(moving(), total_steps=None, probe=False)
    run.train(5)
    run.controller._run._total = 24  # as if the first guess had been short
    run.train(40)
    assert run.controller._run._total == 96
    progress = run.controller._run._history["progress"][0]
    known = progress[np.isfinite(progress)]
    assert np.all(np.diff(known) >= 0)
    assert known[-1] <= 0.75


def test_a_change_by_hand_is_where_the_controller_goes_on_from():
    run = Loop(Controller(Static(), n_control_steps=N), knobs=["dropout"]).train(5)
    run.model.drop.p = 0.42
    run.train(4)
    assert run.decisions[-1].values["dropout"] == pytest.approx(0.42)
    assert run.model.drop.p == pytest.approx(0.42)


@pytest.mark.parametrize("restore", [True, False])
def test_detach_restores_bit_for_bit_or_leaves_the_values(restore):
    run = Loop(moving()).train(10)
    moved = run.model.drop.p
    run.controller.detach(restore=restore)
    assert run.model.drop.p == (0.1 if restore else moved)
    factor = run.optimizer.param_groups[0].get("learning_rate_multiplier")
    assert factor == (None if restore else run.decisions[-1].values["learning_rate_multiplier"])
    assert len(run.optimizer._optimizer_step_pre_hooks) == (not restore)  # what keeps the factor
    assert run.controller.step(loss=1.0) is None


def test_two_controllers_of_one_optimizer_are_refused_until_the_first_lets_go():
    run = Loop(moving())
    with pytest.raises(AttachError, match="has a controller already; detach that one first"):
        moving().attach(run.model, run.optimizer, total_steps=STEPS, mode="shadow")
    run.controller.detach()
    moving().attach(run.model, run.optimizer, total_steps=STEPS)


def test_a_state_before_there_is_a_run_is_refused():
    state = Loop(moving()).train(9).controller.state_dict()
    with pytest.raises(AttachError, match="attach comes before load_state_dict"):
        moving().load_state_dict(state)
    off = Loop(moving(), mode="off").controller
    off.load_state_dict(state)  # nothing is at work, so there is nothing to go on with
    assert off.mode == "off"


def test_a_run_longer_than_it_was_said_to_be_warns_once(caplog):
    run = Loop(moving(), total_steps=12)
    with caplog.at_level(logging.WARNING, logger="metactl"):
        run.train(STEPS)
    assert [record.message for record in caplog.records] == [
        "metactl: the run goes on past its total_steps=12; nothing is decided any more, and the "
        "knobs stay where they are"
    ]


def broken(**changes):
    run = Loop()
    options = {"model": run.model, "optimizer": run.optimizer, "total_steps": STEPS, **changes}
    moving().attach(options.pop("model"), options.pop("optimizer"), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "shadwo"}, "Unknown mode 'shadwo'. Known: act, shadow, off. Did you mean"),
        ({"model": 3}, "model must be a torch module, got int"),
        ({"optimizer": None}, "optimizer must be a torch optimizer, got NoneType"),
        ({"model": Net()}, "the optimizer trains no parameter of the model"),
        ({"total_steps": 1}, "total_steps must be a whole number of at least 2 .*, got 1"),
        ({"tokens_per_step": -3}, "tokens_per_step must be above 0 tokens and finite, got -3"),
        ({"unique_tokens": float("nan")}, "unique_tokens must be above 0 tokens"),
        ({"knobs": ["dropuot"]}, "Unknown knob 'dropuot'.*Did you mean 'dropout'"),
        ({"total_steps": 24.5}, r"whole number of at least 2 optimizer steps, got 24\.5"),
        ({"total_steps": "24"}, "got '24'"),
        ({"tokens_per_step": "many"}, "tokens_per_step must be above 0 tokens and finite"),
        ({"knobs": "dropout"}, "knobs must be a list of names and adapters, got 'dropout'"),
        ({"knobs": ["dropout", "dropout"]}, "two of the knobs have the same name"),
        ({"knobs": [3]}, "a knob must be a name or an adapter, got int"),
        ({"knobs": []}, "cannot move anything: knobs is empty"),
        ({"knobs": ["rope_base"]}, "rope_base: the model has none of transformers"),
        ({"probe": 1.0}, "probe must be a function that returns a loss, got 1.0"),
        ({"probe": lambda: float("nan")}, "the probe must return a finite loss, got nan"),
        ({"probe": lambda: [][0]}, "the probe failed: IndexError: list index out of range"),
        ({"on_unsupported": "ignore"}, "on_unsupported must be 'mask' or 'raise', got 'ignore'"),
        ({"log": 7}, "log must be a SummaryWriter or a function"),
        ({"knobs": ["dropout"], "example": torch.ones(1, 4)}, "give attach an input that it takes"),
    ],
)
def test_what_cannot_be_attached_is_refused_in_words(changes, message):
    with pytest.raises(AttachError, match=message):
        broken(**changes)


def test_a_refused_attachment_leaves_nothing_behind():
    run, controller = Loop(), moving()
    groups = [dict(group) for group in run.optimizer.param_groups]
    with pytest.raises(AttachError):
        controller.attach(run.model, run.optimizer, knobs=["learning_rate_multiplier", "rope_base"])
    with pytest.raises(AttachError):
        controller.attach(run.model, run.optimizer, log=7)
    assert not run.optimizer._optimizer_step_pre_hooks
    assert [dict(group) for group in run.optimizer.param_groups] == groups
    controller.attach(run.model, run.optimizer)  # and it can be attached after all
    assert controller.mode == "act"


def test_a_state_of_another_run_is_refused():
    state = Loop(moving()).train(9).controller.state_dict()
    for changed, message in (
        ({**state, "version": 2}, "state has version 2"),
        ({**state, "knobs": {"dropout": 0.1}}, "the state has the knobs dropout"),
        ({**state, "history": {}}, "does not fit this run"),
        ({**state, "knobs": {**state["knobs"], "dropout": "nan"}}, "knobs must be finite"),
        ({**state, "meter": {**state["meter"], "sums": [1.0]}}, "does not fit this run"),
        ({"version": 1}, "the state has the knobs ; this run has"),
        ([1, 2], "state has version None"),
    ):
        with pytest.raises(AttachError, match=message):
            Loop(moving()).controller.load_state_dict(changed)


def test_a_policys_name_is_no_controller():
    with pytest.raises(TypeError, match=r"got 'default'.*Controller.from_pretrained"):
        Controller("default")


def test_a_step_before_attach_is_warned_of_once(caplog):
    controller = Controller(Static())
    assert controller.step(loss=1.0) is None and controller.step(loss=1.0) is None
    assert [record.message for record in caplog.records] == [
        "metactl: step before attach: nothing is controlled"
    ]
    with pytest.raises(AttachError, match="attach comes before load_state_dict"):
        controller.load_state_dict(controller.state_dict())


def test_no_control_steps_at_all_are_refused():
    with pytest.raises(
        ValueError, match="n_control_steps must be a whole number of at least 2, got 0"
    ):
        Controller(Static(), n_control_steps=0)


def test_a_state_taken_before_the_norm_is_corrected_changes_nothing():
    meters = []
    for interrupted in (False, True):
        weight = torch.nn.Parameter(torch.zeros(2))
        meter = Meter(torch.optim.SGD([weight], lr=0.1))
        for norm in (7.0, 9.0):
            weight.grad = torch.tensor([3.0, 4.0])
            meter.optimizer.step()
            if interrupted:
                taken = meter.state_dict()
            meter.note(0.1 * norm, norm)
        meters.append(meter.state_dict())
    assert meters[0] == meters[1]
    assert meters[0]["sums"][3:] == [2, 16]
    assert taken["sums"][3:] == [2, 12]
    meter.load_state_dict(taken)
    assert meter.state_dict() == taken


@pytest.mark.parametrize("total", [24, 4])
def test_a_schedule_keeps_the_pace_of_the_run_it_is_on(total):
    constant = Schedule(np.array([0.0, 1.0]), np.full((2, 1), 0.5))
    loop = Loop(
        Controller(constant, n_control_steps=N), total_steps=total, knobs=["dropout"]
    ).train(total)
    dropout = [decision.values["dropout"] for decision in loop.decisions]
    assert dropout == pytest.approx([0.3] * len(dropout))


def test_a_run_shorter_than_its_control_steps_may_become_longer(caplog):
    short = Loop(moving(), total_steps=N - 2, knobs=["dropout"]).train(3)
    state = json.loads(json.dumps(short.controller.state_dict()))
    longer = Loop(moving(), knobs=["dropout"])
    longer.controller.load_state_dict(state)
    assert "4 optimizer steps (4 control steps), now it has 24 (6)" in caplog.text
    assert longer.controller.state_dict()["meter"]["steps"] == 3
    longer.train(STEPS - 3)
    assert [decision.step for decision in longer.decisions] == [4, 8, 12, 16, 20]
    back = Loop(moving(), total_steps=N - 2, knobs=["dropout"])
    back.controller.load_state_dict(state)
    assert back.controller.state_dict()["history"] == state["history"]


def test_one_rule_is_at_work_in_one_run():
    rule = RandomMoves(1)
    first = Loop(Controller(rule), knobs=["dropout"])
    with pytest.raises(AttachError, match="this rule is at work in another run"):
        Loop(Controller(rule), knobs=["dropout"])
    first.controller.detach()
    Loop(Controller(rule), knobs=["dropout"])


def test_a_knob_set_by_hand_out_of_its_range_stays_where_nobody_moves_it():
    loop = Loop(Controller(Static(), n_control_steps=N), knobs=["dropout"]).train(5)
    loop.model.drop.p = 0.9
    loop.train(STEPS - 5)
    assert loop.model.drop.p == 0.9
    assert loop.decisions[-1].values == {"dropout": 0.9}


def test_a_strict_controller_puts_back_all_it_can_before_it_says_what_it_cannot():
    state = {"own": 0.5, "broken": False}

    def write(value):
        if state["broken"]:
            raise OSError("boom")
        state["own"] = value

    own = FunctionKnob(
        Knob(name="own", low=0.0, high=1.0, default=0.5), lambda: state["own"], write
    )
    loop = Loop(moving(strict=True), knobs=[own, "dropout", "learning_rate_multiplier"]).train(9)
    assert loop.model.drop.p != 0.1
    state["broken"] = True
    with pytest.raises(OSError, match="boom"):
        loop.controller.detach()
    assert loop.model.drop.p == 0.1
    assert not loop.optimizer._optimizer_step_pre_hooks


def test_a_state_from_where_a_range_was_another_goes_on_from_its_value():
    def knob(high):
        def own(value=0.0):
            held["value"] = value

        held = {"value": 0.5}
        spec = Knob(name="own", low=0.0, high=high, default=0.5)
        return FunctionKnob(spec, lambda: held["value"], own)

    state = Loop(moving(), knobs=[knob(1.0)]).train(12).controller.state_dict()
    wider = Loop(Controller(Static(), n_control_steps=N), knobs=[knob(2.0)])
    guard = wider.controller.state_dict()["guard"]
    wider.controller.load_state_dict({**state, "guard": guard})
    value = state["knobs"]["own"]
    assert value != 0.5
    assert wider.controller.state_dict()["positions"]["own"] == pytest.approx(value / 2)
    wider.train(12)
    assert wider.decisions[-1].values["own"] == value
