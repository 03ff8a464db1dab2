"""Names, combinations, what is refused; every variant learns; the base moves while it learns."""

import warnings

import pytest
import torch

from envs.adamw import ReplicatedAdamW
from models import AdaptiveTransformer, TransformerConfig
from models.loss import cross_entropy
from models.rotary import (
    VARIANTS,
    Rotary,
    RotationConfig,
    Shape,
    parse_rotation,
    rotation_names,
    useful_base,
)

# Names and combinations -----------------------------------------------------------------------


def test_plus_combines_variants():
    both = parse_rotation("givens+t5")
    assert both == RotationConfig(givens="round_robin", bias="t5")
    assert parse_rotation("t5 + givens") == both
    assert parse_rotation({"variant": "yarn+t5", "scaling_factor": 8.0}) == RotationConfig(
        scaling="yarn", scaling_factor=8.0, bias="t5"
    )


def test_whole_numbers_may_come_as_floats_and_values_may_turn_by_content_alone():
    config = parse_rotation({"variant": "multi_givens", "n_rotations": 2.0})
    assert config == parse_rotation("multi_givens") and isinstance(config.n_rotations, int)
    assert parse_rotation("nope+conditional+value").value_rotation


def test_each_name_is_a_variant_of_its_own():
    configs = [parse_rotation(name) for name in rotation_names()]
    assert len(set(configs)) == len(VARIANTS) == 30


