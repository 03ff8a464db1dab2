import hashlib
import json
import pickle
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import metactl
from safetensors.numpy import save as save_tensors
from safetensors.torch import save as save_torch_tensors

from metactl import Knob, Policy, PolicyError
from metactl.config import TrainConfig, find_config, parse, read_config
from metactl.deployment import deployment
from metactl.errors import harmless
from metactl.policy import PolicyCard, find_policy
from metactl.sweep.config import SweepConfig
from metactl.sweep.score import runs_of

N_SEEN = 5


def make_policy(seed=0, **changes):
    rng = np.random.default_rng(seed)
    weights = {
        "mean": rng.normal(size=N_SEEN),
        "std": rng.uniform(0.5, 2, N_SEEN),
        "weight_0": rng.normal(size=(4, N_SEEN)),
        "bias_0": rng.normal(size=4),
        "weight_1": rng.normal(size=(2, 4)),
        "bias_1": rng.normal(size=2),
    }
    card = PolicyCard(
        format_version=1,
        metactl_version="0.1.0",
        knobs=(
            Knob(name="a", low=0, high=1, default=0.5),
            Knob(name="w", low=1, high=4, default=4, scale="levels", levels=(1, 2, 4)),
        ),
        observations=tuple(f"signal/{i}" for i in range(N_SEEN)),
        hidden=(4,),
        n_control_steps=40,
        training={"seed": 3},
    )
    return Policy(card, {**weights, **changes})


@pytest.fixture
def folder(tmp_path):
    make_policy().save(tmp_path / "policy")
    return tmp_path / "policy"


def edit_card(folder, **changes):
    path = folder / "policy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reseal(folder, blob):
    """Weights and a card that agree on the checksum, as an attacker would write them."""
    (folder / "weights.safetensors").write_bytes(blob)
    edit_card(folder, weights_sha256=hashlib.sha256(blob).hexdigest())


def assert_refused(folder, *words, file=None):
    """Loading fails with a `PolicyError` that names the policy and holds `words`."""
    with pytest.raises(PolicyError) as caught:
        Policy.load(folder)
    message = str(caught.value)
    assert str(folder) in message
    for word in (*words, *([file] if file else [])):
        assert word in message
    return message


def test_a_policy_decides_the_same_after_a_round_trip(folder):
    seen = np.random.default_rng(1).normal(0, 2, (20, N_SEEN))
    loaded, policy = Policy.load(folder), make_policy()
    np.testing.assert_array_equal(loaded.act(seen), policy.act(seen))
    assert np.ptp(policy.act(seen)) > 0.1
    assert loaded.card.knobs == policy.card.knobs
    assert loaded.card.training == {"seed": 3}


def test_a_policy_is_its_normaliser_and_a_tanh_network():
    policy, seen = make_policy(), np.random.default_rng(1).normal(0, 2, (3, N_SEEN))
    w = policy.weights
    hidden = np.tanh(((seen - w["mean"]) / w["std"]) @ w["weight_0"].T + w["bias_0"])
    expected = np.clip(hidden @ w["weight_1"].T + w["bias_1"], -1, 1)
    np.testing.assert_allclose(policy.act(seen), expected)


def test_the_mean_of_policies_acts_as_they_do_on_average_and_survives_the_file(tmp_path):
    policies = [make_policy(seed=seed) for seed in (1, 2, 3)]
    mean = Policy.mean_of(policies)
    seen = np.random.default_rng(5).normal(0, 3, (7, N_SEEN))
    expected = np.mean([policy.act(seen) for policy in policies], axis=0)
    np.testing.assert_allclose(mean.act(seen), expected, atol=1e-12)
    mean.save(tmp_path / "mean")
    kept = Policy.load(tmp_path / "mean")
    assert np.array_equal(kept.act(seen), mean.act(seen)) and kept.card.members == 3
    assert np.array_equal(kept.member(1).act(seen), policies[1].act(seen))
    both = Policy.mean_of([mean, policies[0]])
    np.testing.assert_allclose(both.act(seen), (3 * expected + policies[0].act(seen)) / 4)
    assert Policy.mean_of(policies[:1]) is policies[0]


@pytest.mark.parametrize("hidden", [(4,), (3, 5)])
def test_a_linear_policy_as_a_network_acts_the_same(hidden):
    _, linear = network_and_linear()
    network = linear.as_network(hidden)
    seen = np.random.default_rng(4).normal(0, 3, (200, N_SEEN))
    assert np.abs(network.act(seen) - linear.act(seen)).max() < 1e-6
    assert np.ptp(linear.act(seen)) == 2  # from bound to bound


