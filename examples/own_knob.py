"""A knob of one's own: label smoothing, moved by a rule of one's own.

python examples/own_knob.py
"""

import numpy as np
import torch
from torch import nn

import metactl
from metactl.controllers import BaseController

settings = {"smoothing": 0.1}
smoothing = metactl.FunctionKnob(
    metactl.Knob(name="label_smoothing", low=0.0, high=0.3, default=0.1),
    read=lambda: settings["smoothing"],
    write=lambda value: settings.update(smoothing=value),
)


class Smoother(BaseController):
    """More smoothing while the held-out loss is above its best, less while it falls."""

    def act(self, observation: np.ndarray) -> np.ndarray:
        above_best = self.codec.read(observation, "signal/best_distance") > 0.01
        return np.where(above_best, 0.5, -0.5)[:, None]


torch.manual_seed(0)
model = nn.Linear(20, 5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
teacher = torch.randn(20, 5)
data = torch.randn(64, 20)
labels = (data @ teacher + 3 * torch.randn(64, 5)).argmax(1)  # noisy: it will overfit
held_out = torch.randn(64, 20)
held_out_labels = (held_out @ teacher).argmax(1)

controller = metactl.Controller(Smoother(), n_control_steps=20)
controller.attach(
    model,
    optimizer,
    total_steps=400,
    probe=lambda: nn.functional.cross_entropy(model(held_out), held_out_labels),
    knobs=[smoothing],
)
for _ in range(400):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(data), labels, label_smoothing=settings["smoothing"])
    loss.backward()
    optimizer.step()
    decision = controller.step(loss=loss)
    if decision is not None:
        print(f"step {decision.step}: smoothing {decision.values['label_smoothing']:.3f}")
