"""A plain training loop under a policy.

python examples/plain_pytorch.py [default [act|shadow|off]]
"""

import sys

import torch
from torch import nn

import metactl

STEPS, CONTEXT, BATCH = 200, 32, 16

text = torch.frombuffer(bytearray(open(__file__, "rb").read() * 4), dtype=torch.uint8).long()
split = len(text) * 3 // 4
training, held_out = text[:split], text[split:]


def batch(data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=generator)
    return torch.stack([data[i : i + CONTEXT + 1] for i in starts])


def loss_on(tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


torch.manual_seed(0)
model = nn.Sequential(
    nn.Embedding(256, 64), nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 256)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
probe_batch = batch(held_out, torch.Generator().manual_seed(1))

controller = metactl.Controller.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "default")
controller.attach(
    model,
    optimizer,
    total_steps=STEPS,
    probe=lambda: loss_on(probe_batch),
    tokens_per_step=BATCH * CONTEXT,
    unique_tokens=split,
    mode=sys.argv[2] if len(sys.argv) > 2 else "act",
)
generator = torch.Generator().manual_seed(2)
for _ in range(STEPS):
    optimizer.zero_grad()
    loss = loss_on(batch(training, generator))
    loss.backward()
    optimizer.step()
    decision = controller.step(loss=loss)
    if decision is not None and decision.step % 50 == 0:
        print(f"step {decision.step}: dropout {decision.values['dropout']:.2f} {decision.reason}")
print(f"loss {loss.item():.6f}")
