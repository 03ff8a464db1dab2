"""The callback in real Lightning runs of a plain module."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning

from metactl import AttachError, Controller
from metactl.controllers import RandomMoves
from metactl.integrations.lightning import MetaControlCallback

STEPS, N = 12, 6
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice


class Module(lightning.LightningModule):
    def __init__(self, n_optimizers=1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Linear(16, 1))
        self.n_optimizers, self.losses, self.norms = n_optimizers, [], []
        self.automatic_optimization = n_optimizers == 1

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x = batch[0]
        loss = (self(x) - x.sum(1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer):
        gradients = torch.cat([p.grad.flatten() for p in self.parameters()])
        self.norms.append(gradients.norm().item())

    def configure_optimizers(self):
        made = [
            torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
            for _ in range(self.n_optimizers)
        ]
        return made[0] if self.n_optimizers == 1 else made


def loader(repeat=False):
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
    if repeat:
        x = x[:4].repeat(24, 1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)


def train(folder, *callbacks, resume=None, module=None, repeat=False, **changes):
    torch.manual_seed(0)
    module = Module() if module is None else module
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **changes,
    )
    trainer.fit(module, loader(repeat), ckpt_path=resume)
    return trainer, module


def moving(**options):
    logged = []
    controller = Controller(RandomMoves(1), n_control_steps=N, strict=True)
    options = {"example": torch.ones(2, 4), **options}
    callback = MetaControlCallback(controller, log=lambda *entry: logged.append(entry), **options)
    return callback, logged


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def series(logged, tag):
    return [(step, value) for name, value, step in logged if name == tag]


@pytest.mark.parametrize("mode", ["off", "shadow"])
def test_modes_that_do_not_act_leave_the_run_bit_identical(mode, tmp_path):
    _, alone = train(tmp_path)
    callback, _ = moving(mode=mode)
    _, watched = train(tmp_path, callback)
    assert watched.losses == alone.losses
    assert same(watched, alone)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_and_unclipped_norms_are_those_of_the_optimizer_steps(accumulate, tmp_path):
    callback, logged = moving()
    _, module = train(
        tmp_path, callback, accumulate_grad_batches=accumulate, gradient_clip_val=0.01
    )
    assert len({value for _, value in series(logged, "knob/dropout")}) > 2
    seen = series(logged, "train/loss")
    assert [step for step, _ in seen] == [2, 4, 6, 8, 10, 12]
    losses = np.array(module.losses).reshape(N, -1).mean(axis=1)
    np.testing.assert_allclose([value for _, value in seen], losses, rtol=1e-5)
    norms = np.array(module.norms).reshape(N, 2).mean(axis=1)
    norms_seen = [value for _, value in series(logged, "train/gradient_norm")]
    np.testing.assert_allclose(norms_seen, norms, rtol=1e-5)


def test_a_run_resumed_from_lightnings_checkpoint_decides_alike(tmp_path):
    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "five.ckpt")
                self.noise = torch.get_rng_state()

    class Restore(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                torch.set_rng_state(save.noise)  # Lightning leaves it to the user

    save, (first, logged), (second, again) = Save(), moving(), moving()
    # A plain DataLoader begins again on resume: equal batches leave that out of the comparison.
    _, whole = train(tmp_path, first, save, repeat=True)
    checkpoint = tmp_path / "five.ckpt"
    _, cut = train(tmp_path, second, Restore(), repeat=True, resume=checkpoint)
    assert same(cut, whole)
    for tag in ("knob/dropout", "knob/weight_decay", "signal/train_level"):
        tail = [entry for entry in series(logged, tag) if entry[0] > 5]
        assert series(again, tag) == tail
        assert tail


def test_several_optimizers_are_refused_in_words(tmp_path):
    callback, _ = moving()
    with pytest.raises(AttachError, match="a run of one optimizer can be controlled, this has 2"):
        train(tmp_path, callback, module=Module(n_optimizers=2))


def test_another_fit_begins_anew(tmp_path):
    callback, logged = moving()
    train(tmp_path, callback)
    first = list(logged)
    logged.clear()
    _, module = train(tmp_path, callback)
    assert [(tag, step) for tag, _, step in logged] == [(tag, step) for tag, _, step in first]
    assert series(logged, "knob/dropout")[0] == series(first, "knob/dropout")[0]
    optimizer = module.optimizers().optimizer
    assert not optimizer._optimizer_step_pre_hooks  # no factor is left on what is over


def test_batches_that_a_module_skips_are_skipped(tmp_path):
    class Skips(Module):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return None if index % 3 == 1 else loss

        def on_before_optimizer_step(self, optimizer):
            pass  # without a loss there are no gradients

    callback, logged = moving()
    train(tmp_path, callback, module=Skips())
    # Batches 2, 5, 8 and 11 have no loss: what is due there is decided after the next one.
    assert [step for step, _ in series(logged, "train/loss")] == [3, 4, 6, 9, 10, 12]


def test_a_module_that_optimizes_by_hand_is_followed_if_it_returns_its_loss(tmp_path, caplog):
    class ByHand(Module):
        returns = True

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            return loss if self.returns else None

    callback, logged = moving()
    train(tmp_path, callback, module=ByHand())
    assert [step for step, _ in series(logged, "train/loss")] == [2, 4, 6, 8, 10, 12]
    silent = ByHand()
    silent.returns = False
    callback, logged = moving()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metactl.integrations.lightning._PATIENCE", 5)
        train(tmp_path, callback, module=silent)
    assert caplog.text.count("has returned no loss for 5 batches") == 1 and not logged


def test_a_controller_that_was_off_stays_off(tmp_path, caplog):
    callback, logged = moving()
    callback.setup(None, None, "fit")
    off = {"controller": {"version": 1, "mode": "off"}}
    callback.setup = lambda trainer, module, stage: callback.load_state_dict(off)
    train(tmp_path, callback)
    assert "it stays off" in caplog.text and not logged
    assert callback.state_dict() == off


def test_a_module_that_is_compiled_gets_a_few_levels_of_dropout(tmp_path):
    callback, logged = moving(knobs=["dropout"])
    train(tmp_path, callback, module=torch.compile(Module(), backend="eager"))
    seen = {value for _, value in series(logged, "knob/dropout")}
    assert seen and seen <= {0.0, 0.1, 0.2}
