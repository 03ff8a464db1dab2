"""Knob adapters on other people's models."""

import contextlib
import copy
import random
from collections import defaultdict, deque

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, GROUPED, WITH_ROPE, build, output
from torch import nn

from metactl import AttachError, Controller, FunctionKnob, Knob
from metactl.adapters import find_adapters
from metactl.adapters.dropout import DropoutKnob
from metactl.adapters.optimizer import LearningRateKnob, WeightDecayKnob
from metactl.adapters.rope import RopeBaseKnob
from metactl.adapters.trial import make_trial, sealed
from metactl.controllers import Static


class Caching(nn.Module):
    """Remembers tables as libraries do: how long, in an attribute; what, in a buffer or not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.register_buffer("table", torch.zeros(0, 8), persistent=False)
        self.length, self.plain, self.seen = 0, torch.zeros(0, 8), []
        self.counter, self.noise = torch.zeros(1), torch.Generator().manual_seed(3)

    def forward(self, tokens):
        n = tokens.shape[1]
        if n > self.length:
            angle = torch.arange(n)[:, None] / torch.arange(1, 9)
            self.table, self.plain, self.length = angle.sin(), angle.cos(), n
        self.counter += 1
        self.seen.append(n)
        self.latest = tokens
        x = self.embed(tokens) + self.table[:n] * self.plain[:n]
        return x + 0.1 * torch.randn(x.shape, generator=self.noise)


def test_what_modules_remember_by_themselves_is_as_it_was_after_a_trial():
    model, other = Caching(), Caching()
    other.load_state_dict(model.state_dict())
    tokens = torch.arange(6)[None]
    with sealed(model, training=False):
        model(torch.arange(9)[None])
    assert (model.length, model.counter.item(), model.seen) == (0, 0, [])
    assert not hasattr(model, "latest")
    assert torch.equal(model(tokens), other(tokens))  # with the same noise of its own
    with sealed(model):
        model(torch.arange(9)[None])
    assert (model.length, model.counter.item(), model.seen) == (6, 1, [6])
    assert torch.equal(model(tokens), other(tokens))


class Merging(nn.Linear):
    """Merges a change of its weights in evaluation mode, as adapters of low rank do."""

    def __init__(self):
        super().__init__(4, 4)
        self.merged, self.change = False, nn.Parameter(torch.ones(4, 4))

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.change if mode else self.change
            self.merged = not mode
        return self

    def forward(self, x):
        return nn.functional.linear(x, self.weight + (not self.merged) * self.change, self.bias)


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_that_a_mode_merges_are_merged_as_they_say(frozen):
    model = nn.Sequential(Merging(), Merging()).train()
    if frozen:
        model[1].eval()
    x = torch.ones(2, 4)
    before = model(x)
    with sealed(model, training=False):
        model(x)
    torch.testing.assert_close(model(x), before)


def test_what_cannot_be_copied_is_left_alone_and_all_else_is_put_back():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.adjacency = torch.eye(4).to_sparse()
            self.meta, self.empty = torch.empty(3, device="meta"), torch.zeros(0)
            self.large = [0] * 5000
            self.queue, self.tables = deque([1]), defaultdict(list, a=[torch.zeros(2)])
            self.numpy, self.python = np.random.default_rng(0), random.Random(0)

        def forward(self):
            self.queue.append(2)
            self.tables["a"][0] += 1
            self.tables["b"].append(3)
            return self.numpy.random(), self.python.random()

    model = Odd()
    with sealed(model):
        drawn = model()
    assert list(model.queue) == [1] and list(model.tables) == ["a"]
    assert model.tables["a"][0].tolist() == [0, 0]
    assert model() == drawn


def test_of_modules_whose_class_torch_made_from_the_users_attributes_are_put_back():
    class Counting(nn.Linear):
        seen = 0

        def forward(self, x):
            self.seen += 1
            return super().forward(x)

    model = nn.utils.parametrize.register_parametrization(Counting(2, 2), "weight", nn.Identity())
    with sealed(model):
        model(torch.ones(1, 2))
    assert model.seen == 0


def test_a_shadow_leaves_rotary_embedding_torch_its_cache():
    from rotary_embedding_torch import RotaryEmbedding

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rotary = nn.Embedding(11, 16), RotaryEmbedding(dim=8)
            self.drop, self.out = nn.Dropout(0.1), nn.Linear(16, 11)

        def forward(self, tokens):
            x = self.embed(tokens).unflatten(-1, (2, 8)).transpose(1, 2)
            q = self.rotary.rotate_queries_or_keys(x)
            y = nn.functional.scaled_dot_product_attention(q, q, x, is_causal=True)
            return self.out(self.drop(y.transpose(1, 2).flatten(2)))

    torch.manual_seed(0)
    model = Attention()
    alone, tokens = copy.deepcopy(model), torch.arange(8)[None]
    optimizer = torch.optim.AdamW(model.parameters())
    controller = Controller(Static())
    controller.attach(
        model,
        optimizer,
        total_steps=80,
        mode="shadow",
        probe=lambda: model(torch.arange(10)[None]).square().mean() + 1,
    )
    assert torch.equal(model.eval()(tokens), alone.eval()(tokens))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_knob_moves_the_model_and_comes_back_bit_for_bit(family, attention):
    model = build(family, attention)
    optimizer = torch.optim.AdamW(model.parameters())
    before = {mode: output(model, mode) for mode in (True, False)}
    config = model.config.to_dict()
    names = ["rope_base", "dropout"] if family in WITH_ROPE else ["dropout"]
    found, missing = find_adapters(names, model, optimizer)
    assert missing == {}
    for adapter in found:
        start, far = adapter.read(), adapter.far()
        adapter.write(far)
        assert adapter.read() == pytest.approx(far)
        assert far != start
        assert not torch.equal(output(model, True), before[True])
        adapter.restore()
        assert torch.equal(output(model, True), before[True])
        assert torch.equal(output(model), before[False])
    assert model.config.to_dict() == config


@pytest.mark.parametrize("family", WITH_ROPE)
def test_a_saved_checkpoint_carries_the_values_in_force(family, tmp_path):
    model = build(family)
    rope = RopeBaseKnob(model, make_trial(model))
    dropout = DropoutKnob(model, make_trial(model))
    rope.write(123.0)
    dropout.write(0.25)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert RopeBaseKnob(again, make_trial(again)).read() == 123.0
    assert DropoutKnob(again, make_trial(again)).read() == 0.25
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_scaled_rotary_embeddings_move_too(kind):
    config = copy.deepcopy(FAMILIES["llama"])
    config.rope_parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    model = transformers.LlamaForCausalLM(config)
    expected = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **GROUPED, rope_parameters={**config.rope_parameters, "rope_theta": 50.0}
        )
    )
    expected.load_state_dict(model.state_dict())
    adapter = RopeBaseKnob(model, make_trial(model))
    adapter.verify()
    adapter.write(50.0)
    assert torch.equal(output(model), output(expected))


def test_a_dynamic_embedding_that_grew_meanwhile_comes_back():
    config = copy.deepcopy(FAMILIES["llama"])
    config.max_position_embeddings = 16
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model, plain = (transformers.LlamaForCausalLM(copy.deepcopy(config)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    adapter = RopeBaseKnob(model, make_trial(model))
    adapter.write(100.0)
    long = torch.arange(40)[None] % 32
    with torch.no_grad():
        for each in (model, plain):
            each.eval()(long)  # new buffers, stretched
        assert not torch.equal(model(long).logits, plain(long).logits)
        adapter.write(200.0)
        adapter.restore()
        assert torch.equal(model(long).logits, plain(long).logits)
        short = long[:, :8]
        assert torch.equal(model(short).logits, plain(short).logits)


def test_dropout_probabilities_keep_their_proportions():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Dropout(0.2), nn.Dropout(0.1), nn.MultiheadAttention(4, 2, dropout=0.0)
    )
    adapter = DropoutKnob(model, make_trial(model, torch.ones(2, 4)))
    adapter.write(0.4)
    assert (model[1].p, model[2].p, model[3].dropout) == (0.4, 0.2, 0.0)
    adapter.restore()
    assert (model[1].p, model[2].p, model[3].dropout) == (0.2, 0.1, 0.0)


@pytest.mark.parametrize("default", [0.0, 0.1, 0.5, 0.6, 0.9, 1.0])
def test_compiled_levels_never_drop_more_than_anybody_asked_for(default):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(default))
    compiled = torch.compile(model, backend="aot_eager")
    levels = DropoutKnob(compiled, make_trial(model, torch.ones(2, 4))).knob.levels
    assert default in levels
    assert len(levels) == 3
    assert max(levels) <= max(0.6, default)


def test_dropout_that_the_forward_pass_never_reaches_is_no_silent_no_op():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.out = nn.Dropout(0.1), nn.Linear(2, 2)

        def forward(self, x):
            return self.out(x)

    model = Unused()
    optimizer = torch.optim.SGD(model.parameters())
    found, missing = find_adapters(["dropout"], model, optimizer, torch.ones(1, 2))
    assert found == []
    assert missing == {"dropout": "moving it does not change the model's output"}


def test_moving_under_compile_stays_below_the_recompilation_limit():
    torch._dynamo.reset()
    model = build("llama", "sdpa")
    compiled = torch.compile(model, backend="aot_eager")
    trial = make_trial(compiled)
    dropout, rope = DropoutKnob(compiled, trial), RopeBaseKnob(compiled, trial)
    assert dropout.knob.scale == "levels"
    tokens = torch.arange(16)[None]
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            for level in dropout.knob.levels:
                for base in (10.0, 1e3, 1e5):
                    dropout.write(level)
                    rope.write(base)
                    compiled(tokens).logits.sum().backward()
                    trial(False)
    assert len(dropout.knob.levels) <= 3


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_optimizer_knobs_work_on_any_optimizer_with_several_groups(optimizer):
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [
        {"params": a.parameters(), "weight_decay": 0.1},
        {"params": b.parameters(), "weight_decay": 0.0, "lr": 0.5},
    ]
    made = optimizer(groups, lr=0.1)
    model = nn.Sequential(a, b)
    names = ["learning_rate_multiplier", "weight_decay"]
    (rate, decay), missing = find_adapters(names, model, made)
    assert missing == {}
    decay.write(0.5)
    assert [group["weight_decay"] for group in made.param_groups] == [0.5, 0.0]
    rate.write(0.25)
    model(torch.ones(1, 2)).sum().backward()
    made.step()
    assert [group["lr"] for group in made.param_groups] == [0.1, 0.5]
    decay.restore()
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]


def test_the_multiplier_is_that_of_the_learning_rate_exactly():
    def trained(rate, factor):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        (knob,), _ = find_adapters(["learning_rate_multiplier"], model, optimizer)
        knob.write(factor)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return model.weight

    assert torch.equal(trained(0.5, 1.0), trained(0.25, 2.0))


def test_no_weight_decay_is_nothing_to_move():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, missing = find_adapters(["weight_decay"], model, optimizer)
    assert missing == {"weight_decay": "no group of the optimizer has a weight decay above 0"}
    with pytest.raises(AttachError, match="Unknown knob 'weigth_decay'"):
        find_adapters(["weigth_decay"], model, optimizer)


def test_what_happens_sealed_leaves_no_trace():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[1].eval()
    state, noise = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with sealed(model, training=True):
        assert model[1].training
        assert not model(torch.rand(4, 3)).requires_grad
    assert torch.equal(torch.get_rng_state(), noise)
    assert (model[0].training, model[1].training) == (True, False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


class Interrupted(torch.optim.SGD):
    fails = False

    def step(self, closure=None):
        if self.fails:
            raise RuntimeError("out of memory")
        return super().step(closure)


def test_a_step_that_raised_does_not_leave_the_rate_multiplied():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = Interrupted([weight], lr=0.5)
    LearningRateKnob(optimizer).write(2.0)
    weight.grad = torch.ones(1)
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    assert weight.item() == -1.0
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_scheduler_goes_on_past_a_step_that_raised_as_it_would_alone(factor):
    def rates(controlled):
        weight = nn.Parameter(torch.zeros(1))
        weight.grad = torch.ones(1)
        optimizer = Interrupted([weight], lr=1.0)
        adapter = LearningRateKnob(optimizer) if controlled else None
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # wraps the step
        if adapter is not None:
            adapter.write(factor)
        seen = []
        for i in range(4):
            optimizer.fails = i == 1
            with contextlib.suppress(RuntimeError):
                optimizer.step()
            schedule.step()
            seen.append(optimizer.param_groups[0]["lr"])
        if adapter is not None:
            adapter.restore()
            adapter.close()
        optimizer.step()
        return seen, weight.item()

    alone, _ = rates(controlled=False)
    seen, weight = rates(controlled=True)
    assert seen == alone == [0.5, 0.25, 0.125, 0.0625]
    assert weight == -factor * (1 + 0.25 + 0.125) - 0.0625


def test_an_optimizer_that_was_let_go_has_its_own_step():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    adapter = LearningRateKnob(optimizer)
    assert "step" in optimizer.__dict__
    adapter.close()
    assert "step" not in optimizer.__dict__


def test_buffers_that_a_forward_pass_assigns_anew_come_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            self.register_buffer("late", x)
            return x

    model = Counts()
    held = model.count
    with sealed(model, training=True):
        model(torch.ones(1))
    assert model.count is held and held == 0
    assert not hasattr(model, "late")


def test_a_function_knob_that_reads_a_live_tensor_is_put_back():
    live = torch.tensor(1.0)
    knob = Knob(name="temperature", low=0.5, high=2.0, default=1.0)
    adapter = FunctionKnob(knob, lambda: live, lambda value: live.fill_(value))
    adapter.verify()
    assert live == 1.0
    adapter.write(1.5)
    adapter.restore()
    assert live == 1.0


def test_a_model_inside_another_has_all_its_knobs_and_its_config_follows():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids)

    model = build("llama")
    wrapper = Wrapper(model)
    optimizer = torch.optim.AdamW(wrapper.parameters())
    names = ["rope_base", "dropout", "attention_span"]
    found, missing = find_adapters(names, wrapper, optimizer, torch.arange(16)[None])
    assert missing == {}
    for adapter, value in zip(found, (123.0, 0.25, 5.0), strict=True):
        adapter.write(value)
    config = model.config
    assert config.rope_parameters["rope_theta"] == 123.0
    assert (config.attention_dropout, config.attention_span) == (0.25, 5.0)


def test_knobs_that_are_no_list_are_refused_in_words():
    model = nn.Sequential(nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters())
    for wanted in ("dropout", 3):
        with pytest.raises(AttachError, match="knobs must be a list of names and adapters"):
            find_adapters(wanted, model, optimizer)


def _multiplied(factor):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    LearningRateKnob(optimizer).write(factor)
    weight.grad = torch.ones(1)
    return weight, optimizer


@pytest.mark.parametrize("named", [True, False])
def test_a_closure_sees_and_sets_the_owners_rate(named):
    weight, optimizer = _multiplied(4.0)
    schedule, seen = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), []

    def closure():
        seen.append(optimizer.param_groups[0]["lr"])
        schedule.step()
        return 3.0

    loss = optimizer.step(closure=closure) if named else optimizer.step(closure)
    assert (loss, seen, optimizer.param_groups[0]["lr"]) == (3.0, [0.5], 0.25)
    assert weight.item() == -4.0 * 0.25


def test_a_rate_set_within_a_closure_is_multiplied():
    weight, optimizer = _multiplied(2.0)
    optimizer.step(lambda: optimizer.param_groups[0].update(lr=0.125))
    assert (weight.item(), optimizer.param_groups[0]["lr"]) == (-0.25, 0.125)


@pytest.mark.parametrize("first", [True, False])
def test_a_scheduler_in_a_hook_of_the_step_sees_the_owners_rate(first):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    knob = None if first else LearningRateKnob(optimizer)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    optimizer.register_step_pre_hook(lambda *_: schedule.step())
    knob = knob or LearningRateKnob(optimizer)
    knob.write(4.0)
    for _ in range(3):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5**6


def test_an_optimizer_that_reads_its_rate_once_has_no_knob_of_it():
    optimizer = torch.optim.Rprop([nn.Parameter(torch.zeros(1))])
    with pytest.raises(AttachError, match="moving it does not change the update"):
        LearningRateKnob(optimizer).verify()


class Exact(torch.optim.Optimizer):
    """Takes its groups' keys and no other, as Muon with auxiliary Adam does."""

    def __init__(self, params):
        groups = [dict(group) for group in params]
        for group in groups:
            group.setdefault("lr", 0.02)
            assert set(group) <= {"params", "lr", "weight_decay"}
        super().__init__(groups, {"weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


def test_what_a_schedule_writes_into_groups_is_no_option_of_the_optimizer():
    model = nn.Linear(4, 4)
    optimizer = Exact([{"params": list(model.parameters()), "weight_decay": 0.1}])
    torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    (adapter,), missing = find_adapters(["learning_rate_multiplier"], model, optimizer)
    assert missing == {} and adapter.read() == 1.0


def test_optimizers_without_a_rate_or_with_many_losses_say_so():
    parameters = list(nn.Linear(4, 4).parameters())
    odd = torch.optim.SGD(parameters, lr=0.1)
    del odd.param_groups[0]["lr"]
    with pytest.raises(AttachError, match="the groups of SGD have no 'lr'"):
        LearningRateKnob(odd)
    with pytest.raises(AttachError, match="LBFGS asks for the loss several times in a step"):
        LearningRateKnob(torch.optim.LBFGS(parameters))


def test_a_group_that_comes_later_has_the_weight_decay_in_force():
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(one.parameters(), weight_decay=0.1)
    knob = WeightDecayKnob(optimizer)
    knob.write(0.4)
    optimizer.add_param_group({"params": list(two.parameters()), "weight_decay": 0.05})
    assert knob.read() == pytest.approx(0.4)
    assert optimizer.param_groups[1]["weight_decay"] == pytest.approx(0.2)
    knob.restore()
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.05])
