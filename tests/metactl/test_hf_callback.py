"""The callback in real Hugging Face Trainers on small random models."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch.utils.tensorboard import SummaryWriter

from metactl import AttachError, Controller
from metactl.controllers import RandomMoves
from metactl.integrations.hf import MetaControlCallback

STEPS, N = 12, 6
SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=32),
    "mistral": transformers.MistralConfig(**SMALL, intermediate_size=32, num_key_value_heads=1),
    "gpt2": transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=32, rotary_pct=1.0),
}


class Remember(transformers.TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append((state.global_step, logs["loss"]))


def data(n=64):
    rng = np.random.default_rng(0)
    rows = [torch.from_numpy(rng.integers(32, size=12)) for _ in range(n)]
    return [{"input_ids": row, "labels": row} for row in rows]


def train(folder, family="llama", callback=None, resume=None, model=None, **changes):
    transformers.set_seed(0)
    if model is None:
        config = type(FAMILIES[family])(**FAMILIES[family].to_dict())
        model = transformers.AutoModelForCausalLM.from_config(config)
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 5,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        "dataloader_pin_memory": False,
    }
    remember = Remember()
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(str(folder), **{**options, **changes}),
        train_dataset=data(),
        eval_dataset=data(8),
        callbacks=[remember, *([callback] if callback else [])],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, remember.losses


def moving(**options):
    logged = []
    controller = Controller(RandomMoves(1), n_control_steps=N, strict=True)
    callback = MetaControlCallback(controller, log=lambda *entry: logged.append(entry), **options)
    return callback, logged


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def series(logged, tag):
    return [(step, value) for name, value, step in logged if name == tag]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 5}, "total_steps is the trainer's: leave it out"),
        ({"mdoe": "act"}, "Unknown option 'mdoe'.*Did you mean 'mode'"),
        ({"mode": "shadwo"}, "Unknown mode 'shadwo'"),
        ({"probe": 2.0}, "probe must be a function"),
    ],
)
def test_wrong_options_are_refused_before_there_is_a_trainer(options, message):
    with pytest.raises(AttachError, match=message):
        MetaControlCallback("default", **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_knobs_move_and_shadow_leaves_the_run_bit_identical(family, tmp_path):
    alone, losses = train(tmp_path, family)
    acting, logged = moving()
    acted, _ = train(tmp_path, family, acting)
    assert [step for step, _ in series(logged, "probe/loss")] == []
    dropouts = {value for _, value in series(logged, "knob/dropout")}
    assert len(dropouts) > 2
    assert len({value for _, value in series(logged, "knob/rope_base")}) > 2 or family == "gpt2"
    assert not same(weights(acted), weights(alone))
    for mode in ("shadow", "off"):
        watching, _ = moving(mode=mode)
        watched, seen = train(tmp_path, family, watching)
        assert seen == losses
        assert same(weights(watched), weights(alone))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_is_that_of_the_optimizer_steps(accumulate, tmp_path):
    callback, logged = moving(mode="shadow")
    _, losses = train(tmp_path, callback=callback, gradient_accumulation_steps=accumulate)
    expected = np.array([loss for _, loss in losses]).reshape(N, 2).mean(axis=1)
    seen = series(logged, "train/loss")
    assert [step for step, _ in seen] == [2, 4, 6, 8, 10, 12]
    np.testing.assert_allclose([value for _, value in seen], expected, rtol=1e-4)


def test_a_run_resumed_from_the_trainers_checkpoint_is_bit_identical(tmp_path):
    callback, logged = moving()
    whole, _ = train(tmp_path / "whole", callback=callback)
    saving = {"save_strategy": "steps", "save_steps": 5}
    first, _ = moving()
    train(tmp_path / "cut", callback=first, **saving)
    second, again = moving()
    cut, _ = train(
        tmp_path / "cut", callback=second, resume=str(tmp_path / "cut" / "checkpoint-5"), **saving
    )
    assert same(weights(cut), weights(whole))
    for tag in ("knob/dropout", "knob/weight_decay", "signal/train_level"):
        tail = [entry for entry in series(logged, tag) if entry[0] > 5]
        assert series(again, tag) == tail
        assert tail


def test_a_run_begun_without_the_callback_is_controlled_over_what_is_left(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6}
    train(tmp_path, **saving)
    callback, logged = moving()
    train(tmp_path, callback=callback, resume=str(tmp_path / "checkpoint-6"), **saving)
    assert [step for step, _ in series(logged, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert series(logged, "signal/progress")[-1][1] == 1.0


def test_two_callbacks_are_refused_in_words(tmp_path):
    first, _ = moving()
    second, _ = moving()
    config = transformers.LlamaConfig(**SMALL, intermediate_size=32)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = transformers.Trainer(
        model=transformers.LlamaForCausalLM(config),
        args=arguments,
        train_dataset=data(),
        callbacks=[first, second],
    )
    with pytest.raises(AttachError, match="can have one MetaControlCallback"):
        trainer.train()


def test_a_nan_that_the_trainer_filters_out_of_its_log_is_seen(tmp_path):
    class Breaks(transformers.LlamaForCausalLM):
        calls = 0

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if self.training and output.loss is not None:
                self.calls += 1
                if self.calls == 7:
                    output.loss = output.loss * float("nan")
            return output

    transformers.set_seed(0)
    model = Breaks(transformers.LlamaConfig(**SMALL, intermediate_size=32))
    callback, logged = moving(mode="shadow")
    options = {"learning_rate": 0.0, "max_grad_norm": 0.0, "remove_unused_columns": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, losses = train(tmp_path, model=model, callback=callback, **options)
    assert all(np.isfinite(loss) for _, loss in losses)  # what the Trainer tells
    seen = dict(series(logged, "train/loss"))
    assert np.isnan(seen[8])


def test_a_loss_computed_outside_the_model_switches_off_with_one_warning(tmp_path, caplog):
    callback, _ = moving()
    trained, _ = train(tmp_path, callback=callback, label_smoothing_factor=0.1)
    assert "the model returned no loss" in caplog.text
    assert callback.controller.mode == "off"
    assert trained.model.config.attention_dropout == 0.0


def test_restoring_by_the_trainers_own_switch_is_refused_in_words():
    with pytest.raises(AttachError, match="leave the Trainer's argument"):
        MetaControlCallback.from_state({})


def test_a_share_of_all_processes_items_counts_as_the_whole():
    class Ear:
        mode = "act"

        def attach(self, model, optimizer, **options):
            pass

        def detach(self):
            pass

        def step(self, loss):
            self.heard = float(loss)

    told = {"model": torch.nn.Linear(1, 1), "optimizer": None}
    state = transformers.TrainerState(max_steps=4, stateful_callbacks={})
    for processes, averaged, expected in ((1, True, 3.0), (4, True, 12.0), (4, False, 3.0)):
        callback = MetaControlCallback(Controller(RandomMoves(1), n_control_steps=N))
        callback.controller = Ear()
        args = SimpleNamespace(
            torch_compile=False,
            n_gpu=0,
            world_size=processes,
            average_tokens_across_devices=averaged,
        )
        callback._saved_in = lambda state: None
        callback.on_train_begin(args, state, None, **told)
        for loss in (1.0, 2.0):
            output = SimpleNamespace(loss=torch.tensor(loss))
            callback.note(told["model"], (), {"num_items_in_batch": 7}, output)
        callback.on_step_end(args, state, None)
        assert callback.controller.heard == expected


def test_copies_on_several_gpus_are_refused_in_words():
    callback, _ = moving()
    with pytest.raises(AttachError, match=r"2 GPUs by nn.DataParallel.*torchrun"):
        callback.on_train_begin(SimpleNamespace(n_gpu=2), transformers.TrainerState(), None)


def test_the_best_model_is_given_back_with_its_own_knobs(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "eval_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    options = {"knobs": ["rope_base"], "example": torch.arange(12)[None]}
    for greater in (False, True):  # the best by either measure: one of them is not the last
        callback, _ = moving(**options)
        folder = tmp_path / str(greater)
        trainer, _ = train(folder, callback=callback, greater_is_better=greater, **saving, **best)
        seen = trainer.state
        assert trainer.evaluate()["eval_loss"] == pytest.approx(seen.best_metric, abs=1e-7)
        if seen.best_global_step != STEPS:
            break
    else:
        pytest.fail("the last checkpoint was the best by both measures")


def test_a_training_that_is_extended_goes_on(tmp_path, caplog):
    first, _ = moving()
    train(tmp_path, callback=first, save_strategy="steps", save_steps=STEPS)
    second, _ = moving()
    resume = str(tmp_path / f"checkpoint-{STEPS}")
    train(tmp_path, callback=second, resume=resume, max_steps=2 * STEPS)
    assert f"was to have {STEPS} optimizer steps" in caplog.text
    assert second._saved["meter"]["steps"] == 2 * STEPS


def test_a_training_of_one_step_and_one_that_begins_again_are_no_mistakes(tmp_path, caplog):
    callback, logged = moving()
    train(tmp_path, callback=callback, max_steps=1)
    assert "leaves nothing to decide" in caplog.text and not logged

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4 and not stopped:
                stopped.append(state.global_step)
                raise KeyboardInterrupt

    stopped = []
    trainer, _ = train(tmp_path, callback=callback, max_steps=2)
    trainer.args.max_steps = STEPS
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert callback._saved["meter"]["steps"] == STEPS


@pytest.mark.parametrize("kind", [dict, tuple])
def test_a_model_that_returns_no_object_is_heard(kind, tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"])

        def forward(self, input_ids, labels=None):
            found = self.inner(input_ids=input_ids, labels=labels)
            named = {"loss": found.loss, "logits": found.logits}
            return named if kind is dict else tuple(v for v in named.values() if v is not None)

    callback, logged = moving(knobs=["learning_rate_multiplier"], example=torch.arange(12)[None])
    train(tmp_path, model=Plain(), callback=callback, eval_strategy="no")
    assert callback._saved["mode"] == "act"
    assert [value for tag, value, _ in logged if tag == "train/loss"]


def test_a_controller_that_was_off_stays_off_and_its_checkpoints_say_so(tmp_path, caplog):
    first, _ = moving()
    saved = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, callback=first, label_smoothing_factor=0.1, **saved)  # which switches it off
    second, logged = moving()
    trainer, _ = train(tmp_path, callback=second, resume=str(tmp_path / "checkpoint-4"), **saved)
    assert "it stays off" in caplog.text and second.controller.mode == "off"
    assert not logged
    kept = trainer.state.stateful_callbacks["MetaControlCallback"]["attributes"]["saved"]
    assert kept["mode"] == "off"


def test_a_best_model_from_before_the_controller_has_no_knobs_to_go_back_to(tmp_path, caplog):
    callback, _ = moving()
    (tmp_path / "best").mkdir()
    state = transformers.TrainerState(stateful_callbacks={"MetaControlCallback": {}})
    state.stateful_callbacks["MetaControlCallback"] = {"attributes": {"saved": None}}
    state.save_to_json(str(tmp_path / "best" / "trainer_state.json"))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))
    optimizer = torch.optim.SGD(model.parameters())
    callback.controller.attach(model, optimizer, total_steps=10, example=torch.ones(1, 2))
    callback._return_to(tmp_path / "best")
    assert "the best model's knobs cannot be read" in caplog.text


@pytest.mark.filterwarnings("ignore::UserWarning")  # dynamo's, of what it traces
def test_a_model_that_the_trainer_compiles_gets_a_few_levels_of_dropout(tmp_path):
    callback, logged = moving(knobs=["dropout"])
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    train(tmp_path, callback=callback, eval_strategy="no", **compiled)
    seen = {value for _, value in series(logged, "knob/dropout")}
    assert len(seen) > 1 and seen <= {0.0, 0.15, 0.3}


def test_a_controlled_model_may_be_copied_while_it_trains(tmp_path):
    class Average(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))

    average, writer = Average(), SummaryWriter(tmp_path / "tb")
    callback = MetaControlCallback(Controller(RandomMoves(1), n_control_steps=N), log=writer)
    trainer, _ = train(tmp_path / "run", callback=callback)
    trainer.add_callback(average)
    trainer.train()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        wanted = trainer.model.eval()(tokens).logits
        assert torch.equal(average.copied.eval()(tokens).logits, wanted)
    assert not callback._losses  # the copy told it nothing
