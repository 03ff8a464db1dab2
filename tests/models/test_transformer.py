"""The adaptive transformer: one function, two executions; causal; replicas apart."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import AdaptiveTransformer, Noise, TransformerConfig, cross_entropy
from models.layers import checked_tokens
from models.rotary import fold

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def build(n=1, *, sliced=False, dtype=torch.float64, seeds=None, **shape):
    config = TransformerConfig(**{"vocab_size": 17, "d_model": 16, "context": 24, **shape})
    model = AdaptiveTransformer(config, n, dtype=dtype, sliced=sliced)
    model.initialise(list(range(n)), list(range(n)) if seeds is None else seeds)
    return model


def draw_tokens(n=1, batch=2, seq=24, seed=0):
    return torch.randint(0, 17, (n, batch, seq), generator=torch.Generator().manual_seed(seed))


def noise(*seeds, step=5):
    return Noise(torch.tensor(seeds), torch.full((len(seeds),), step))


def loss_and_gradients(model, tokens, noise=None):
    model.zero_grad()
    logits = model(tokens[..., :-1], noise)
    cross_entropy(logits, tokens[..., 1:]).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
@pytest.mark.parametrize("width", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("span", [2.0, 12.0, 24.0])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_masked_and_sliced_execution_agree_in_values_and_gradients(
    dtype, feed_forward, width, span, dropout
):
    knobs = {
        "embedding_width": width,
        "attention_span": span,
        "dropout": dropout,
        "rope_base": [50.0, 9_000.0],
    }
    results = []
    for sliced in (False, True):
        model = build(2, sliced=sliced, dtype=dtype, feed_forward=feed_forward)
        model.set_knobs(knobs)
        model.knobs.settle_gates([0, 1])
        results.append(loss_and_gradients(model, draw_tokens(2), noise(3, 4)))
    (masked, masked_grads), (sliced_out, sliced_grads) = results
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(sliced_out, masked, **close)
    levels = model.parameter_levels()
    for name, grad in sliced_grads.items():
        torch.testing.assert_close(grad, masked_grads[name], **close, msg=name)
        inactive = levels[name] > model.knobs.top_level
        assert (grad[:, inactive] == 0).all(), name


@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
def test_masked_and_sliced_execution_agree_while_gates_move_and_sequences_are_long(feed_forward):
    results = []
    for sliced in (False, True):
        model = build(2, sliced=sliced, feed_forward=feed_forward, context=150, span_ramp=3.0)
        model.set_knobs({"embedding_width": 0.25, "attention_span": 5.5, "dropout": 0.2})
        model.knobs.settle_gates([0, 1])
        model.set_knobs({"embedding_width": 0.75})
        model.knobs.step_gates(0.3)
        results.append(loss_and_gradients(model, draw_tokens(2, 1, 143), noise(3, 4)))
    torch.testing.assert_close(results[1], results[0], atol=1e-10, rtol=1e-10)


@settings(max_examples=15, deadline=None, database=None)
@given(
    width=st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    span=st.floats(1, 24),
    base=st.floats(2, 1e6),
    dropout=st.floats(0, 0.9),
    seq=st.integers(1, 24),
)
def test_masked_equals_sliced_at_any_knobs(width, span, base, dropout, seq):
    outs = []
    for sliced in (False, True):
        model = build(sliced=sliced, n_layers=1)
        model.set_knobs(
            {
                "embedding_width": width,
                "attention_span": span,
                "rope_base": base,
                "dropout": dropout,
            }
        )
        model.knobs.settle_gates([0])
        outs.append(model(draw_tokens(seq=seq), noise(1)).detach())
    torch.testing.assert_close(outs[1], outs[0], atol=1e-10, rtol=1e-10)


def test_a_second_derivative_is_refused_and_not_wrong():
    model = AdaptiveTransformer(TransformerConfig(d_model=16, context=8, rotation="givens"), 2)
    model.initialise([0, 1], [0, 1])
    tokens = torch.arange(18).view(2, 1, 9)
    logits, qkv = model(tokens[..., :-1]), model.get_parameter("blocks.0.qkv")
    turned = model.rotation.prepare(1, model.knobs.rotation_strength)
    assert turned.query_matrix is not None
    angles = next(iter(model.rotation.parameters()))
    for out, of in (
        (cross_entropy(logits, tokens[..., 1:]), logits),
        (logits.square(), model.embedding),  # through attention
        (fold(qkv, turned, 0, model.config.n_heads), qkv),
        (turned.query_matrix.square(), angles),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.sum(), of, create_graph=True, retain_graph=True)


def test_the_model_equals_a_plain_transformer_written_out():
    model = build(n_layers=2, context=8, rope_base=100.0)
    tokens = draw_tokens(batch=1, seq=8)
    p = {name: value[0] for name, value in model.named_parameters()}

    def norm(x, gain):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    def turn(x):  # [seq, head, 4]
        inv_freq = torch.tensor([1.0, 0.1], dtype=torch.float64)
        angle = torch.arange(8)[:, None, None] * inv_freq
        a, b = x[..., 0::2], x[..., 1::2]
        pair = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
        return torch.stack(pair, -1).flatten(-2)

    x = p["embedding"][tokens[0, 0]]
    future = torch.ones(8, 8, dtype=torch.bool).triu(1)
    for i in range(2):
        h = norm(x, p[f"blocks.{i}.attention_norm"]) @ p[f"blocks.{i}.qkv"]
        q, k, v = (part.view(8, 4, 4) for part in h.chunk(3, dim=-1))
        logits = torch.einsum("qhd,khd->hqk", turn(q), turn(k)) / 2
        weights = logits.masked_fill(future, -torch.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, v).reshape(8, 16)
        x = x + out @ p[f"blocks.{i}.attention_out"]
        h = norm(x, p[f"blocks.{i}.ffn_norm"]) @ p[f"blocks.{i}.ffn_in"]
        x = x + torch.nn.functional.gelu(h) @ p[f"blocks.{i}.ffn_out"]
    wanted = norm(x, p["final_norm"]) @ p["unembedding"]
    torch.testing.assert_close(model(tokens)[0, 0], wanted, atol=1e-10, rtol=1e-10)


# What may influence what -----------------------------------------------------------------------


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("span", [3.0, 24.0])
def test_a_later_token_changes_no_earlier_logits(sliced, span):
    model = build(sliced=sliced)
    model.set_knobs({"attention_span": span})
    tokens = draw_tokens()
    other = tokens.clone()
    other[..., 15] = (other[..., 15] + 1) % 17
    before, after = model(tokens), model(other)
    torch.testing.assert_close(after[:, :, :15], before[:, :, :15], atol=1e-13, rtol=0)
    assert ((after - before)[:, :, 15:].abs().amax(-1) > 1e-6)[:, :, :3].all()


@pytest.mark.parametrize("sliced", [False, True])
def test_one_layer_reaches_as_far_as_span_plus_ramp_and_no_further(sliced):
    model = build(sliced=sliced, n_layers=1, span_ramp=2.0)
    model.set_knobs({"attention_span": 5.0})
    tokens = draw_tokens()
    other = tokens.clone()
    other[..., 4] = (other[..., 4] + 1) % 17
    change = (model(other) - model(tokens)).abs().amax(dim=(0, 1, 3))
    assert (change[4:11] > 1e-6).all()  # distances 0 .. 6, all below 5 + 2
    assert (change[11:] < 1e-13).all()


@pytest.mark.parametrize("sliced", [False, True])
def test_logits_are_continuous_in_the_span(sliced):
    model = build(sliced=sliced, span_ramp=2.0)
    tokens = draw_tokens()

    def logits(span):
        model.set_knobs({"attention_span": span})
        return model(tokens).detach()

    for span in (3.0, 7.0, 10.0, 20.0, 22.0, 23.0):
        assert (logits(span + 1e-6) - logits(span - 1e-6)).abs().max() < 1e-4


# Replicas ----------------------------------------------------------------------------------------


def test_each_replica_equals_a_single_model_with_its_seed_and_knobs():
    tokens = draw_tokens(3)
    knobs = {
        "rope_base": [10.0, 300.0, 1e6],
        "attention_span": [2.0, 24.0, 9.5],
        "embedding_width": [0.5, 1.0, 0.25],
        "dropout": [0.0, 0.2, 0.5],
    }
    model = build(3, seeds=[7, 8, 9])
    model.set_knobs(knobs)
    model.knobs.settle_gates([0, 1, 2])
    logits, grads = loss_and_gradients(model, tokens, noise(4, 5, 6))
    for row in range(3):
        single = build(seeds=[7 + row], sliced=None)
        assert single.sliced
        single.set_knobs({name: values[row] for name, values in knobs.items()})
        single.knobs.settle_gates([0])
        out, single_grads = loss_and_gradients(single, tokens[row : row + 1], noise(4 + row))
        torch.testing.assert_close(out[0], logits[row], atol=1e-10, rtol=1e-10)
        for name, grad in single_grads.items():
            torch.testing.assert_close(grad[0], grads[name][row], atol=1e-10, rtol=1e-10)


def test_a_nan_in_one_replica_reaches_no_other():
    model, spoiled = build(3, dtype=torch.float32), build(3, dtype=torch.float32)
    with torch.no_grad():
        spoiled.embedding[1] = torch.nan
    clean, clean_grads = loss_and_gradients(model, draw_tokens(3), noise(1, 2, 3))
    found, grads = loss_and_gradients(spoiled, draw_tokens(3), noise(1, 2, 3))
    assert found[1].isnan().any()
    for row in (0, 2):
        assert torch.equal(found[row], clean[row])
        assert all(torch.equal(grads[name][row], g[row]) for name, g in clean_grads.items())


def test_initialisation_depends_on_the_seed_alone():
    model = build(3, seeds=[5, 6, 5])
    alone = build(seeds=[6])
    for name, p in model.named_parameters():
        assert torch.equal(p[0], p[2]) and torch.equal(p[1], alone.get_parameter(name)[0])
        assert name.endswith("norm") or not torch.equal(p[0], p[1])


def test_fresh_weights_have_the_stated_deviations():
    model = build(vocab_size=400, d_model=64)
    wanted = {
        "embedding": 1.0,
        "unembedding": 1 / 8,
        "blocks.0.qkv": 1 / 8,
        "blocks.1.attention_out": 1 / 8 / 2,
        "blocks.0.ffn_out": 1 / 16 / 2,
    }
    for name, std in wanted.items():
        assert model.get_parameter(name).std().item() == pytest.approx(std, rel=0.05)
    assert (model.final_norm == 1).all()


def test_count_parameters_counts_one_replica():
    per_block = 16 * 48 + 16 * 16 + 2 * 16 * 64 + 2 * 16
    for n in (1, 3):
        assert build(n).count_parameters() == 2 * 17 * 16 + 16 + 2 * per_block


# Dropout and dtypes ----------------------------------------------------------------------------


def test_dropout_is_off_without_noise_and_on_with_it():
    model = build()
    tokens = draw_tokens()
    before = model(tokens)
    assert torch.equal(model(tokens, noise(1)), before)  # p = 0
    model.set_knobs({"dropout": 0.5})
    assert torch.equal(model(tokens), before)
    dropped = model(tokens, noise(1))
    assert not torch.allclose(dropped, before)
    assert torch.equal(model(tokens, noise(1)), dropped)
    for other in (noise(2), noise(1, step=6)):
        assert not torch.allclose(model(tokens, other), dropped)


def test_replicas_of_one_seed_and_one_noise_seed_give_the_same_logits_in_any_row():
    model = build(3, seeds=[1, 2, 1])
    model.set_knobs({"dropout": 0.4})
    out = model(draw_tokens().expand(3, -1, -1), noise(9, 9, 9))
    assert torch.equal(out[0], out[2]) and not torch.allclose(out[0], out[1])


@pytest.mark.parametrize("sliced", [False, True])
def test_a_bfloat16_model_is_near_the_float32_one(sliced):
    low, high = (build(sliced=sliced, dtype=d) for d in (torch.bfloat16, torch.float32))
    out = low(draw_tokens())
    assert out.dtype == torch.bfloat16
    assert (out.float() - high(draw_tokens())).abs().mean() < 0.05


def test_a_model_cast_to_bfloat16_still_runs():
    model = build(dtype=torch.float32).to(torch.bfloat16)
    assert torch.isfinite(model(draw_tokens())).all()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("rotation", ["rope", "fire+value", "givens"])
def test_under_autocast_gradients_are_nearly_those_of_full_precision(rotation, n):
    model = AdaptiveTransformer(TransformerConfig(d_model=16, context=16, rotation=rotation), n)
    model.initialise(list(range(n)), list(range(n)))
    tokens = torch.arange(n * 34).view(n, 2, 17) * 7 % 256
    found = []
    for coarse in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=coarse):
            loss = cross_entropy(model(tokens[..., :-1]), tokens[..., 1:]).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found.append(torch.cat([g.flatten() for g in grads if g is not None]))
    exact, coarse = found
    assert 0 < (coarse - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("token", [-100, 256])
def test_tokens_that_are_none_are_refused_with_the_range(token):
    tokens = torch.zeros(1, 1, 8, dtype=torch.long)
    tokens[0, 0, 3] = token
    model = AdaptiveTransformer(TransformerConfig(d_model=16, context=8))
    ends = f"{min(token, 0)} to {max(token, 0)}"
    with pytest.raises(ValueError, match=rf"tokens must be in \[0, 255\], got {ends}"):
        model(tokens)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_tokens_may_be_whole_numbers_of_any_type(dtype):
    model = build()
    assert torch.equal(model(draw_tokens().to(dtype)), model(draw_tokens()))
    assert model.generate(draw_tokens().to(dtype), 2, temperature=0.0).shape[2] == 26


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_tokens_that_are_no_whole_numbers_are_refused_by_their_type(dtype):
    with pytest.raises(ValueError, match=f"tokens must be whole numbers, got {dtype}"):
        checked_tokens(draw_tokens().to(dtype), 1, 24, 17)


@pytest.mark.parametrize("seeds", [(3,), (3, 4, 5)])
def test_noise_of_another_number_of_replicas_is_refused(seeds):
    model = build(2)
    model.set_knobs({"dropout": 0.2})
    with pytest.raises(ValueError, match="noise needs 2 seeds and steps each"):
        model(draw_tokens(2), noise(*seeds))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_activations_do_not_overflow_the_norm_of_half_precision(dtype):
    model = build(dtype=torch.float32, d_model=256, context=8)
    with torch.no_grad():
        model.embedding.mul_(100)  # squares that add up to more than 65504
    wanted = model(draw_tokens(seq=8))
    found = model.to(dtype)(draw_tokens(seq=8)).float()
    assert (found - wanted).abs().mean() < 0.02 * wanted.std()


@pytest.mark.parametrize("shape", [(2, 1, 8), (1, 1, 25), (1, 0, 8), (1, 2, 0)])
@pytest.mark.parametrize("read", ["forward", "internal_signals", "generate"])
def test_tokens_of_another_shape_are_refused_with_both_shapes(shape, read):
    if read == "generate" and shape[-1] in (0, 25):
        pytest.skip("it takes the latest of a longer text, and says that none is none")
    model, given = build(), torch.zeros(shape, dtype=torch.long)
    arguments = (given, 1) if read == "generate" else (given,)
    with pytest.raises(
        ValueError, match=rf"tokens must have shape.*got {re.escape(str([*shape]))}"
    ):
        getattr(model, read)(*arguments)


def test_a_pickled_model_is_the_same_model(tmp_path):
    model = build()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(draw_tokens()), model(draw_tokens()))
    again.load_state_dict({**model.state_dict(), "knobs.attention_span": torch.tensor([2.0])})
    model.set_knobs({"attention_span": 2.0})
    assert torch.equal(again.knobs.span_bias, model.knobs.span_bias)  # rebuilt by the hook


def test_initialisation_needs_a_seed_for_each_row_and_changes_nothing_without():
    model = build(2)
    before = model.embedding.clone()
    with pytest.raises(ValueError, match=r"a seed for each row, got 2, 1"):
        model.initialise([0, 1], [5])
    assert torch.equal(model.embedding, before)


@pytest.mark.parametrize("row", [2, -1])
def test_a_row_that_is_none_is_not_initialised(row):
    with pytest.raises(ValueError, match=f"rows must be indices below 2, got {row}"):
        build(2).initialise([row], [5])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_span", float("nan")),
        ("attention_span", 0.0),
        ("log_base", float("nan")),
        ("log_base", 100.0),
        ("dropout", -0.1),
        ("width_level", 99),
        ("gates", 0.0),
        ("gates", float("nan")),
    ],
)
@pytest.mark.parametrize("sliced", [False, True])
def test_damaged_knobs_are_not_loaded_without_a_word(name, value, sliced):
    model = build(sliced=sliced)
    state = model.state_dict()
    state[f"knobs.{name}"] = torch.full_like(state[f"knobs.{name}"], value)
    with pytest.raises(ValueError, match=rf"The loaded {name} must be in \["):
        model.load_state_dict(state)


def test_weights_of_a_longer_context_are_loaded_with_a_span_that_fits():
    longer, shorter = build(context=24), build(context=12, seeds=[5])
    shorter.load_state_dict(longer.state_dict())
    assert shorter.knobs.attention_span.tolist() == [12.0]
    wanted = longer(draw_tokens(seq=12))
    torch.testing.assert_close(shorter(draw_tokens(seq=12)), wanted, atol=1e-12, rtol=0)


def test_a_state_that_was_rounded_to_bfloat16_is_loaded_at_the_ends_of_the_ranges():
    model = build(context=511, rope_base=1e9)
    model.set_knobs({"dropout": 0.95})
    rounded = {name: v.bfloat16() for name, v in model.state_dict().items()}
    loaded = build(context=511)
    loaded.load_state_dict(rounded)
    assert rounded["knobs.attention_span"].item() == 512.0  # past the context
    for name in ("dropout", "log_base", "attention_span"):
        value, highest = (getattr(each.knobs, name).item() for each in (loaded, model))
        assert 0.99 * highest < value <= highest


def test_shapes_are_found_out_without_numbers():
    model = AdaptiveTransformer(TransformerConfig(d_model=16, context=8), 2, capturable=True)
    logits = model.to("meta")(torch.zeros(2, 1, 8, dtype=torch.long, device="meta"))
    assert logits.is_meta and logits.shape == (2, 1, 8, 256)


def test_a_frozen_parameter_does_not_decay():
    model = build(d_model=8)
    model.embedding.requires_grad_(False)
    assert "embedding" not in model.decayed_parameters()
    assert "unembedding" in model.decayed_parameters()


def test_no_replicas_are_refused():
    with pytest.raises(ValueError, match="n_replicas must be at least 1, got 0"):
        AdaptiveTransformer(TransformerConfig(), 0)
