"""The lean cross-entropy against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from models import cross_entropy


def draw(replicas=3, batch=2, seq=5, vocab=11, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(replicas, batch, seq, vocab, generator=generator, dtype=torch.float64).mul(
        scale
    )
    targets = torch.randint(0, vocab, (replicas, batch, seq), generator=generator)
    return logits.to(dtype).requires_grad_(), targets


def torch_loss(logits, targets):
    rows = zip(logits, targets, strict=True)
    return torch.stack([F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in rows])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_loss_equals_torchs_cross_entropy_in_values_and_gradients(dtype, tolerance):
    logits, targets = draw(dtype=dtype)
    weight = torch.tensor([1.0, -0.5, 2.0], dtype=dtype)  # each replica's own incoming gradient
    ours, wanted = cross_entropy(logits, targets), torch_loss(logits, targets)
    torch.testing.assert_close(ours, wanted, atol=tolerance, rtol=tolerance)
    (grad,) = torch.autograd.grad((ours * weight).sum(), logits)
    (wanted_grad,) = torch.autograd.grad((wanted * weight).sum(), logits)
    torch.testing.assert_close(grad, wanted_grad, atol=tolerance, rtol=tolerance)


def test_loss_passes_gradcheck():
    logits, targets = draw(replicas=2, seq=3, vocab=5)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), (logits,))


def test_a_repeated_target_counts_once_per_token():
    logits = torch.zeros(1, 1, 4, 8, dtype=torch.float64, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 1, 4), 3))
    loss.sum().backward()
    assert loss.item() == pytest.approx(torch.tensor(8.0).log().item())
    assert logits.grad[0, 0, :, 3].tolist() == pytest.approx([(1 / 8 - 1) / 4] * 4)


def test_huge_logits_stay_finite():
    logits, targets = draw(dtype=torch.float32, scale=1e4)
    loss = cross_entropy(logits, targets)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logits.grad).all()
    torch.testing.assert_close(loss, torch_loss(logits, targets))  # whose p underflow


def test_bfloat16_logits_give_a_float32_loss_and_bfloat16_gradients():
    logits, targets = draw(dtype=torch.bfloat16)
    loss = cross_entropy(logits, targets)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, torch_loss(logits.float(), targets), atol=1e-6, rtol=1e-6)


def test_a_nan_in_one_replica_leaves_the_others_losses_and_gradients():
    logits, targets = draw()
    clean = cross_entropy(logits, targets)
    (clean_grad,) = torch.autograd.grad(clean.sum(), logits)
    spoiled = logits.detach().clone()
    spoiled[1, 0, 0, 0] = torch.nan
    spoiled.requires_grad_()
    loss = cross_entropy(spoiled, targets)
    (grad,) = torch.autograd.grad(loss.sum(), spoiled)
    assert loss[1].isnan()
    for row in (0, 2):
        assert torch.equal(loss[row], clean[row]) and torch.equal(grad[row], clean_grad[row])


def test_only_what_counts_is_in_the_loss_and_its_gradient():
    logits, targets = draw()
    counted = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    ours = cross_entropy(logits, targets, counted)
    for row in range(3):
        chosen = counted[row]
        wanted = F.cross_entropy(logits[row][chosen], targets[row][chosen])
        torch.testing.assert_close(ours[row], wanted)
        grad, wanted_grad = (
            torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours[row], wanted)
        )
        torch.testing.assert_close(grad, wanted_grad)


def test_a_replica_of_which_nothing_counts_has_no_loss_and_no_gradient():
    logits, targets = draw()
    counted = torch.ones(targets.shape, dtype=torch.bool)
    counted[1] = False
    loss = cross_entropy(logits, targets, counted)
    loss.sum().backward()
    assert loss[1] == 0 and loss[0] > 0
    assert torch.count_nonzero(logits.grad[1]) == 0 and torch.count_nonzero(logits.grad[0]) > 0
