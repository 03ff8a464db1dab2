"""Every rotation that a known library has too: from the same weights, the same numbers.

The libraries round frequencies to float32, whatever they turn, hence the tolerances: an angle of
a hundred radians is good to about 1e-5. Where frequencies can be handed over, the bound is 1e-12.
"""

import math
import warnings

import pytest
import rotary_embedding_torch
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from models import AdaptiveTransformer, TransformerConfig
from models.rotary import LayerTurn, Rotary, Shape, parse_rotation
from models.rotary.frequencies import inverse_frequencies, scaled_frequencies
from models.rotary.orthogonal import cayley, exponential, householder

HEADS, DIM, SEQ, BASE = 4, 8, 24, 100.0
EXACT = {"atol": 1e-12, "rtol": 0}
CLOSE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(scope="module")
def x_transformers():
    with warnings.catch_warnings():
        # Its attend.py calls torch.jit.script at import, which torch has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        from x_transformers import x_transformers
    return x_transformers


@pytest.fixture(scope="module")
def transformers():
    import transformers.models.llama.modeling_llama  # takes seconds: not at collection

    return transformers


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(rotation, base=BASE, *, head_dim=DIM, context=SEQ):
    """One replica's rotation of one layer in float64, its parameters drawn at random."""
    shape = Shape(
        n_replicas=1,
        n_layers=1,
        n_heads=HEADS,
        d_model=HEADS * head_dim,
        head_dim=head_dim,
        context=context,
        dtype=torch.float64,
    )
    module = Rotary(parse_rotation(rotation), shape).requires_grad_(False)
    for i, parameter in enumerate(module.parameters()):
        parameter.copy_(0.4 * normal(*parameter.shape, seed=i))
    module.refresh(torch.full((1,), math.log(base), dtype=torch.float64), torch.ones(1))
    return module


def prepared(module, seq=SEQ):
    return module.prepare(seq, torch.ones(1, dtype=torch.float64))


def turned(module, q, k):
    """Queries and keys `[head, seq, dim]`, turned."""
    qk = torch.stack((q, k)).permute(2, 0, 1, 3)[None, None]
    turn = LayerTurn(prepared(module, q.shape[1]), 0, HEADS, polar=module.config.polar)
    return turn.queries_keys(qk)[0, 0].permute(1, 2, 0, 3).unbind()


def queries_and_keys(seq=SEQ, dim=DIM):
    return normal(2, HEADS, seq, dim).unbind()


def halves(x):
    """Channels in the order of libraries that turn channel i with channel i + dim / 2."""
    return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)


def biases(module, seq):
    """`[head, query, key]`; what is said of future keys does not count."""
    by_distance = prepared(module, seq).by_distance[0, 0]
    distance = torch.arange(seq)[:, None] - torch.arange(seq)
    return by_distance[:, distance.clamp(min=0)].tril()


# rotary-embedding-torch and x-transformers ----------------------------------------------------

