"""Two gloo processes under one controller."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from torch import nn
from metactl import Controller, FunctionKnob, Knob
from metactl.controllers import RandomMoves

rank, store, broken = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "broken"
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(
    nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
state = {"value": 0.5, "writes": 0}

def write(value):
    state["writes"] += 1
    if broken and rank == 1 and state["writes"] > 3:
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
    optimizer.step()
    losses.append(loss.item())
    decision = controller.step(loss)
    if decision is not None:
        values.append(decision.values)
weights, mode = [p.tolist() for p in model.parameters()], controller.mode
controller.detach(restore=False)
print(json.dumps({"losses": losses, "values": values, "weights": weights, "mode": mode,
                  "dropout": model.module[1].p, "logged": logged}), flush=True)
dist.barrier()
del model
dist.destroy_process_group()  # else gloo's threads may outlive the interpreter and abort it
"""


def both(tmp_path: Path, kind: str) -> list[dict]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "store"), kind],
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


def test_a_knob_that_fails_in_one_process_is_off_in_both_and_training_ends(tmp_path):
    first, second = both(tmp_path, "broken")
    assert (first["mode"], second["mode"]) == ("off", "off")
    assert len(first["losses"]) == len(second["losses"]) == 20
    assert first["weights"] == second["weights"]
    assert len(first["values"]) == len(second["values"]) < 4