def test_a_linear_policy_has_a_mean_with_a_network():
    shown, linear = network_and_linear()
    mean = Policy.mean_of([shown, linear.as_network(shown.card.hidden)])
    seen = np.random.default_rng(4).normal(0, 3, (200, N_SEEN))
    np.testing.assert_allclose(mean.act(seen), (shown.act(seen) + linear.act(seen)) / 2, atol=1e-6)


def test_what_is_not_linear_or_does_not_fit_becomes_no_network():
    shown, linear = network_and_linear()
    with pytest.raises(PolicyError, match="at least 2 units, one per knob, got \\(4, 1\\)"):
        linear.as_network((4, 1))
    with pytest.raises(PolicyError, match="Only a linear policy"):
        shown.as_network((4,))


def network_and_linear():
    shown = make_policy()
    rng = np.random.default_rng(3)
    own = {"weight_0": rng.normal(size=(2, N_SEEN)), "bias_0": rng.normal(size=2)}
    weights = {name: shown.weights[name] for name in ("mean", "std")} | own
    return shown, Policy(replace(shown.card, hidden=()), weights)


def test_policies_of_unlike_shape_have_no_mean():
    wider = make_policy()
    other = Policy(replace(wider.card, clip=2.0), wider.weights)
    with pytest.raises(PolicyError, match="differ in clip have no mean"):
        Policy.mean_of([wider, other])


@pytest.mark.parametrize("members", [-1, 0, 2])
def test_a_number_of_members_that_the_weights_are_not_of_is_refused(folder, members):
    edit_card(folder, members=members)
    assert_refused(folder, "members" if members < 1 else "shapes")


def test_saving_again_replaces_a_policy_and_leaves_no_other_files(folder):
    make_policy(bias_1=np.array([7.0, 7.0])).save(folder)
    assert Policy.load(folder).weights["bias_1"].tolist() == [7, 7]
    assert sorted(p.name for p in folder.iterdir()) == ["policy.json", "weights.safetensors"]


def test_a_missing_folder_is_refused(tmp_path):
    assert_refused(tmp_path / "nowhere", "No such file", file="policy.json")


def test_a_card_without_decisions_is_refused(folder):
    edit_card(folder, n_control_steps=0)
    assert_refused(folder, "n_control_steps must be at least 1, got 0")


@pytest.mark.parametrize("name", ["policy.json", "weights.safetensors"])
def test_a_missing_file_is_refused_by_name(folder, name):
    (folder / name).unlink()
    assert_refused(folder, "No such file", file=name)


@pytest.mark.parametrize("keep", [0, 1, 8, 100, -1])
def test_truncated_weights_are_refused(folder, keep):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(folder, "damaged", file="weights.safetensors")


@pytest.mark.parametrize("place", [0.0, 0.01, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_anywhere_in_the_weights_is_refused(folder, place, bit):
    path = folder / "weights.safetensors"
    blob = bytearray(path.read_bytes())
    blob[round(place * (len(blob) - 1))] ^= 1 << bit
    path.write_bytes(blob)
    assert_refused(folder, "damaged", file="weights.safetensors")


@pytest.mark.parametrize("keep", [0, 1, 50, -3])
def test_a_truncated_card_is_refused(folder, keep):
    path = folder / "policy.json"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(folder, "not JSON", file="policy.json")


def test_a_card_that_says_a_thing_twice_is_refused(folder):
    path = folder / "policy.json"
    text = path.read_text()
    path.write_text(text.replace("{", '{"clip": 1.0,', 1))
    assert_refused(folder, "'clip' is there twice", file="policy.json")


@pytest.mark.parametrize(
    "text", ["", "hello", "{'a': 1}", "\xff\xfe", "[" * 100_000, "{", "weights: 1"]
)
def test_a_card_that_is_not_json_is_refused(folder, text):
    (folder / "policy.json").write_bytes(text.encode("latin-1"))
    assert_refused(folder, "not JSON", file="policy.json")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(folder, constant):
    path = folder / "policy.json"
    path.write_text(path.read_text().replace('"seed": 3', f'"seed": {constant}'))
    assert_refused(folder, f"{constant} is not allowed", file="policy.json")


def test_a_number_that_overflows_is_refused(folder):
    path = folder / "policy.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 1e999'))
    assert_refused(folder, file="policy.json")


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5])
def test_another_version_is_refused_with_both_versions(folder, version):
    edit_card(folder, format_version=version)
    assert_refused(folder, f"format_version {version!r}", "reads 1", file="policy.json")


