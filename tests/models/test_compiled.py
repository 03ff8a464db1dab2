"""`torch.compile` of one model in sliced execution: the same numbers, and few programs."""

import json
import subprocess
import sys

COMPILED = """
import json, torch
from models import AdaptiveTransformer, Noise, TransformerConfig, cross_entropy
from torch._dynamo.utils import counters
moves = {
    "rope_base": (500.0, 3_000.0, 20_000.0),
    "dropout": (0.05, 0.2, 0.3),
    "attention_span": (60.0, 45.0, 30.0, 29.5, 20.0, 8.0, 6.0, 25.0, 50.0),
    "embedding_width": (0.25, 0.5, 0.75, 1.0),
}
def live():
    model = AdaptiveTransformer(TransformerConfig(context=64, d_model=32), dtype=torch.float64)
    model.initialise([0], [0])
    model.set_knobs({"dropout": 0.1})
    model.reserve_noise(128)
    return model
def loss(model):
    return cross_entropy(model(tokens[..., :-1], Noise(seed, seed)), tokens[..., 1:]).sum()
tokens, seed = torch.randint(256, (1, 2, 65)), torch.zeros(1, dtype=torch.long)
models = live(), live()
compiled = torch.compile(lambda: loss(models[1]), backend="aot_eager", fullgraph=True)
def apart():
    sides = [
        (value, *torch.autograd.grad(value, list(model.parameters()), allow_unused=True))
        for model, value in zip(models, (loss(models[0]), compiled()))
    ]
    return max(float((a - b).detach().abs().max()) for a, b in zip(*sides) if a is not None)
found = {"start": [apart(), 0]}
for name, values in moves.items():
    before, worst = counters["stats"]["unique_graphs"], 0.0
    for value in values:
        for model in models:
            model.set_knobs({name: value})
            model.knobs.settle_gates([0])
        worst = max(worst, apart())
    found[name] = [worst, counters["stats"]["unique_graphs"] - before]
    for model in models:
        model.set_knobs({"attention_span": 64.0})
print(json.dumps(found))
"""  # in a process of its own: torch.compile cannot look into the tests' checks of shapes


def test_knobs_move_under_torch_compile_with_the_same_results_and_few_programs():
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    apart, n_graphs = ({name: each[i] for name, each in found.items()} for i in (0, 1))
    assert max(apart.values()) < 1e-9
    assert n_graphs["rope_base"] == n_graphs["dropout"] == 0
    assert n_graphs["attention_span"] <= 4  # reach up to 16, 32, 64 and 128 tokens
    assert n_graphs["embedding_width"] == 3  # the full width is there already
