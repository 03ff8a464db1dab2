"""Benchmarks that reach deep into the models, at their smallest: what they call is still there."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

from benchmarks import confirm, cost, disturbed, evaluations, population, rival, single
from benchmarks.places import FAMILIES, PLACES, Place, named, where_of
from benchmarks.provenance import write
from benchmarks.rotation.jobs import train_arm
from benchmarks.timing import in_turn, ratio
from metactl.commands import Command, Evaluate
from metactl.controllers import Static
from metactl.knobs import Knob, KnobSet
from metactl.policy import Policy
from metactl.signals import Codec


def test_an_arm_of_the_claims_about_rotations_trains_and_is_looked_at():
    found = train_arm("text", "block", n_seeds=2, steps=2)
    assert found["steps"] == 2
    assert {place.split("_")[-1] for place in found["geometry"]} >= {"projection", "turned"}


def test_the_eager_side_of_one_big_run_compiles_nothing(monkeypatch):
    def refuse(*args, **options):
        pytest.fail("the eager side compiles")

    monkeypatch.setattr(torch, "compile", refuse)
    shape = {"d_model": 16, "n_heads": 4, "n_layers": 1, "context": 8, "batch_size": 2}
    options = single.Options(json=Path("unused"), **shape)
    tokens = torch.randint(256, (2, 9))
    model = single.adaptive(options)
    before = model.unembedding.detach().clone()
    single.ours(options, model, tokens, compiled=False)()
    assert not torch.equal(before, model.unembedding)


def test_figures_name_their_machine_and_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMIT", "0123abc")
    write(tmp_path / "figures.json", {"ratio": 1.5})
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["ratio"] == 1.5 and found["commit"] == "0123abc" and found["machine"]["cores"] >= 1


def test_sides_take_turns_and_what_warms_up_does_not_count():
    log = []
    sides = {name: (lambda name=name: log.append(name)) for name in ("a", "b")}
    times = in_turn(sides, 3, repeats=2, warm_up=1)
    assert log == ["a", "a", "b", "b"] * 4
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3}
    assert ratio({"a": [1.0, 9.0, 4.0], "b": [1.0, 3.0, 2.0]}, "a", "b") == 2


@pytest.mark.parametrize("name", [*PLACES, *FAMILIES])
def test_evaluations_are_commands_that_metactl_understands(name, tmp_path):
    options = evaluations.Options(rival=["default"], figures=tmp_path)
    place = named([name])[name]
    arguments = evaluations.command(options, name, place, ["dropout"])
    found = tyro.cli(Command, args=arguments)
    assert isinstance(found, Evaluate)
    assert "knobs=[dropout,weight_decay]" in found.set
    assert found.n_tasks == place.n_tasks and found.grid == place.grid and found.seed == 1
    assert (found.suite == "full") == (name == "default") == (found.rival == ["default"])


@pytest.mark.parametrize(("n_runs", "workers"), [(1, 1), (5, 1), (6, 3), (8, 4)])
def test_all_runs_of_a_population_are_measured_whatever_the_cores(n_runs, workers, monkeypatch):
    monkeypatch.setattr(population, "default_workers", lambda: 4)
    assert population._workers("cpu", n_runs) == workers
    assert population._workers("cuda", n_runs) == 1


def test_costs_are_of_one_step_of_one_run(tmp_path):
    few = {"runs": (1, 2), "d_model": (16,), "context": (8,), "width": (0.5,), "span": (8,)}
    found = cost.curves(cost.Options(json=tmp_path / "cost.json", rounds=1, **few))
    assert {name: list(curve) for name, curve in found.items()} == {
        name: [f"{x:g}" for x in points] for name, points in few.items()
    }
    assert all(each > 0 for curve in found.values() for each in curve.values())
    cost.draw(tmp_path / "cost.png", found)
    assert (tmp_path / "cost.png").stat().st_size > 5_000


def test_who_is_told_of_a_raised_rate_lowers_it_while_it_lasts_and_then_comes_back():
    knob = Knob(name=disturbed.RATE, low=0.1, high=10.0, default=1.0, scale="log2")
    knobs = KnobSet([knob])
    codec, positions, seen = Codec(knobs), knobs.default_positions(1), []
    told = disturbed.Told(Static(), begins=0.21, ends=0.28, factor=10.0)
    told.keep_pace(40)
    told.begin(codec, 1)
    for _ in range(40):
        observation = np.zeros((1, len(codec.names)))
        observation[:, codec.names.index(f"knob/{knob.name}/position")] = 2 * positions - 1
        positions = knobs.move(positions, told.act(observation), progress=1 / 40)
        seen.append(float(positions[0, 0]))
    # Control steps 8 to 11 are disturbed: a tenth of the range each way in each of them.
    wanted = [0.5] * 8 + [0.4, 0.3, 0.2, 0.1] + [0.2, 0.3, 0.4] + [0.5] * 25
    assert seen == pytest.approx(wanted, abs=1e-6)


def test_a_place_that_nobody_knows_is_named():
    with pytest.raises(ValueError, match=r"places must be of default, .*, digits, got nope"):
        named(["cpp", "nope"])


def test_claims_are_played_again_and_parted_by_the_peak_learning_rate():
    policy = Policy.load("default")
    small = {"d_model": 16, "n_heads": 4, "n_layers": 1, "context": 8, "horizon": 40}
    place = Place(n_tasks=6, options=small)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confirm, "where_of", lambda *args: eager(where_of(*args)))
        found = confirm.confirm(policy, {"twin": policy}, place, seed=1)
    low, middle, high = thirds = found["by_peak_learning_rate"]
    assert [each["n_tasks"] for each in (found, *thirds)] == [6, 2, 2, 2]
    minus = found["final_test_minus"]
    assert set(minus) == {
        f"policy - {arm}"
        for arm in ("default", "static dropout=0, rope_base=8", "rival twin", "replay", "yoked")
    }
    assert minus["policy - rival twin"]["estimate"] == 0
    assert minus["policy - yoked"]["estimate"] != 0
    assert 0.002 <= low["from"] < low["to"] < middle["from"] < middle["to"] < high["from"]
    parts = [third["final_test_minus"]["policy - default"]["estimate"] for third in thirds]
    assert np.mean(parts) == pytest.approx(minus["policy - default"]["estimate"])


def test_another_policy_is_parted_by_how_often_the_data_are_seen():
    policy, other = Policy.load("default"), Policy.load("families")
    small = {"d_model": 16, "n_heads": 4, "n_layers": 1, "context": 8, "horizon": 40}
    place = Place(n_tasks=6, options={**small, "unique_bytes": (200, 20_000)})
    policies = {"mean": policy, "policy": policy, "rival": other}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rival, "where_of", lambda *args: eager(where_of(*args)))
        found = rival.compare(policies, place)
    apart = {pair: each["estimate"] for pair, each in found["final_test_minus"].items()}
    assert apart["mean - policy"] == 0 and apart["policy - rival"] != 0
    groups = found["by_epochs"]
    assert len(groups) > 1 and sum(group["n_tasks"] for group in groups) == 6
    whole = sum(group["n_tasks"] * group["final_test"]["rival"] for group in groups) / 6
    assert whole == pytest.approx(found["final_test"]["rival"])


def eager(where):
    return replace(where, options={**where.options, "compile": False}, n_workers=0, n_envs=6)