@pytest.mark.parametrize("card", [[], 3, "policy", None])
def test_json_that_is_no_card_is_refused(folder, card):
    (folder / "policy.json").write_text(json.dumps(card))
    assert_refused(folder, file="policy.json")


def test_an_extra_key_is_refused_by_name(folder):
    edit_card(folder, on_load="run me")
    assert_refused(folder, "on_load", file="policy.json")


def test_an_extra_key_of_a_knob_is_refused_by_name(folder):
    knobs = json.loads((folder / "policy.json").read_text())["knobs"]
    edit_card(folder, knobs=[{**knobs[0], "on_load": "run me"}, knobs[1]])
    assert_refused(folder, "on_load", file="policy.json")


def test_a_knob_that_makes_no_sense_is_refused(folder):
    knobs = json.loads((folder / "policy.json").read_text())["knobs"]
    edit_card(folder, knobs=[{**knobs[0], "low": 9.0}, knobs[1]])
    assert_refused(folder, "low=9.0", file="policy.json")


@pytest.mark.parametrize("key", ["knobs", "observations", "hidden", "n_control_steps"])
def test_a_card_without_a_key_is_refused_by_name(folder, key):
    path = folder / "policy.json"
    card = json.loads(path.read_text())
    del card[key]
    path.write_text(json.dumps(card))
    assert_refused(folder, key, file="policy.json")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_weights_are_refused_by_name(folder, bad):
    weights = {**make_policy().weights, "bias_0": np.array([0, 0, bad, 0])}
    reseal(folder, save_tensors(weights))
    assert_refused(folder, "'bias_0' has non-finite values")
    with pytest.raises(PolicyError, match="'bias_0' has non-finite values"):
        make_policy(bias_0=weights["bias_0"])