SAME = {
    "rope": ({}, {}),
    "partial": ({"dim": DIM // 2}, {"dim": DIM // 2}),
    "linear": ({"interpolate_factor": 4.0}, {"interpolation_factor": 4.0}),
    "ntk": ({"theta_rescale_factor": 4.0}, {"base_rescale_factor": 4.0}),
}


@pytest.mark.parametrize("rotation", SAME)
def test_queries_and_keys_turn_as_in_rotary_embedding_torch(rotation):
    options = {"dim": DIM, "theta": BASE, "cache_if_possible": False, **SAME[rotation][0]}
    library = rotary_embedding_torch.RotaryEmbedding(**options).double()
    vectors = queries_and_keys()
    for x, ours in zip(vectors, turned(build(rotation), *vectors), strict=True):
        torch.testing.assert_close(ours, library.rotate_queries_or_keys(x), **CLOSE)


@pytest.mark.parametrize("rotation", SAME)
def test_queries_and_keys_turn_as_in_x_transformers(rotation, x_transformers):
    options = {"dim": DIM, "base": BASE, **SAME[rotation][1]}
    freqs, scale = x_transformers.RotaryEmbedding(**options).double().forward_from_seq_len(SEQ)
    vectors = queries_and_keys()
    for x, ours in zip(vectors, turned(build(rotation), *vectors), strict=True):
        wanted = x_transformers.apply_rotary_pos_emb(x, freqs, scale)
        torch.testing.assert_close(ours, wanted, **CLOSE)


def test_learned_frequencies_turn_as_in_rotary_embedding_torch_to_the_last_digits():
    module, (q, k) = build("frequencies"), queries_and_keys()
    ours = turned(module, q, k)
    plain = BASE ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    for head, log_frequency in enumerate(module.learned.log_frequency[0, 0]):
        library = rotary_embedding_torch.RotaryEmbedding(
            DIM, custom_freqs=plain * log_frequency.exp(), learned_freq=True
        ).double()
        for x, each in zip((q, k), ours, strict=True):
            wanted = library.rotate_queries_or_keys(x[head])
            torch.testing.assert_close(each[head], wanted, **EXACT)


def test_xpos_logits_are_those_of_both_libraries(x_transformers):
    """They count positions from the middle: another factor on q and on k, the same product."""
    q, k = queries_and_keys()
    ours_q, ours_k = turned(build("xpos"), q, k)
    options = {"theta": BASE, "use_xpos": True, "cache_if_possible": False}
    library = rotary_embedding_torch.RotaryEmbedding(DIM, **options).double()
    their_q, their_k = library.rotate_queries_and_keys(q, k)
    torch.testing.assert_close(ours_q @ ours_k.mT, their_q @ their_k.mT, atol=1e-4, rtol=0)
    library = x_transformers.RotaryEmbedding(DIM, use_xpos=True, base=BASE).double()
    freqs, scale = library.forward_from_seq_len(SEQ)
    their_q = x_transformers.apply_rotary_pos_emb(q, freqs, scale)
    their_k = x_transformers.apply_rotary_pos_emb(k, freqs, scale**-1)
    torch.testing.assert_close(ours_q @ ours_k.mT, their_q @ their_k.mT, atol=1e-4, rtol=0)


def test_polar_vectors_are_those_of_x_transformers(x_transformers):
    module, (q, k) = build("polar"), queries_and_keys()
    library = x_transformers.PolarEmbedding(DIM, HEADS, base=BASE).double()
    phase = module.learned.key_phase[0, 0, :, None].remainder(2 * math.pi) - 2 * math.pi
    library.learned_bias.data.copy_(phase)  # it keeps phases within -2 pi .. 0
    freqs, bias = library(torch.arange(SEQ))
    ours = turned(module, q, k)
    for x, freqs_of, each in ((q, freqs, ours[0]), (k, freqs + bias, ours[1])):
        wanted = x_transformers.apply_polar_pos_emb(x, freqs_of)
        torch.testing.assert_close(halves(each), wanted, **CLOSE)


def test_biases_are_those_of_x_transformers(x_transformers):
    t5, alibi, seq = build("t5", context=300), build("alibi", context=300), 300
    library = x_transformers.RelativePositionBias(1.0, causal=True, heads=HEADS).double()
    library.relative_attention_bias.weight.data.copy_(t5.relative.table[0, 0].T)
    torch.testing.assert_close(biases(t5, seq), library(seq, seq).tril(), **EXACT)
    slopes = alibi.relative.log_slope[0, 0].exp().tolist()
    wanted = x_transformers.AlibiPositionalBias(HEADS, slopes=slopes)(seq, seq).tril()
    torch.testing.assert_close(biases(alibi, seq).float(), wanted, atol=0, rtol=1e-5)


# transformers ---------------------------------------------------------------------------------


def llama_config(transformers, scaling, base, head_dim, trained, **shape):
    """A Llama whose rotation is one of ours, four times longer than in training."""
    rope = {"rope_type": scaling or "default", "rope_theta": base}
    if scaling:
        rope["factor"] = 4.0
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = trained
    return transformers.LlamaConfig(
        hidden_size=HEADS * head_dim,
        num_attention_heads=HEADS,
        max_position_embeddings=trained,
        rope_parameters=rope,
        **shape,
    )


@pytest.mark.parametrize("scaling", [None, "linear", "dynamic", "yarn"])
@pytest.mark.parametrize("base", [500.0, 10_000.0])
def test_queries_and_keys_turn_as_in_llama(scaling, base, transformers):
    llama = transformers.models.llama.modeling_llama
    dim, trained, seq = 32, 1024, 4096
    rotary = llama.LlamaRotaryEmbedding(llama_config(transformers, scaling, base, dim, trained))
    q, k = queries_and_keys(seq, dim)
    cos, sin = rotary(q, torch.arange(seq)[None])
    module = build({"scaling": scaling}, base, head_dim=dim, context=seq)
    inv_freq = prepared(module, seq).turn[0, 0, 1, 0].angle()
    torch.testing.assert_close(inv_freq.float(), rotary.inv_freq, atol=0, rtol=2e-6)
    ours = turned(module, q, k)
    wanted = llama.apply_rotary_pos_emb(halves(q)[None], halves(k)[None], cos, sin)
    for each, theirs in zip(ours, wanted, strict=True):  # its angles lose digits after that
        near = halves(each)[:, :200], theirs[0, :, :200]
        torch.testing.assert_close(*near, atol=1e-4, rtol=0)


@pytest.mark.parametrize("factor", [1.0, 4.0, 32.0])
def test_yarn_warms_logits_by_the_square_of_llamas_factor(factor, transformers):
    config = llama_config(transformers, "yarn", BASE, DIM, 6)
    config.rope_parameters["factor"] = factor
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    module = build({"scaling": "yarn", "scaling_factor": factor, "trained_context": 6})
    q, k = queries_and_keys()
    for x, each in zip((q, k), turned(module, q, k), strict=True):
        ratio = each.norm(dim=-1) / x.norm(dim=-1)
        wanted = torch.full_like(ratio, rotary.attention_scaling)
        torch.testing.assert_close(ratio, wanted, **EXACT)


@pytest.mark.parametrize(
    ("base", "trained", "slowed"), [(1.0, 256, False), (2.0, 2000, False), (1.5, 3, True)]
)
def test_yarn_stays_sound_where_all_pairs_turn_alike(base, trained, slowed):
    """Near base 1 the blend has no pair between its ends: all kept, or all but the first slowed."""
    log_base = torch.tensor([base], dtype=torch.float64).log()
    scaled = scaled_frequencies(log_base, DIM, "yarn", 4.0, trained, trained)
    plain = inverse_frequencies(log_base, DIM)
    torch.testing.assert_close(scaled[:, 1:], plain[:, 1:] / (4 if slowed else 1), **EXACT)


def test_t5_biases_are_those_of_transformers(transformers):
    config = transformers.T5Config(d_model=8, d_kv=2, num_heads=HEADS, is_decoder=True)
    attention = transformers.models.t5.modeling_t5.T5Attention
    attention = attention(config, has_relative_attention_bias=True, layer_idx=0).double()
    module, seq = build("t5", context=300), 300
    attention.relative_attention_bias.weight.data.copy_(module.relative.table[0, 0].T)
    wanted = attention.compute_bias(seq, seq)[0].tril()
    torch.testing.assert_close(biases(module, seq), wanted, **EXACT)


@pytest.mark.parametrize("n_heads", [1, 2, 8, 16])
@torch.no_grad()
def test_alibi_starts_from_the_slopes_of_bloom_and_mpt(n_heads, transformers):
    models = transformers.models
    shape = Shape(
        n_replicas=1, n_layers=1, n_heads=n_heads, d_model=4 * n_heads, head_dim=4, context=SEQ
    )
    module = Rotary(parse_rotation("alibi"), shape)
    module.initialise(0, torch.Generator())
    module.refresh(torch.ones(1), torch.ones(1))
    last_query = biases(module, SEQ)[:, -1]
    mpt = models.mpt.modeling_mpt.build_mpt_alibi_tensor(n_heads, SEQ)
    torch.testing.assert_close(last_query, mpt[:, 0], atol=0, rtol=1e-5)
    everywhere = torch.ones(1, SEQ, dtype=torch.long)
    bloom = models.bloom.modeling_bloom.build_alibi_tensor(everywhere, n_heads, torch.float32)
    bloom = bloom[:, 0] - bloom[:, 0, -1:]  # it leaves out what the softmax does not see
    torch.testing.assert_close(last_query, bloom, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def with_weights_of(model, llama):
    """Copies our weights into a Llama of the same shape, channels of a head in its order."""
    state = {
        "model.embed_tokens.weight": model.embedding[0],
        "model.norm.weight": model.final_norm[0],
        "lm_head.weight": model.unembedding[0].T,
    }
    for layer, block in enumerate(model.blocks):
        q, k, v = block["qkv"][0].unflatten(1, (3, HEADS, DIM)).unbind(1)
        gate, up = block["ffn_in"][0].chunk(2, dim=1)
        for name, weight in {
            "input_layernorm": block["attention_norm"][0],
            "post_attention_layernorm": block["ffn_norm"][0],
            "self_attn.q_proj": halves(q).flatten(1),
            "self_attn.k_proj": halves(k).flatten(1),
            "self_attn.v_proj": v.flatten(1),
            "self_attn.o_proj": block["attention_out"][0],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block["ffn_out"][0],
        }.items():
            state[f"model.layers.{layer}.{name}.weight"] = weight.T if weight.dim() > 1 else weight
    llama.load_state_dict(state)
    return llama.double().eval()


@pytest.mark.parametrize("scaling", [None, "linear", "dynamic", "yarn"])
@torch.no_grad()
def test_a_model_with_the_weights_of_a_llama_is_that_llama(scaling, transformers):
    shape = {"d_model": HEADS * DIM, "n_heads": HEADS, "n_layers": 2, "d_ff": 48, "context": 64}
    rotation = {"scaling": scaling}
    config = TransformerConfig(vocab_size=11, feed_forward="swiglu", rotation=rotation, **shape)
    model = AdaptiveTransformer(config, 1, dtype=torch.float64)
    model.initialise([0], [3])
    for i, parameter in enumerate(p for p in model.parameters() if p.dim() == 2):
        parameter.add_(0.3 * normal(*parameter.shape, seed=i))  # gains of the norms
    their_shape = {"num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 11}
    their_config = llama_config(transformers, scaling, 10_000.0, DIM, 16, **their_shape)
    llama = with_weights_of(model, transformers.LlamaForCausalLM(their_config))
    tokens = torch.randint(0, 11, (1, 3, 64), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens)[0], llama(tokens[0]).logits, atol=1e-4, rtol=0)


# torch ----------------------------------------------------------------------------------------


def by_torch(weight, name):
    """torch's own parametrization of a square matrix, with this matrix as its parameter."""
    linear = nn.Linear(DIM, DIM, bias=False, dtype=torch.float64)
    linear = orthogonal(linear, orthogonal_map=name, use_trivialization=False)
    linear.parametrizations.weight.original.data.copy_(weight)
    return linear.weight


@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0, 30.0])
def test_the_exponential_is_that_of_torch_with_its_gradient(scale):
    weight = (scale * normal(2, 3, DIM, DIM)).requires_grad_()
    direction = normal(2, 3, DIM, DIM)
    lower = weight.tril(-1)
    results = []
    for value in (
        exponential(weight),
        torch.linalg.matrix_exp(lower - lower.transpose(-2, -1)),
    ):
        (gradient,) = torch.autograd.grad((value * direction).sum(), weight, retain_graph=True)
        results.append((value, gradient))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_an_exponential_depends_on_no_neighbour_and_lets_nan_pass():
    weight = normal(3, DIM, DIM).float()
    weight[1] *= 100
    weight[2] = float("nan")
    together = exponential(weight)
    assert torch.equal(together[0], exponential(weight[:1])[0])
    assert torch.isfinite(together[1]).all()
    assert together[2].isnan().all()


def test_orthogonal_maps_are_those_of_torch():
    weight = normal(DIM, DIM)
    lower = weight.tril(-1)  # torch reads the diagonal too
    torch.testing.assert_close(exponential(weight), by_torch(lower, "matrix_exp"), **EXACT)
    # torch: (I - A/2)^-1 (I + A/2)
    torch.testing.assert_close(cayley(weight), by_torch(-2 * lower, "cayley"), **EXACT)
    # torch: reflections along columns of a lower triangle with ones on its diagonal
    unit = lower + torch.eye(DIM, dtype=torch.float64)
    torch.testing.assert_close(householder(unit), by_torch(unit, "householder"), **EXACT)
