"""A Lightning run under a policy: one callback.

python examples/lightning_module.py [default [act|shadow|off]]
"""

import sys

import lightning
import torch
from torch import nn

from metactl.integrations.lightning import MetaControlCallback

CONTEXT, BATCH, STEPS = 32, 8, 120

text = torch.frombuffer(bytearray(open(__file__, "rb").read()), dtype=torch.uint8).long()
rows = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)
training, held_out = rows[:-8], rows[-8:]


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 256))
        self.net = nn.Sequential(nn.Embedding(256, 64), *layers)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.net(tokens)

    def training_step(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


torch.manual_seed(0)
model = Model()
callback = MetaControlCallback(
    sys.argv[1] if len(sys.argv) > 1 else "default",
    mode=sys.argv[2] if len(sys.argv) > 2 else "act",
    probe=lambda: model.training_step(held_out),
    tokens_per_step=BATCH * CONTEXT,
    unique_tokens=training.numel(),
)
trainer = lightning.Trainer(
    max_steps=STEPS,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    callbacks=[callback],
)
trainer.fit(model, torch.utils.data.DataLoader(training, batch_size=BATCH))
print(f"loss {model.eval().training_step(held_out):.6f} dropout {model.net[3].p:.2f}")
