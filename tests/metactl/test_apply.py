"""What applying a policy leaves behind, whatever the run has to give."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_evaluation import resting_policy
from torch import nn
from toy_plant import N_DECISIONS as N
from toy_plant import TOY, ToyPlant

from metactl.apply import apply_policy
from metactl.deployment import deployment, flag_for, for_task
from metactl.policy import Policy
from metactl.shards import ShardRow


class Tied(nn.Module):
    """Input and output share a matrix."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def applied(tmp_path):
    with ShardRow(TOY, 2, {"n_control_steps": N}, 0) as shards:
        policy = resting_policy(shards.describe())
    options = {"n_control_steps": N}
    return apply_policy(policy, TOY, options, tmp_path, n_runs=2, seed=0, compare=False)


@pytest.mark.parametrize(
    ("export", "words"),
    [
        (lambda self, row: float(row), "ToyPlant.export gives no torch module, but float"),
        (lambda self, row: [].missing, None),
    ],
)
def test_runs_without_models_are_reported_all_the_same(export, words, tmp_path, monkeypatch):
    monkeypatch.setattr(ToyPlant, "export", export)
    if words is None:  # a fault of the run's own is no lack of a model
        with pytest.raises(AttributeError):
            applied(tmp_path)
        return
    done = applied(tmp_path)
    assert done.unsaved == words and len(done.results["policy"]) == 2
    assert not list(tmp_path.glob("model-*"))
    assert json.dumps(done.summary)


def test_a_run_that_has_no_export_says_so(tmp_path, monkeypatch):
    monkeypatch.delattr(ToyPlant, "export")
    assert applied(tmp_path).unsaved == "ToyPlant has no model to export"


def test_tied_weights_are_saved_as_what_they_are(tmp_path, monkeypatch):
    model = Tied()
    monkeypatch.setattr(ToyPlant, "export", lambda self, row: model)
    assert applied(tmp_path).unsaved == ""
    saved = load_file(tmp_path / "model-1" / "model.safetensors")
    assert set(saved) == {"embed.weight", "head.weight"}
    assert all(np.array_equal(value, model.embed.weight.detach()) for value in saved.values())
    again = Tied()
    again.load_state_dict(saved)
    assert torch.equal(again.head.weight, model.head.weight)


def test_text_that_a_policy_learned_on_in_any_variant_is_not_unseen(tmp_path):
    policy = Policy.load("default")
    learned, other = tmp_path / "learned.txt", tmp_path / "other.txt"
    for file in (learned, other):
        file.write_text("text")
    recipe = policy.card.training["config"]
    switched = tmp_path / "switched.txt"
    switched.write_text("text")
    variants = [{}, {"data": str(learned.resolve()), "other_data": str(switched.resolve())}]
    environment = {**recipe["environment"], "variants": variants}
    environment["n_workers"] = 2
    training = {**policy.card.training, "config": {**recipe, "environment": environment}}
    policy = Policy(replace(policy.card, training=training), policy.weights)
    files = (learned, other, switched)
    splits = {file: deployment(policy, data=file)[1]["split"] for file in files}
    assert splits == {learned: "meta_test", other: "all", switched: "meta_test"}


def test_a_family_that_makes_its_own_data_takes_no_text_of_the_training(tmp_path):
    policy = Policy.load("default")
    recipe = policy.card.training["config"]
    options = {**recipe["environment"]["options"], "data": str(tmp_path)}
    environment = {**recipe["environment"], "options": options}
    training = {**policy.card.training, "config": {**recipe, "environment": environment}}
    policy = Policy(replace(policy.card, training=training), policy.weights)
    assert deployment(policy)[1]["data"] == str(tmp_path)
    assert "data" not in deployment(policy, {"task": "recall"})[1]


def test_only_our_own_families_are_known_to_make_their_data():
    text = {"data": "a.txt", "other_data": "b.txt", "task": "text", "context": 16}
    recall = for_task("envs:AdaptiveTransformer-v0", text, "recall")
    assert recall == {"task": "recall", "context": 16}
    assert for_task("envs:AdaptiveTransformer-v0", text, "text") == text
    assert for_task("mine:Run-v0", text, "recall") == {**text, "task": "recall"}


def test_a_command_for_somebody_elses_environment_names_it():
    assert flag_for("envs:AdaptiveTransformer-v0") == ""
    assert flag_for("my runs:Run-v0") == "--environment 'my runs:Run-v0' "
