"""The replicated optimizer against torch's, and what it leaves untouched."""

import pytest
import torch

from envs.adamw import ReplicatedAdamW
from models import AdaptiveTransformer, TransformerConfig, cross_entropy

SHAPE = TransformerConfig(vocab_size=11, d_model=16, n_layers=1, context=8)
ALL = torch.ones(1, 4, dtype=torch.bool)


def build(n, dtype=torch.float64, **options):
    model = AdaptiveTransformer(SHAPE, n, dtype=dtype, sliced=False)
    model.initialise(list(range(n)), list(range(n)))
    return model, ReplicatedAdamW(model, **options)


def tokens(n, step):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, 11, (4, 3, 9), generator=generator)[:n]


def backward(model, batch):
    cross_entropy(model(batch[..., :-1]), batch[..., 1:]).sum().backward()


def narrow(model, width, rows=(0,)):
    model.set_knobs({"embedding_width": width}, list(rows))
    model.knobs.settle_gates(list(rows))


def flat_levels(model):
    """The width level of each column of the optimizer's buffer."""
    levels = model.parameter_levels()
    return torch.cat([levels[name].flatten() for name, _ in model.named_parameters()])


def rates(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("max_norm", [0.05, 1.0, 1e9])
def test_each_replica_follows_torchs_adamw_with_clipping_run_alone(max_norm):
    rate, decay = rates(1e-2, 3e-3, 5e-2), rates(0.1, 0.0, 0.5)
    model, optimizer = build(3, max_norm=max_norm)
    singles = []
    for row in range(3):
        single = AdaptiveTransformer(SHAPE, dtype=torch.float64)
        single.initialise([0], [row])
        gains = [p for name, p in single.named_parameters() if name.endswith("norm")]
        matrices = [p for name, p in single.named_parameters() if not name.endswith("norm")]
        groups = [
            {"params": matrices, "weight_decay": decay[row].item()},
            {"params": gains, "weight_decay": 0.0},
        ]
        torch_adamw = torch.optim.AdamW(groups, lr=rate[row].item(), betas=(0.9, 0.99), eps=1e-8)
        singles.append((single, torch_adamw))
    for step in range(12):
        batch = tokens(3, step)
        backward(model, batch)
        norms, _ = optimizer.step(rate, decay, ALL.expand(3, 4))
        for row, (single, torch_adamw) in enumerate(singles):
            torch_adamw.zero_grad()
            backward(single, batch[row : row + 1])
            norm = torch.nn.utils.clip_grad_norm_(single.parameters(), max_norm)
            torch_adamw.step()
            assert norms[row].item() == pytest.approx(norm.item(), abs=1e-9)
    for name, p in model.named_parameters():
        for row, (single, _) in enumerate(singles):
            wanted = single.get_parameter(name)[0]
            torch.testing.assert_close(p[row], wanted, atol=1e-9, rtol=0, msg=name)


def test_decay_shrinks_matrices_and_leaves_the_gains_of_norms():
    model, optimizer = build(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(rates(0.1), rates(0.5), ALL)  # no gradient at all
    for name, p in model.named_parameters():
        kept = 1.0 if name.endswith("norm") else 1 - 0.1 * 0.5
        torch.testing.assert_close(p.detach(), before[name] * kept, atol=1e-14, rtol=0)


def test_the_models_parameters_are_views_of_the_buffer():
    model, optimizer = build(2)
    optimizer.values[1].fill_(0.25)
    assert all((p[1] == 0.25).all() and not (p[0] == 0.25).all() for p in model.parameters())


def test_inactive_width_is_frozen_bit_for_bit_and_counts_go_on_where_they_stopped():
    model, optimizer = build(1, dtype=torch.float32)
    levels = flat_levels(model)

    def train(n_steps, first):
        for step in range(first, first + n_steps):
            backward(model, tokens(1, step))
            optimizer.step(rates(1e-2), rates(0.3), model.knobs.gates > 0)

    train(3, 0)
    narrow(model, 0.5)
    before = {name: state.clone() for name, state in optimizer.tensors().items()}
    train(5, 3)
    off = levels >= 2
    for name in ("values", "moment1", "moment2"):
        now = optimizer.tensors()[name]
        assert torch.equal(now[:, off], before[name][:, off]), name
        assert not torch.equal(now[:, ~off], before[name][:, ~off]), name
    assert optimizer.counts.tolist() == [[8, 8, 3, 3]]
    narrow(model, 1.0)
    train(2, 8)
    assert optimizer.counts.tolist() == [[10, 10, 5, 5]]
    assert not torch.equal(optimizer.values[:, off], before["values"][:, off])


def test_a_returning_level_is_corrected_by_its_own_count_as_if_it_had_never_paused():
    paused, optimizer = build(1, max_norm=1e9)
    steady, twin = build(1, max_norm=1e9)
    top = flat_levels(paused) == 3
    without_top = torch.tensor([[True, True, True, False]])
    generator = torch.Generator().manual_seed(0)

    def step(model, optimizer, gradient, active):
        start = 0
        for p in model.parameters():
            p.grad = gradient[start : start + p.numel()].view(p.shape).clone()
            start += p.numel()
        optimizer.step(rates(1e-2), rates(0.1), active)

    for i in range(7):
        gradient = torch.randn(len(top), generator=generator, dtype=torch.float64)
        if i in (2, 3, 4):
            step(paused, optimizer, gradient * ~top, without_top)
        else:
            step(paused, optimizer, gradient, ALL)
            step(steady, twin, gradient, ALL)
    assert torch.equal(optimizer.values[:, top], twin.values[:, top])
    assert not torch.equal(optimizer.values[:, ~top], twin.values[:, ~top])


def test_a_nan_gradient_leaves_the_other_replicas_bit_identical():
    results = []
    for spoil in (False, True):
        model, optimizer = build(3, dtype=torch.float32)
        for step in range(4):
            backward(model, tokens(3, step))
            if spoil and step == 1:
                model.unembedding.grad[1, 0, 0] = torch.nan
            norm, ratio = optimizer.step(
                rates(0.01, 0.02, 0.03), rates(0.1, 0.1, 0.1), ALL.expand(3, 4), measure=True
            )
        results.append((optimizer.tensors(), norm, ratio))
    (clean, clean_norm, clean_ratio), (found, norm, ratio) = results
    assert found["values"][1].isnan().any()
    for row in (0, 2):
        assert all(torch.equal(found[name][row], clean[name][row]) for name in clean)
        assert norm[row] == clean_norm[row] and torch.equal(ratio[row], clean_ratio[row])


def test_replicas_may_have_different_active_levels():
    model, optimizer = build(2)
    narrow(model, 0.25, rows=[1])
    backward(model, tokens(2, 0))
    before = optimizer.values.clone()
    optimizer.step(rates(0.01, 0.01), rates(0.1, 0.1), model.knobs.gates > 0)
    levels = flat_levels(model)
    assert torch.equal(optimizer.values[1, levels > 0], before[1, levels > 0])
    assert not torch.equal(optimizer.values[0, levels > 0], before[0, levels > 0])


def test_measured_ratios_are_the_moves_of_each_tensor_relative_to_its_size():
    model, optimizer = build(2)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, tokens(2, 0))
    _, ratios = optimizer.step(rates(0.01, 0.03), rates(0.1, 0.1), ALL.expand(2, 4), measure=True)
    for i, p in enumerate(model.parameters()):
        for row in range(2):
            wanted = (p[row] - before[i][row]).norm() / before[i][row].norm()
            assert ratios[row, i].item() == pytest.approx(wanted.item(), rel=1e-9)


def test_a_reset_forgets_the_rows_named_and_no_other():
    model, optimizer = build(3)
    backward(model, tokens(3, 0))
    optimizer.step(rates(0.1, 0.1, 0.1), rates(0, 0, 0), ALL.expand(3, 4))
    kept = optimizer.moment1[1].clone()
    optimizer.reset_rows([0, 2])
    for state in (optimizer.moment1, optimizer.moment2, optimizer.counts):
        assert (state[[0, 2]] == 0).all() and (state[1] != 0).any()
    assert torch.equal(optimizer.moment1[1], kept)


@pytest.mark.parametrize("rotation", ["rope", "givens+fire", "conditional"])
@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
def test_a_narrow_sliced_model_steps_as_a_masked_one_does(rotation, feed_forward):
    """Through widths from the start and in mid-training: views of what is active, or all of it."""
    config = TransformerConfig(
        d_model=16, n_heads=4, context=8, rotation=rotation, feed_forward=feed_forward
    )
    models = [
        AdaptiveTransformer(config, 1, dtype=torch.float64, sliced=sliced)
        for sliced in (True, False)
    ]
    optimizers = [ReplicatedAdamW(model) for model in models]
    tokens = torch.randint(0, 256, (1, 2, 9), generator=torch.Generator().manual_seed(0))
    one = torch.ones(1, dtype=torch.float64)
    for model in models:
        model.initialise([0], [1])
    for width in (0.5, 0.5, 0.25, 1.0, 0.75):
        norms = []
        for model, optimizer in zip(models, optimizers, strict=True):
            model.set_knobs({"embedding_width": width})
            model.knobs.settle_gates([0])
            cross_entropy(model(tokens[..., :-1]), tokens[..., 1:]).sum().backward()
            norms.append(optimizer.step(1e-2 * one, one, model.knobs.gates > 0, measure=True))
        torch.testing.assert_close(norms[0], norms[1], atol=1e-12, rtol=1e-9)
        for name, left in optimizers[0].tensors().items():
            right = optimizers[1].tensors()[name]
            torch.testing.assert_close(left, right, atol=1e-10, rtol=1e-9)
