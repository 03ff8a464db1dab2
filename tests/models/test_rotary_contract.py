"""One contract for every rotation variant, and for pairs of them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import AdaptiveTransformer, TransformerConfig
from models.cache import KeyValueCache
from models.loss import cross_entropy
from models.rotary import VARIANTS, LayerTurn, Rotary, RotationConfig, Shape, parse_rotation

NAMES = sorted(VARIANTS)
PAIRS = [
    "+".join(pair)
    for pair in itertools.combinations(
        ("givens", "free", "frequencies", "conditional", "value", "t5", "multi_scale", "yarn"), 2
    )
]
MORE = ["nope+alibi", "polar+temperature+t5", "block+xpos+kerple", "partial+conditional+fire"]
GROWING = {"dynamic"}  # frequencies change with the length of the sequence
NOT_ORTHOGONAL = {"polar", "xpos", "yarn", "temperature"}  # lengths change by design
VOCAB, CONTEXT = 13, 16


def build(rotation, n=2, *, dtype=torch.float64, sliced=False, disturbed=True, **shape):
    """A small model whose rotation is away from where it starts."""
    shape = {"d_model": 16, "n_heads": 4, "n_layers": 2, "context": CONTEXT, **shape}
    config = TransformerConfig(vocab_size=VOCAB, rotation=rotation, **shape)
    model = AdaptiveTransformer(config, n, dtype=dtype, sliced=sliced)
    model.initialise(list(range(n)), [100 + i for i in range(n)])
    if disturbed:
        disturb(model)
    return model


@torch.no_grad()
def disturb(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.rotation.parameters():
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_((0.1 * draw).to(parameter.dtype))


def tokens(n=2, batch=3, seq=CONTEXT, seed=1):
    return torch.randint(0, VOCAB, (n, batch, seq), generator=torch.Generator().manual_seed(seed))


def loss_of(model, data):
    return cross_entropy(model(data)[:, :, :-1], data[..., 1:]) + model.penalty()


def rotary(rotation, n_heads=2, head_dim=8, seq=CONTEXT, dtype=torch.float64):
    """The rotation alone, disturbed, and its pass over a sequence."""
    shape = Shape(
        n_replicas=2,
        n_layers=2,
        n_heads=n_heads,
        d_model=n_heads * head_dim,
        head_dim=head_dim,
        context=seq,
        dtype=dtype,
    )
    module = Rotary(parse_rotation(rotation), shape)
    generator = torch.Generator().manual_seed(4)
    for row in range(2):
        for component in module.components().values():
            for parameter in component.parameters():
                parameter.data[row] = torch.randn(parameter[row].shape, generator=generator) * 0.1
    base = torch.tensor([50.0, 10_000.0], dtype=torch.float64).log()
    base = base.view(2, *(1,) * len(module.base_shape())).expand(2, *module.base_shape())
    module.refresh(base.to(dtype), torch.ones(2))
    return module, module.prepare(seq, torch.ones(2, dtype=dtype))


def turned(rotation, x, **shape):
    """Queries and keys at all positions, from the same vector everywhere: `[seq, dim]` each."""
    module, whole = rotary(rotation, seq=len(x), dtype=x.dtype, **shape)
    qk = x.expand(2, 1, *x.shape)[:, :, :, None, None, :].expand(-1, -1, -1, 2, 2, -1)
    turn = LayerTurn(whole, 1, 2, polar=module.config.polar)
    return turn.queries_keys(qk.contiguous())[1, 0, :, :, 1].unbind(1)


@pytest.mark.parametrize("rotation", NAMES + PAIRS + MORE)
def test_masked_and_sliced_agree_in_values_and_gradients(rotation):
    data = tokens()
    for width, span in ((1.0, 16.0), (0.5, 5.0), (0.25, 2.0)):
        masked = build(rotation)
        knobs = {"embedding_width": width, "attention_span": span, "rope_base": 30.0}
        masked.set_knobs(knobs)
        masked.knobs.settle_gates([0, 1])
        sliced = build(rotation, sliced=True)
        sliced.load_state_dict(masked.state_dict())
        left, right = loss_of(masked, data), loss_of(sliced, data)
        torch.testing.assert_close(left, right, atol=1e-10, rtol=0)
        left.sum().backward()
        right.sum().backward()
        for (name, p), q in zip(masked.named_parameters(), sliced.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-10, rtol=0, msg=name)


@pytest.mark.parametrize("rotation", NAMES + MORE)
def test_a_replica_does_not_see_its_neighbours(rotation):
    both, one = build(rotation), build(rotation, n=1, sliced=False)
    state = both.state_dict()
    one.load_state_dict({name: value[1:] for name, value in state.items()})
    torch.testing.assert_close(both(tokens())[1], one(tokens()[1:])[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("rotation", NAMES + PAIRS + MORE)
def test_a_later_token_changes_no_earlier_output(rotation):
    model, data = build(rotation), tokens()
    changed = data.clone()
    changed[:, :, 9:] = (changed[:, :, 9:] + 1) % VOCAB
    assert torch.equal(model(changed)[:, :, :9], model(data)[:, :, :9])
    assert not torch.equal(model(changed)[:, :, 9:], model(data)[:, :, 9:])


@pytest.mark.parametrize("rotation", NAMES + PAIRS + MORE)
def test_cached_logits_equal_uncached_ones(rotation):
    model, data = build(rotation), tokens()
    cache = KeyValueCache()
    for first, end in ((0, 5), (5, 6), (6, 10), (10, 16)):
        logits = model(data[:, :, first:end], cache=cache)
        wanted = model(data[:, :, :end])[:, :, first:]
        torch.testing.assert_close(logits, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("rotation", NAMES)
@pytest.mark.parametrize("knobs", [{"rope_base": 5.0}, {"attention_span": 3.0}])
def test_a_knob_move_invalidates_the_cache(rotation, knobs):
    model, data = build(rotation), tokens()
    cache = KeyValueCache()
    model(data[:, :, :10], cache=cache)
    model.set_knobs(knobs)
    logits = model(data[:, :, 10:12], cache=cache)
    wanted = model(data[:, :, :12])[:, :, 10:]
    torch.testing.assert_close(logits, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("rotation", NAMES + PAIRS + MORE)
def test_every_parameter_of_a_rotation_learns_from_where_it_starts(rotation):
    model = build(rotation, disturbed=False)
    with torch.no_grad():  # at a penalty's minimum its gradient is rightly zero
        loss = loss_of(model, tokens())
    assert torch.isfinite(loss).all()
    loss_of(model, tokens()).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.flatten(1).abs().amax(1) > 1e-9).all(), name


@pytest.mark.parametrize("rotation", [*NAMES, "block+frequencies", "conditional+value"])
def test_gradients_are_those_of_finite_differences(rotation):
    model = build(rotation, n=1, n_layers=1, context=4, sliced=False)
    data = tokens(1, 1, 4)
    parameters = list(model.rotation.parameters()) or [model.blocks[0]["qkv"]]
    loss_of(model, data).sum().backward()
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        expected = (parameter.grad * direction).sum()
        with torch.no_grad():
            values = []
            for step in (1e-6, -2e-6):
                parameter.add_(step * direction)
                values.append(loss_of(model, data).sum())
            parameter.add_(1e-6 * direction)
        torch.testing.assert_close((values[0] - values[1]) / 2e-6, expected, atol=1e-7, rtol=1e-5)


@settings(max_examples=60, deadline=None, database=None)
@given(
    rotation=st.sampled_from(NAMES),
    seq=st.integers(1, 40),
    head_dim=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 2**16),
)
def test_logits_depend_on_the_distance_alone(rotation, seq, head_dim, seed):
    """The same vector everywhere: q_m . k_n may depend on m - n only."""
    vector = torch.randn(
        head_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    q, k = turned(rotation, vector.expand(seq, -1), head_dim=head_dim)
    logits = q @ k.T
    for distance in range(-seq + 1, seq):
        diagonal = logits.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-9, rtol=1e-9)


@settings(max_examples=60, deadline=None, database=None)
@given(
    rotation=st.sampled_from(sorted(set(NAMES) - NOT_ORTHOGONAL)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seq=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_turning_keeps_the_norm_the_dtype_and_position_zero(rotation, dtype, seq, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(seq, 8, generator=generator, dtype=torch.float64).to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for y in turned(rotation, x):
        assert y.dtype == dtype
        torch.testing.assert_close(y[0], x[0])
        torch.testing.assert_close(
            y.double().norm(dim=-1), x.double().norm(dim=-1), atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("rotation", sorted(set(NAMES) - {"nope", "rope", "partial", "linear"}))
def test_every_variant_differs_from_plain_rope(rotation):
    model, plain = build(rotation), build("rope")
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(ours[name])
    assert not torch.allclose(model(tokens()), plain(tokens()), atol=1e-4)


@pytest.mark.parametrize("shared", ["givens", "frequencies", "t5", "conditional", "block"])
def test_variants_share_all_other_weights_with_plain_rope(shared):
    plain = build("rope", disturbed=False)
    variant = dict(build(shared, disturbed=False).named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, variant[name]), name


@pytest.mark.parametrize("rotation", NAMES + MORE)
def test_state_survives_a_round_trip_with_its_knobs(rotation):
    model, other = build(rotation), build(rotation, disturbed=False)
    model.set_knobs({"rope_base": 77.0, "position_scale": 0.5, "rotation_strength": 0.3})
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens()), other(tokens()))


@pytest.mark.parametrize("per, shape", [("layer", (2,)), ("head", (2, 4))])
def test_each_layer_or_head_can_have_a_base_of_its_own(per, shape):
    model = build({"base_per": per})
    plain = model(tokens())
    bases = torch.full((2, *shape), 10_000.0)
    bases[1, 1] = 20.0
    model.set_knobs({"rope_base": bases})
    moved = model(tokens())
    assert torch.equal(moved[0], plain[0])
    assert not torch.allclose(moved[1], plain[1])
    with pytest.raises(ValueError, match="rope_base must be one number, or of shape"):
        model.set_knobs({"rope_base": torch.full((2, 3), 10.0)})


@pytest.mark.parametrize("rotation", ["givens", "butterfly", "multi_givens", "block"])
def test_strength_takes_givens_rotations_from_the_identity_to_full(rotation):
    model = build(rotation)
    orthogonal = model.rotation.orthogonal
    for strength in (0.0, 0.4, 1.0):
        query, key = model.rotation._matrices(torch.full((2,), strength, dtype=torch.float64))
        assert query is key
        r = torch.eye(4, dtype=torch.float64) if orthogonal is None else orthogonal()
        givens = query @ torch.linalg.inv(r)
        gram = givens @ givens.transpose(-2, -1)
        eye = torch.eye(4, dtype=torch.float64).expand_as(gram)
        torch.testing.assert_close(gram, eye, atol=1e-12, rtol=0)
        assert torch.allclose(givens, eye, atol=1e-12) == (strength == 0)


def test_position_scale_stretches_positions_of_its_replica_only():
    model = build("rope")
    plain = model.rotation.prepare(8, torch.ones(2)).turn.clone()
    model.set_knobs({"position_scale": [1.0, 0.5]})
    scaled = model.rotation.prepare(8, torch.ones(2)).turn
    assert torch.equal(scaled[0], plain[0])
    torch.testing.assert_close(scaled[1, :, ::2], plain[1, :, :4])


def test_the_orthogonality_penalty_is_the_squared_defect_times_the_knob():
    model = build("free")
    model.set_knobs({"orthogonality_weight": [0.0, 2.0]})
    r = model.rotation.orthogonal.weight.detach()
    defect = torch.stack([(m @ m.T - torch.eye(4)).square().sum() for m in r[1].flatten(0, 1)])
    penalty = model.penalty()
    assert penalty[0] == 0
    torch.testing.assert_close(penalty[1].double(), 2 * defect.mean())
    for name in ("cayley", "exp", "householder"):
        assert build(name).penalty().abs().max() < 1e-12
        assert build(name).rotation.penalty(torch.ones(2, 4)).max() < 1e-12


def test_closed_heads_have_no_part_in_the_penalty():
    model = build("free")
    model.set_knobs({"orthogonality_weight": 1.0, "embedding_width": 0.5})
    model.knobs.settle_gates([0, 1])
    r = model.rotation.orthogonal.weight
    model.penalty().sum().backward()
    assert (r.grad[:, :, 2:] == 0).all() and (r.grad[:, :, :2].abs().amax((-2, -1)) > 0).all()
    eye = torch.eye(4, dtype=r.dtype)
    defect = (r @ r.transpose(-2, -1) - eye).square().sum((-2, -1))[:, :, :2].mean((1, 2))
    torch.testing.assert_close(model.penalty().double(), defect)


# Folding -------------------------------------------------------------------------------------

FOLDABLE = [name for name in NAMES if parse_rotation(name).static_matrices]


@pytest.mark.parametrize("rotation", [*FOLDABLE, "block+t5+conditional", "givens+temperature"])
@pytest.mark.parametrize("sliced", [False, True])
def test_folded_rotations_give_the_same_logits_without_their_parameters(rotation, sliced):
    model = build(rotation, sliced=sliced)
    model.set_knobs({"rotation_strength": 0.7})
    wanted, before = model(tokens()), model.count_parameters()
    assert model.fold_rotations_() is model
    torch.testing.assert_close(model(tokens()), wanted, atol=1e-10, rtol=0)
    assert model.count_parameters() < before
    assert not model.config.rotary.static_matrices
    again = AdaptiveTransformer(model.config, 2, dtype=torch.float64, sliced=sliced)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens()), model(tokens()))


@pytest.mark.parametrize("rotation", NAMES)
def test_under_autocast_every_variant_runs_and_what_is_orthogonal_stays_so(rotation):
    model = build(rotation, dtype=torch.float32)
    exact = model(tokens()).detach()
    matrices = model.rotation.prepare(CONTEXT, torch.ones(2)).query_matrix
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, tokens()).sum().backward()
        coarse = model.rotation.prepare(CONTEXT, torch.ones(2)).query_matrix
        assert (model(tokens()) - exact).abs().max() < 0.1
    if matrices is not None:
        assert torch.equal(coarse, matrices)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rotation", FOLDABLE)
def test_folding_under_autocast_keeps_full_precision(rotation):
    model = build(rotation, dtype=torch.float32)
    wanted = model(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        model.fold_rotations_()
    torch.testing.assert_close(model(tokens()), wanted, atol=1e-5, rtol=0)


def test_folding_keeps_what_is_frozen_frozen():
    model = build("givens+t5").requires_grad_(False).eval().fold_rotations_()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.rotation.training


@pytest.mark.parametrize("rotation", ["fire", "t5", "conditional", "block"])
def test_a_float64_model_can_be_cast(rotation):
    model = build(rotation).to(torch.bfloat16)
    assert torch.isfinite(model(tokens())).all()


@pytest.mark.parametrize("rotation", ["rope", "conditional", "t5", "polar+temperature"])
def test_where_nothing_is_static_folding_says_so(rotation):
    with pytest.raises(ValueError, match="nothing to fold"):
        build(rotation).fold_rotations_()


def test_a_config_knows_what_is_static():
    assert RotationConfig(givens="butterfly").static_matrices
    assert not RotationConfig(conditional=True, bias="t5").static_matrices
