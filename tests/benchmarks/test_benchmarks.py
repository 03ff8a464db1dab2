"""Benchmarks that reach deep into the models, at their smallest: what they call is still there."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import single
from benchmarks.provenance import write
from benchmarks.rotation.jobs import train_arm


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
