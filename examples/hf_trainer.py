"""A Hugging Face Trainer under a policy: one callback.

python examples/hf_trainer.py [default [act|shadow|off]]
"""

import sys
import tempfile

import torch
import transformers

from metactl.integrations.hf import MetaControlCallback

CONTEXT, BATCH, STEPS = 32, 8, 60

text = torch.frombuffer(bytearray(open(__file__, "rb").read()), dtype=torch.uint8).long()
rows = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)
examples = [{"input_ids": row, "labels": row} for row in rows]
training, held_out = examples[:-8], rows[-8:]

transformers.set_seed(0)
model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
)
callback = MetaControlCallback(
    sys.argv[1] if len(sys.argv) > 1 else "default",
    mode=sys.argv[2] if len(sys.argv) > 2 else "act",
    probe=lambda: model(held_out, labels=held_out).loss,
    tokens_per_step=BATCH * CONTEXT,
    unique_tokens=len(training) * CONTEXT,
)
with tempfile.TemporaryDirectory() as folder:
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=training, callbacks=[callback])
    result = trainer.train()
print(f"loss {result.training_loss:.6f} dropout {model.config.attention_dropout:.2f}")