@pytest.mark.parametrize(
    "rotation, message",
    [
        ("roep", r"Unknown rotation 'roep'\. Known: alibi, .*yarn\. Did you mean 'rope'\?"),
        ("givens+", "Unknown rotation ''"),
        ({"variant": "givns"}, "Did you mean 'givens'"),
        ({"gives": "round_robin"}, "Unknown rotation field 'gives'.*Did you mean 'givens'"),
        ("rope+givens+rope", "'rope' twice: two passes with a mixing between"),
        ("givens+butterfly", "contradicts itself: 'givens' says givens='round_robin', 'butterfly'"),
        ("rope+nope", "contradicts itself: 'rope' turns, 'nope' does not"),
        ("nope+frequencies", "learn_frequencies changes how positions turn, and with positions="),
        ("nope+yarn", "scaling changes how positions turn"),
        ("nope+partial", "rotary_share changes how positions turn"),
        ("nope+head_bases", "base_per changes how positions turn"),
        ("nope+value", "without conditional angles nothing turns"),
        ({"variant": "cayley", "orthogonality_weight": 1.0}, "needs orthogonal='free'"),
        (
            {"base_factors": [1.0, float("inf")]},
            "base_factors must be one or more in",
        ),
        (
            {"base_factors": [1.0, float("nan")]},
            "base_factors must be one or more in",
        ),
        (
            {"scaling": "yarn", "scaling_factor": float("inf")},
            r"scaling_factor must be in \[1, 1e6\]",
        ),
        ({"base_factors": [1e39]}, "base_factors must be one or more in"),
        ({"variant": "yarn", "trained_context": 0}, "trained_context must be at least 1 token"),
        ({"n_rotations": float("inf"), "givens": "butterfly"}, "must be a whole number, got inf"),
        ("polar+value", "polar has one frequency per channel and value_rotation one per pair"),
        ({"n_rotations": 3}, "n_rotations=3 needs givens"),
        ({"scaling_factor": 8}, "scaling_factor=8 needs scaling"),
        ({"variant": "free", "orthogonality_weight": float("inf")}, r"in \[0, 1e6\], got inf"),
        ({"rotary_share": 0.0}, r"rotary_share must be in \(0, 1\], got 0.0"),
        ({"bias": "t6"}, "bias must be one of None, t5, alibi, kerple, fire, got 't6'"),
        ({"base_factors": []}, "base_factors must be one or more in"),
        ({"base_factors": 3.0}, "base_factors must be a list of numbers, got 3.0"),
        ({"conditional": "yes"}, "conditional must be true or false, got 'yes'"),
        ({"n_rotations": "two"}, "n_rotations must be a whole number, got 'two'"),
        ({"n_rotations": None, "givens": "butterfly"}, "n_rotations must be a whole number"),
        ({"givens": 3}, "givens must be a name, got 3"),
        (
            {"scaling": "yarn", "scaling_factor": 0.5},
            r"scaling_factor must be in \[1, 1e6\], got 0.5",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(rotation, message):
    with pytest.raises(ValueError, match=message):
        parse_rotation(rotation)


@pytest.mark.parametrize(
    "rotation, shape, message",
    [
        ("butterfly", {"d_model": 24, "n_heads": 4}, "power of 2, got 6"),
        ({"rotary_share": 0.1}, {"d_model": 32, "n_heads": 4}, "leaves no pair"),
        ({"trained_context": 64}, {"context": 32}, "trained_context must be at most the context"),
        ("rope", {"d_model": 12, "n_heads": 4}, "even whole number"),
        ("ntk", {"d_model": 8, "n_heads": 4}, "one pair alone does not have; head_dim=2"),
        ("xpos", {"context": 60_000, "rope_base": 1e8}, "xpos reaches over at most 56463 tokens"),
    ],
)
def test_a_rotation_that_does_not_suit_the_shape_is_refused(rotation, shape, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(rotation=rotation, **shape)


def test_a_polar_head_of_one_pair_has_two_frequencies_to_scale():
    assert TransformerConfig(rotation="polar+ntk", d_model=8, n_heads=4).rotary.polar


def test_a_base_below_the_useful_bound_is_warned_of_with_the_bound():
    with pytest.warns(UserWarning, match=r"rope_base=20 is below the useful bound of about 37"):
        TransformerConfig(context=64, rope_base=20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TransformerConfig(context=64, rope_base=40.0)
        TransformerConfig(context=64, rope_base=20.0, rotation="nope")


def test_the_useful_bound_is_that_of_the_paper():
    assert useful_base(64) == pytest.approx(37, rel=0.01)
    assert useful_base(1024) == pytest.approx(3374, rel=0.01)


# Learning -------------------------------------------------------------------------------------

SEQ, VOCAB = 16, 8


def copy_task(step, n=1, batch=16):
    """Random tokens, repeated: the second half can be predicted by looking half a sequence back."""
    generator = torch.Generator().manual_seed(step)
    half = torch.randint(0, VOCAB, (1, batch, SEQ // 2), generator=generator)
    return torch.cat((half, half), dim=2).expand(n, -1, -1)


def second_half_loss(model, data):
    logits = model(data[..., :-1])[:, :, SEQ // 2 - 1 :]
    return cross_entropy(logits, data[..., SEQ // 2 :])


def trainer(rotation):
    config = TransformerConfig(
        vocab_size=VOCAB, d_model=32, n_heads=4, context=SEQ, rotation=rotation, rope_base=100.0
    )
    model = AdaptiveTransformer(config, 1, sliced=False)
    model.initialise([0], [1])
    return model, ReplicatedAdamW(model)


def train(model, optimizer, steps, learning_rate=1e-2):
    for step in steps:
        loss = second_half_loss(model, copy_task(step))
        (loss.sum() + model.penalty().sum()).backward()
        active = model.knobs.gates > 0
        optimizer.step(torch.full((1,), learning_rate), torch.zeros(1), active)
    with torch.no_grad():
        return second_half_loss(model, copy_task(10**6))


@pytest.mark.slow
@pytest.mark.parametrize("rotation", rotation_names())
def test_every_variant_learns_to_copy_from_half_a_sequence_back(rotation):
    """Chance is log(8) = 2.08 nats; without positions the task is much harder, but not closed."""
    model, optimizer = trainer(rotation)
    loss = train(model, optimizer, range(100))
    if rotation == "nope":
        assert 1.0 < loss.min() and loss.max() < 1.6
    else:
        assert loss.max() < 0.3


def test_a_base_move_in_mid_training_keeps_the_optimizer_and_what_was_learned():
    model, optimizer = trainer("frequencies+givens")
    train(model, optimizer, range(20))
    parameters = [id(p) for p in model.parameters()]
    learned = model.rotation.learned.log_frequency.clone()
    moments = optimizer.moment1.clone()
    assert learned.abs().max() > 0
    before = model(copy_task(0)[..., :-1])
    model.set_knobs({"rope_base": 20.0})
    assert not torch.allclose(model(copy_task(0)[..., :-1]), before)
    assert [id(p) for p in model.parameters()] == parameters
    assert torch.equal(model.rotation.learned.log_frequency, learned)
    assert torch.equal(optimizer.moment1, moments)
    train(model, optimizer, range(20, 22))
    assert not torch.equal(model.rotation.learned.log_frequency, learned)


# The errors of earlier code ------------------------------------------------------------------


def test_the_base_takes_any_value_and_stays_where_it_was_put():
    model, _ = trainer("rope")
    tables = []
    for base in (10.0, 20.0, 40.0, 20.0):
        model.set_knobs({"rope_base": base})
        tables.append(model.rotation.table.clone())
        model.train(), model(copy_task(0)[..., :-1])
        model.eval(), model(copy_task(0)[..., :-1])  # reading moves nothing
        assert model.knobs.values()["rope_base"].tolist() == pytest.approx([base])
    assert torch.equal(tables[1], tables[3])
    assert not torch.equal(tables[0], tables[1]) and not torch.equal(tables[1], tables[2])


def test_givens_pairs_are_disjoint_fixed_and_never_of_one_dimension():
    from models.rotary.givens import partners

    for schedule, dims in (("round_robin", (2, 4, 6, 8, 16)), ("butterfly", (2, 4, 8, 16))):
        for dim in dims:
            table = partners(schedule, dim)
            own = torch.arange(dim)
            assert (table != own).all()
            assert all(torch.equal(row[row], own) for row in table)
            assert not table.is_floating_point()
    met = {(i, int(j)) for row in partners("round_robin", 8) for i, j in enumerate(row)}
    assert len(met) == 8 * 7  # every pair of dimensions, both ways


def test_round_robin_angles_span_all_rotations_at_the_identity():
    """Rank of the Jacobian at zero: D (D - 1) / 2 for round robin."""
    from models.rotary.givens import givens_product, partners

    for schedule, rank in (("round_robin", 28), ("butterfly", 12)):
        table = partners(schedule, 8)
        angles = torch.zeros(len(table), 4, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda a: givens_product(a, table), angles)  # noqa: B023
        assert torch.linalg.matrix_rank(jacobian.reshape(64, -1)) == rank


@pytest.mark.parametrize("schedule", ["round_robin", "butterfly"])
def test_the_reversible_product_is_the_one_by_pairs_with_its_gradients(schedule):
    from models.rotary.givens import givens_product, pairs_of, partners, product_by_pairs

    table = partners(schedule, 8).repeat(2, 1)
    angles = torch.linspace(-2, 2, 3 * len(table) * 4, dtype=torch.float64)
    angles = angles.view(3, len(table), 4).requires_grad_()
    pair, sign = pairs_of(table)
    own = angles.gather(2, pair.expand(3, -1, -1))
    weight = torch.linspace(-1, 1, 3 * 64, dtype=torch.float64).view(3, 8, 8)
    results = []
    for product in (
        givens_product(angles, table),
        product_by_pairs(own.cos(), own.sin() * sign, table),
    ):
        (gradient,) = torch.autograd.grad((product * weight).sum(), angles)
        results.append((product, gradient))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=0)


def test_r_starts_orthogonal_and_differs_between_heads_and_layers():
    for name in ("free", "cayley", "exp", "householder"):
        model, _ = trainer(name)
        r = model.rotation.orthogonal().detach().flatten(0, 2)
        eye = torch.eye(8).expand_as(r)
        torch.testing.assert_close(r @ r.transpose(1, 2), eye, atol=1e-4, rtol=0)
        assert torch.pdist(r.flatten(1)).min() > 0.5


def test_reflections_by_nothing_are_the_identity():
    config = TransformerConfig(d_model=16, context=8, rotation="householder")
    model = AdaptiveTransformer(config)
    r = model.rotation.orthogonal()
    assert torch.equal(r, torch.eye(4).expand_as(r))


def test_xpos_is_finite_in_contexts_that_were_too_long_for_gains_counted_from_the_start():
    shape = Shape(n_replicas=1, n_layers=1, n_heads=1, d_model=4, head_dim=4, context=50_000)
    rotary = Rotary(RotationConfig(xpos=True), shape)
    rotary.refresh(torch.full((1,), 18.0), torch.ones(1))
    gain = rotary.prepare(50_000, torch.ones(1)).gain
    assert gain.isfinite().all() and (gain > 0).all()


def test_a_relative_bias_has_many_buckets_and_enters_before_the_softmax():
    model, _ = trainer("t5")
    table = model.rotation.relative.table
    assert table.shape[-1] == 32
    with torch.no_grad():
        table[..., 0] = 50.0  # all attention on the token itself
    data = copy_task(0)[..., :-1]
    out = model(data)
    changed = data.clone()
    changed[:, :, 3] = (changed[:, :, 3] + 1) % VOCAB
    difference = (model(changed) - out).abs().amax((0, 1, 3))
    assert difference[3] > 1e-2
    assert difference[4:].max() < 1e-6


def test_the_span_is_counted_back_from_each_query_and_takes_any_value():
    """Not a prefix of the sequence: late queries see late keys, and only those near enough."""
    config = TransformerConfig(
        vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=1, context=SEQ, span_ramp=1.0
    )
    model = AdaptiveTransformer(config, 1, sliced=False)
    model.initialise([0], [1])
    model.set_knobs({"attention_span": 3.5})
    data = copy_task(0)
    out = model(data)
    changed = data.clone()
    changed[:, :, 8] = (changed[:, :, 8] + 1) % VOCAB
    differs = (model(changed) - out).abs().amax((0, 1, 3)) > 1e-6
    assert differs.nonzero().flatten().tolist() == [8, 9, 10, 11, 12]  # weight 0.5 at distance 4


def test_each_sequence_of_a_batch_has_its_own_output():
    model, _ = trainer("block+conditional+t5")
    data = torch.randint(0, VOCAB, (1, 4, SEQ), generator=torch.Generator().manual_seed(0))
    out = model(data)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(model(data[:, order]), out[:, order])
    assert torch.pdist(out[0].flatten(1)).min() > 0.1


def test_the_matrix_before_rope_is_no_shared_matrix_after_it():
    """The block changes logits: x . (prod G) . R comes before the turn by position."""
    model, _ = trainer("block")
    plain, _ = trainer("rope")
    own = dict(plain.named_parameters())
    assert all(torch.equal(own[n], p) for n, p in model.named_parameters() if n in own)
    data = copy_task(0)
    assert (model(data) - plain(data)).abs().max() > 0.05
