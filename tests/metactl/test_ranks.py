"""Two gloo processes under one controller."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from metactl import AttachError, Controller, Measurement
from metactl.controllers import RandomMoves
from metactl.ranks import Ranks

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from metactl import Controller, FunctionKnob, Knob
from metactl.controllers import RandomMoves

rank, store, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
broken, sharded = kind == "broken", kind.startswith("sharded")
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
if sharded:
    left_out = set(model[2].parameters()) if kind == "sharded in part" else set()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=left_out)
else:
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, foreach=False)
state = {"value": 0.5, "writes": 0}

def write(value):
    state["writes"] += 1
    if broken and rank == 1 and state["writes"] > 5:
        raise OSError("boom")
    state["value"] = value

own = FunctionKnob(
    Knob(name="own", low=0.0, high=1.0, default=0.5), lambda: state["value"], write
)
logged = []
controller = Controller(RandomMoves(rank), n_control_steps=5)  # they would decide differently
controller.attach(
    model, optimizer, total_steps=20, knobs=["dropout", own], example=torch.ones(1, 4),
    log=lambda *entry: logged.append(entry),
)
data = torch.Generator().manual_seed(rank)
losses, values = [], []
for _ in range(20):
    x = torch.randn(8, 4, generator=data)
    optimizer.zero_grad()
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9) if kind == "sharded" else None
    optimizer.step()
    losses.append(loss.item())
    decision = controller.step(loss, gradient_norm=norm)  # of parts a tensor in parts
    if decision is not None:
        values.append(decision.values)
whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
weights, mode = [p.tolist() for p in whole], controller.mode
controller.detach(restore=False)
print(json.dumps({"losses": losses, "values": values, "weights": weights, "mode": mode,
                  "dropout": (model if sharded else model.module)[1].p, "logged": logged}))
sys.stdout.flush()
dist.barrier()
os._exit(0)  # gloo's threads may outlive an interpreter that ends, and abort it
"""


def both(tmp_path: Path, kind: str) -> list[dict]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / f"store-{kind}"), kind],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_all_processes_see_the_mean_and_apply_what_the_first_decides(tmp_path):
    first, second = both(tmp_path, "sound")
    assert first["losses"] != second["losses"]
    assert first["values"] == second["values"]
    assert len(first["values"]) == 4
    assert len({values["dropout"] for values in first["values"]}) > 1
    assert first["dropout"] == second["dropout"] == first["values"][-1]["dropout"]
    assert first["weights"] == second["weights"]
    assert second["logged"] == []
    seen = [value for tag, value, _ in first["logged"] if tag == "train/loss"]
    means = np.array([first["losses"], second["losses"]]).reshape(2, 5, 4).mean(axis=(0, 2))
    assert seen == pytest.approx(means.tolist(), rel=1e-5)


def test_sharded_parameters_are_measured_as_a_whole(tmp_path):
    replicated, _ = both(tmp_path, "sound")
    first, second = both(tmp_path, "sharded")
    assert first["values"] == second["values"] == replicated["values"]
    for ours, theirs in zip(first["weights"], replicated["weights"], strict=True):
        assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    seen, expected = ({(t, s): v for t, v, s in run["logged"]} for run in (first, replicated))
    assert seen.keys() == expected.keys()
    assert {"train/gradient_norm", "train/update_ratio"} <= {tag for tag, _ in seen}
    for key, value in expected.items():
        assert seen[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_parameters_of_which_some_are_sharded_are_measured(tmp_path):
    first, second = both(tmp_path, "sharded in part")
    assert first["mode"] == second["mode"] == "act" and len(first["values"]) == 4
    assert {"train/gradient_norm", "train/update_ratio"} <= {tag for tag, *_ in first["logged"]}


def test_the_first_generation_of_sharding_is_refused_in_words():
    class FullyShardedDataParallel(torch.nn.Linear):
        """By its name."""

    model = FullyShardedDataParallel(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AttachError, match=r"flat pieces.*fully_shard"):
        Controller(RandomMoves(0)).attach(model, optimizer)


def test_a_knob_that_fails_in_one_process_is_off_in_both_and_training_ends(tmp_path):
    first, second = both(tmp_path, "broken")
    assert (first["mode"], second["mode"]) == ("off", "off")
    assert len(first["losses"]) == len(second["losses"]) == 20
    assert first["weights"] == second["weights"]
    assert len(first["values"]) == len(second["values"]) < 4


def test_a_probe_that_is_not_finite_in_one_process_is_not_finite(monkeypatch):
    ranks = Ranks(torch.device("cpu"))
    ranks.n = 2
    other = Measurement(
        train_loss=np.ones(1), probe_loss=np.ones(1), diverged=np.zeros(1, dtype=bool)
    )
    values = [np.nan if v is None else 1.0 for k, v in other.arrays().items() if k != "diverged"]
    monkeypatch.setattr(ranks, "gather", lambda own: np.array([own, values]))
    for loss, expected in ((3.0, 2.0), (np.nan, np.inf), (np.inf, np.inf)):
        found = ranks.mean(
            Measurement(
                train_loss=np.ones(1), probe_loss=np.array([loss]), diverged=np.zeros(1, dtype=bool)
            )
        )
        assert found.probe_loss.tolist() == [expected]