@pytest.mark.parametrize(
    "change",
    [
        {"weight_0": np.zeros((4, N_SEEN + 1))},
        {"mean": np.zeros(1)},
        {"bias_1": np.zeros((2, 1))},
        {"weight_2": np.zeros((2, 2))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_weights_of_other_shapes_are_refused(folder, change):
    reseal(folder, save_tensors({**make_policy().weights, **change}))
    assert_refused(folder, "must have shapes", str(next(iter(change.values())).shape))


def test_missing_weights_are_refused(folder):
    weights = make_policy().weights
    del weights["bias_1"]
    reseal(folder, save_tensors(weights))
    assert_refused(folder, "must have shapes")


@pytest.mark.parametrize("std", [0.0, -1.0])
def test_a_normaliser_that_cannot_divide_is_refused(std):
    with pytest.raises(PolicyError, match="std"):
        make_policy(std=np.full(N_SEEN, std))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bool])
def test_weights_of_another_type_are_read(folder, dtype):
    weights = {k: torch.ones(v.shape).to(dtype) for k, v in make_policy().weights.items()}
    reseal(folder, save_torch_tensors(weights))
    assert Policy.load(folder).weights["mean"].tolist() == [1.0] * N_SEEN


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_weights_of_a_type_that_numpy_lacks_are_refused(folder, dtype, name):
    weights = {k: torch.ones(v.shape).to(dtype) for k, v in make_policy().weights.items()}
    reseal(folder, save_torch_tensors(weights))
    with pytest.raises(PolicyError, match=rf"weights of type {name}; F32 and F64") as error:
        Policy.load(folder)
    assert str(folder) in str(error.value)


def test_weights_too_large_to_multiply_act_without_a_warning():
    weights = {name: np.full_like(value, 1e308) for name, value in make_policy().weights.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actions = Policy(make_policy().card, weights).act(np.full((2, N_SEEN), -1.0))
    assert actions.shape == make_policy().act(np.zeros((2, N_SEEN))).shape


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("sealed", [False, True], ids=["as it is", "with its checksum"])
def test_a_pickle_in_place_of_the_weights_is_refused_and_not_run(folder, tmp_path, sealed):
    marker = tmp_path / "ran"
    blob = pickle.dumps(Trap(marker))
    pickle.loads(blob).close()
    assert marker.exists()  # the trap works
    marker.unlink()
    (folder / "weights.safetensors").write_bytes(blob)
    if sealed:
        reseal(folder, blob)
    assert_refused(folder, "unreadable weights" if sealed else "damaged")
    assert not marker.exists()


def test_a_pickle_in_place_of_the_card_is_refused_and_not_run(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "policy.json").write_bytes(pickle.dumps(Trap(marker)))
    assert_refused(folder, "not JSON", file="policy.json")
    assert not marker.exists()


def test_a_file_too_large_to_be_a_policy_is_refused(folder):
    with (folder / "weights.safetensors").open("wb") as file:
        file.truncate((64 << 20) + 1)
    assert_refused(folder, "larger than 64 MiB", file="weights.safetensors")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "policy").write_text("{}")
    message = assert_refused(tmp_path / "policy", file="policy.json")
    assert re.search("Not a directory", message)


@pytest.mark.parametrize("name", ["default", "families"])
def test_a_policy_that_ships_is_found_by_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shipped = Policy.load(name)
    folder = find_policy(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 200_000
    assert "dropout" in {knob.name for knob in shipped.card.knobs}
    assert shipped.card.evaluation["n_tasks"] >= 32
    assert "policy" in shipped.card.evaluation["arms"]
    known = r"Unknown policy 'defualt'\. Known: default, families\. Did you mean"
    with pytest.raises(PolicyError, match=known):
        Policy.load("defualt")
    (tmp_path / name).mkdir()  # somebody's own folder of this name comes first
    with pytest.raises(PolicyError, match="No such file"):
        Policy.load(name)


def test_the_shipped_policy_came_from_the_packaged_recipe():
    card = Policy.load("default").card
    recipe = read_config(TrainConfig, find_config("default"), {})
    trained = parse(TrainConfig, card.training["config"], "the card")
    made_by = read_config(SweepConfig, find_config("sweep_default"), {})
    assert replace(trained, seed=0) == recipe
    assert card.members == made_by.mean_of == 1
    assert made_by.recipe == "default" and trained.seed in made_by.space["seed"].grid


def test_the_policy_of_several_families_came_from_its_recipe():
    card = Policy.load("families").card
    recipe = read_config(TrainConfig, find_config("families"), {})
    assert parse(TrainConfig, card.training["config"], "the card") == recipe


def test_a_card_does_not_choose_which_module_is_imported(tmp_path, monkeypatch):
    shipped = Policy.load("default")
    (tmp_path / "bob.py").write_text("from pathlib import Path; Path('it ran').touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    training = json.loads(json.dumps(shipped.card.training))
    training["config"]["environment"] = {"id": "bob:A-v0"}
    hostile = Policy(replace(shipped.card, training=training), shipped.weights)
    hostile.save(tmp_path / "policy")
    for command in ("apply", "evaluate"):
        assert metactl(command, "--policy", "policy", "--run-dir", "run") == 2
    with pytest.raises(PolicyError, match=r"bob:A-v0.*may not choose which code runs"):
        runs_of(hostile, {})
    assert not (tmp_path / "it ran").exists()
    assert deployment(hostile, environment="bob:A-v0")[0] == "bob:A-v0"


def test_what_a_card_says_cannot_write_to_a_terminal():
    said = harmless("knob \x1b[31mred\x1b]0;title\x07\n" + "x" * 9000)
    assert "\x1b" not in said and "\x07" not in said and len(said) < 2100


def test_a_card_that_names_a_knob_or_an_observation_twice_is_refused(folder):
    card = json.loads((folder / "policy.json").read_text())
    edit_card(folder, observations=["signal/0"] * N_SEEN)
    assert_refused(folder, "observations must differ, 'signal/0' is there twice")
    edit_card(folder, observations=card["observations"], knobs=card["knobs"][:1] * 2)
    assert_refused(folder, "knobs must differ, 'a' is there twice")


def test_an_unknown_key_of_the_set_points_is_refused_by_name(folder):
    shipped = json.loads((find_policy("default") / "policy.json").read_text())["set_points"]
    edit_card(folder, set_points={**shipped, "bogus": 1})
    assert_refused(folder, "unknown key 'set_points.bogus'")


def test_complex_weights_are_refused(folder):
    weights = {name: np.asarray(w) for name, w in make_policy().weights.items()}
    blob = save_tensors({**weights, "mean": weights["mean"].astype(np.complex64)})
    reseal(folder, blob)
    assert_refused(folder, "weight 'mean' is not of real numbers")
