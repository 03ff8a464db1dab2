"""Every rotation against its definition, written out slowly: loops, complex numbers, matrices."""

import cmath
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models import AdaptiveTransformer, TransformerConfig
from models.cache import KeyValueCache
from models.rotary import LayerTurn, Rotary, Shape, parse_rotation
from models.rotary.orthogonal import householder
from models.rotary.pairs import rotate_pairs

HEADS, DIM, SEQ, LAYERS, BASE = 2, 8, 24, 2, 100.0
PAIRS = DIM // 2
CELLS = list(itertools.product(range(LAYERS), range(HEADS)))
EXACT = {"atol": 1e-12, "rtol": 0}
CLOSE = {"atol": 1e-10, "rtol": 0}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@torch.no_grad()
def disturb(rotation):
    """Draws every parameter at random, away from where it starts."""
    for i, parameter in enumerate(rotation.parameters()):
        parameter.copy_(0.4 * normal(*parameter.shape, seed=i))


def build(rotation, bases=(BASE,), scale=1.0, *, head_dim=DIM, context=SEQ, dtype=torch.float64):
    """A disturbed rotation; `bases` by replica, or by replica, layer and head."""
    log_base = torch.as_tensor(bases, dtype=torch.float64).log()
    shape = Shape(
        n_replicas=len(log_base),
        n_layers=LAYERS,
        n_heads=HEADS,
        d_model=HEADS * head_dim,
        head_dim=head_dim,
        context=context,
        dtype=dtype,
    )
    module = Rotary(parse_rotation(rotation), shape)
    disturb(module)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    module.refresh(log_base.to(precise), torch.full((len(log_base),), scale, dtype=precise))
    return module.requires_grad_(False)


def prepared(module, seq=SEQ, offset=0):
    return module.prepare(seq, torch.ones(module.shape.n_replicas, dtype=torch.float64), offset)


def turned(module, qk, layer=0):
    """Queries and keys `[replica, batch, seq, 2, head, dim]`, turned as a layer turns them."""
    polar = module.config.polar
    return LayerTurn(prepared(module, qk.shape[2]), layer, HEADS, polar=polar).queries_keys(qk)


def by_complex_numbers(vector, angles):
    """Python's own complex numbers, pair by pair."""
    pairs = zip(vector[::2], vector[1::2], angles, strict=True)
    spun = [complex(x, y) * cmath.exp(1j * angle) for x, y, angle in pairs]
    return exact([part for z in spun for part in (z.real, z.imag)])


def rotation_matrix(angles):
    """Blocks on the diagonal, to be applied to column vectors."""
    turns = [(math.cos(a), math.sin(a)) for a in angles]
    return torch.block_diag(*(exact([[cos, -sin], [sin, cos]]) for cos, sin in turns))


def angles_of(module, m, layer, head, base=BASE, scale=1.0):
    """Radians of each pair at position m: one formula for all that changes RoPE's angles."""
    config, learned = module.config, module.learned
    channels = config.rotary_share * DIM
    base = max(1.0, base * config.base_factors[head % len(config.base_factors)])
    if config.scaling == "ntk":
        base *= config.scaling_factor ** (channels / (channels - 2))
    if config.scaling == "linear":
        m = m / config.scaling_factor
    if learned.log_position_scale is not None:
        m = m * math.exp(learned.log_position_scale[0, layer, head])
    angles = []
    for pair in range(PAIRS):
        speed = base ** (-2 * pair / channels) if 2 * pair < channels else 0.0
        if learned.log_frequency is not None:
            speed *= math.exp(learned.log_frequency[0, layer, head, pair])
        angles.append(m * scale * speed)
    return angles


# Angles ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, database=None)
@given(base=st.floats(1.5, 1e6), scale=st.floats(0.1, 4), head_dim=st.sampled_from([2, 8, 16]))
def test_plain_rope_is_a_complex_product_pair_by_pair(base, scale, head_dim):
    qk = normal(1, 1, SEQ, 2, HEADS, head_dim)
    out = turned(build("rope", (base,), scale, head_dim=head_dim), qk)
    for m in (0, 1, 7, SEQ - 1):
        angles = [m * scale * base ** (-i / head_dim) for i in range(0, head_dim, 2)]
        wanted = by_complex_numbers(qk[0, 0, m, 1, 1].tolist(), angles)
        torch.testing.assert_close(out[0, 0, m, 1, 1], wanted, **CLOSE)


def test_each_replica_layer_and_head_turns_by_the_matrices_of_its_own_base():
    bases = exact([[[20.0, 300.0], [4000.0, 50_000.0]], [[9.0, 1e6], [70.0, 10_000.0]]])
    module, qk = build("head_bases", bases), normal(2, 3, SEQ, 2, HEADS, DIM)
    for layer, head in CELLS:
        out = turned(module, qk, layer)
        for row, m in itertools.product(range(2), (0, 5, SEQ - 1)):
            base = bases[row, layer, head].item()
            matrix = rotation_matrix(angles_of(module, m, layer, head, base))
            wanted = qk[row, :, m, :, head] @ matrix.T
            torch.testing.assert_close(out[row, :, m, :, head], wanted, **EXACT)


def test_a_small_positive_angle_turns_counter_clockwise():
    x = exact([1.0, 0.0]).expand(1, 1, 2, 2, HEADS, 2)
    module = build("rope", head_dim=2, context=2)
    assert turned(module, x)[0, 0, 1, 0, 0].tolist() == pytest.approx([math.cos(1), math.sin(1)])


ALONE = ["partial", "multi_scale", "frequencies", "position_scale", "linear", "ntk"]
MIXED = ["partial+ntk+frequencies", "multi_scale+position_scale+frequencies+linear"]


@pytest.mark.parametrize("rotation", ALONE + MIXED)
def test_what_changes_the_angles_does_so_by_its_formula(rotation):
    module, qk = build(rotation, scale=1.5), normal(1, 1, SEQ, 2, HEADS, DIM)
    for layer, head in CELLS:
        out = turned(module, qk, layer)
        for m in (0, 3, SEQ - 1):
            angles = angles_of(module, m, layer, head, scale=1.5)
            wanted = by_complex_numbers(qk[0, 0, m, 0, head].tolist(), angles)
            torch.testing.assert_close(out[0, 0, m, 0, head], wanted, **CLOSE)


def test_factors_of_the_base_belong_to_the_heads_in_turn():
    module, qk = build({"base_factors": (0.3, 7.0)}), normal(1, 1, SEQ, 2, HEADS, DIM)
    for head in range(HEADS):
        wanted = qk[0, 0, 9, :, head] @ rotation_matrix(angles_of(module, 9, 0, head)).T
        ours = turned(module, qk)[0, 0, 9, :, head]
        torch.testing.assert_close(ours, wanted, **EXACT)


def test_position_zero_is_left_bit_for_bit():
    qk = normal(2, 3, 5, 2, HEADS, DIM)
    assert torch.equal(turned(build("rope", (7.0, 1e5)), qk)[:, :, 0], qk[:, :, 0])


def test_bfloat16_is_turned_in_float32_and_comes_back_as_bfloat16():
    qk = normal(1, 1, 2048, 2, HEADS, DIM).bfloat16()
    module = build("rope", (10_000.0,), context=2048, dtype=torch.bfloat16)
    assert prepared(module, 2048).turn.dtype == torch.complex64
    out = turned(module, qk)
    assert out.dtype == torch.bfloat16
    wanted = turned(build("rope", (10_000.0,), context=2048), qk.double())
    # half a unit in the last place of bfloat16, and no phase lost at position 2047
    assert (out.double() - wanted).abs().max() < 2**-8 * wanted.abs().max()


def test_a_change_of_base_refreshes_the_table_in_place():
    module, qk = build("rope", (100.0, 100.0)), normal(2, 1, 8, 2, HEADS, DIM)
    table = module.table
    module.refresh(exact([100.0, 9.0]).log(), torch.ones(2))
    assert module.table is table
    assert torch.equal(turned(module, qk), turned(build("rope", (100.0, 9.0)), qk))


def test_turning_has_the_right_gradient():
    x, angles = normal(3, 5, 6).requires_grad_(), normal(5, 3, seed=1)
    assert torch.autograd.gradcheck(lambda x: rotate_pairs(x, (1j * angles).exp()), (x,))


# Magnitudes -----------------------------------------------------------------------------------


def test_xpos_weighs_each_pair_by_a_power_of_the_distance():
    qk = normal(1, 1, SEQ, 2, HEADS, DIM)
    ours = turned(build("xpos"), qk)[0, 0, :, :, 1]
    q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in qk[0, 0, :, :, 1].unbind(1))
    for m, n in itertools.product(range(SEQ), (0, 7, SEQ - 1)):
        wanted = 0.0
        for pair in range(PAIRS):
            decay = ((pair / PAIRS + 0.4) / 1.4) ** ((m - n) / 512)
            turn = cmath.exp(1j * (m - n) * BASE ** (-pair / PAIRS))
            wanted += decay * (complex(q[m, pair]) * complex(k[n, pair]).conjugate() * turn).real
        assert (ours[m, 0] @ ours[n, 1]).item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("rotation", ["polar", "polar+temperature"])
def test_polar_logits_are_cosines_weighed_by_positive_magnitudes(rotation):
    module, qk = build(rotation), normal(1, 1, SEQ, 2, HEADS, DIM)
    learned, size = module.learned, torch.log1p(qk.exp())[0, 0]
    for layer, head in CELLS:
        ours = turned(module, qk, layer)[0, 0, :, :, head]
        warm = learned.log_temperature
        warm = 1.0 if warm is None else math.exp(warm[0, layer, head])
        for m, n in itertools.product((0, 5, SEQ - 1), range(0, SEQ, 5)):
            wanted = 0.0
            for c in range(DIM):
                angle = (m - n) * BASE ** (-c / DIM) - learned.key_phase[0, layer, head, c].item()
                wanted += size[m, 0, head, c].item() * size[n, 1, head, c].item() * math.cos(angle)
            assert (ours[m, 0] @ ours[n, 1]).item() == pytest.approx(warm * wanted, abs=1e-12)


# Matrices -------------------------------------------------------------------------------------


def rounds(schedule):
    """Who meets whom: in a tournament of DIM seats, or where indices differ in one bit."""

    def meeting(i, j):
        if schedule == "butterfly":
            return i ^ j
        return (2 * i if j == DIM - 1 else i + j) % (DIM - 1)

    in_order = [1, 2, 4] if schedule == "butterfly" else [2 * r % 7 for r in range(7)]
    pairs = list(itertools.combinations(range(DIM), 2))
    return [[pair for pair in pairs if meeting(*pair) == each] for each in in_order]


def matrices_by_hand(module, layer, head, strength=1.0):
    """What is applied to queries and to keys as row vectors: one plane after the other, then R."""
    config, product = module.config, torch.eye(DIM, dtype=torch.float64)
    angles = [] if config.givens is None else module.givens.angles[0, layer, head].tolist()
    for of_rotation in angles:
        for pairs, of_round in zip(rounds(config.givens), of_rotation, strict=True):
            for (i, j), angle in zip(pairs, of_round, strict=True):
                plane = torch.eye(DIM, dtype=torch.float64)
                cos, sin = math.cos(strength * angle), math.sin(strength * angle)
                plane[[i, j, i, j], [i, j, j, i]] = exact([cos, cos, sin, -sin])
                product = product @ plane
    if config.orthogonal is not None:
        product = product @ module.orthogonal.weight[0, layer, head]
    temperature = module.learned.log_temperature
    warm = 1.0 if temperature is None else math.exp(temperature[0, layer, head])
    return warm * product, product


@pytest.mark.parametrize("schedule", ["round_robin", "butterfly"])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_givens_rotations_are_products_of_planes_followed_by_r(schedule, strength):
    module = build({"givens": schedule, "n_rotations": 2, "orthogonal": "free"})
    matrix = module.prepare(SEQ, torch.full((1,), strength, dtype=torch.float64)).query_matrix
    for layer, head in CELLS:
        wanted, _ = matrices_by_hand(module, layer, head, strength)
        torch.testing.assert_close(matrix[0, layer, head], wanted, **EXACT)


def test_the_householder_map_is_a_product_of_reflections():
    weight, eye = normal(3, DIM, DIM), torch.eye(DIM, dtype=torch.float64)
    for columns, ours in zip(weight, householder(weight), strict=True):
        reflections = [eye - 2 * torch.outer(v, v) / (v @ v) for v in columns.T]
        torch.testing.assert_close(ours, torch.linalg.multi_dot(reflections), **EXACT)


# Content and biases ---------------------------------------------------------------------------


def accumulated_by_hand(module, x, layer):
    """phi_m of every head and pair, one token after the other; the first token adds nothing."""
    inward, outward = module.conditional.inward[0, layer], module.conditional.outward[0, layer]
    phi = [torch.zeros(HEADS, PAIRS, dtype=torch.float64)]
    for token in x[1:]:
        units = torch.tanh(token @ inward)
        phi.append(phi[-1] + torch.stack([units @ outward[head] for head in range(HEADS)]))
    return torch.stack(phi)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_conditional_angles_add_up_token_by_token_also_in_two_parts(layer):
    module, x = build("conditional"), normal(2, SEQ, HEADS * DIM)
    wanted = torch.stack([accumulated_by_hand(module, each, layer) for each in x])[None]
    whole = module.conditional_angles(x.reshape(1, -1, HEADS * DIM), layer, HEADS, 2, None)
    torch.testing.assert_close(whole, wanted, **EXACT)
    rest = x[:, 10:].reshape(1, -1, HEADS * DIM)
    rest = module.conditional_angles(rest, layer, HEADS, 2, whole[:, :, 9])
    torch.testing.assert_close(rest, wanted[:, :, 10:], **EXACT)


def t5_bias(p, at, m, n):
    d = m - n
    bucket = d if d < 16 else min(31, 16 + int(16 * math.log(d / 16) / math.log(128 / 16)))
    return p.table[at][bucket].item()


def alibi_bias(p, at, m, n):
    return -math.exp(p.log_slope[at]) * (m - n)


def kerple_bias(p, at, m, n):
    return -math.exp(p.log_r1[at]) * math.log(1 + math.exp(p.log_r2[at]) * (m - n))


def fire_bias(p, at, m, n):
    c = math.exp(p.log_c[at[:2]])
    x = math.log(1 + c * (m - n)) / math.log(1 + c * max(p.trained_context, m))
    units = zip(p.inward[at[:2]].tolist(), p.shift[at[:2]].tolist(), strict=True)
    units = [max(0.0, inward * x + shift) for inward, shift in units]
    return sum(w * unit for w, unit in zip(p.outward[at].tolist(), units, strict=True))


BIASES = {"t5": t5_bias, "alibi": alibi_bias, "kerple": kerple_bias, "fire": fire_bias}


@pytest.mark.parametrize("name, trained", [(name, None) for name in BIASES] + [("fire", 40)])
@pytest.mark.parametrize("offset", [0, 150])
def test_a_bias_is_its_formula_at_every_distance(name, trained, offset):
    module = build({"bias": name, "trained_context": trained}, context=200)
    whole = prepared(module, 200, offset)
    grid = itertools.product((0, 20, 150, 199), (0, 19, 20, 140))
    grid = [(m, n) for m, n in grid if max(n, offset) <= m]
    for (layer, head), (m, n) in itertools.product(CELLS, grid):
        if whole.bias is None:
            ours = whole.by_distance[0, layer, head, m - n]
        else:
            ours = whole.bias[0, layer, head, m - offset, n]
        wanted = BIASES[name](module.relative, (0, layer, head), m, n)
        assert ours.item() == pytest.approx(wanted, abs=1e-12)


# A whole model --------------------------------------------------------------------------------


def attention_by_hand(model, weights, x, gain):
    """Head by head and query by query, with rotations as matrices: what is added to the stream."""
    module, config, seq = model.rotation, model.config.rotary, len(x)
    qkv = ((x * gain) @ weights["qkv"]).view(seq, 3, HEADS, DIM)
    out, phi = torch.zeros_like(qkv[:, 0]), torch.zeros(seq, HEADS, PAIRS, dtype=torch.float64)
    if config.conditional:
        phi = accumulated_by_hand(module, x, 0)
    for head in range(HEADS):
        angles = [exact(angles_of(module, m, 0, head)) + phi[m, head] for m in range(seq)]
        turns = [rotation_matrix(each) for each in angles]
        g_q, g_k = matrices_by_hand(module, 0, head)
        q, k, v = qkv[:, :, head].unbind(1)
        q = [r @ (each @ g_q) for r, each in zip(turns, q, strict=True)]
        k = [r @ (each @ g_k) for r, each in zip(turns, k, strict=True)]
        if config.value_rotation:
            v = [r @ each for r, each in zip(turns, v, strict=True)]
        for m in range(seq):
            logits = torch.stack([q[m] @ k[n] / math.sqrt(DIM) for n in range(m + 1)])
            if config.bias:
                at = (module.relative, (0, 0, head), m)
                logits += exact([BIASES[config.bias](*at, n) for n in range(m + 1)])
            mixed = sum(a * v[n] for n, a in enumerate(logits.softmax(0)))
            out[m, head] = turns[m].T @ mixed if config.value_rotation else mixed
    return out.flatten(1) @ weights["attention_out"]


def logits_by_hand(model, tokens):
    def normalised(x):
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()

    weights = {name.rsplit(".", 1)[-1]: p[0] for name, p in model.named_parameters()}
    x = weights["embedding"][tokens]
    x = x + attention_by_hand(model, weights, normalised(x), weights["attention_norm"])
    hidden = F.gelu((normalised(x) * weights["ffn_norm"]) @ weights["ffn_in"])
    x = x + hidden @ weights["ffn_out"]
    return (normalised(x) * weights["final_norm"]) @ weights["unembedding"]


FIRE = {"bias": "fire", "trained_context": 4, "value_rotation": True}
WHOLE = ["rope", "value", "conditional+value+frequencies", "block+temperature+position_scale"]
BIASED = ["partial+value+t5", "multi_scale+temperature+alibi", "butterfly+kerple", FIRE]


@pytest.mark.parametrize("rotation", WHOLE + BIASED, ids=str)
@pytest.mark.parametrize("sliced", [True, False])
@torch.no_grad()
def test_a_model_computes_what_its_definition_says(rotation, sliced):
    shape = {"d_model": HEADS * DIM, "n_heads": HEADS, "n_layers": 1, "width_levels": (1.0,)}
    config = TransformerConfig(context=12, rope_base=BASE, rotation=rotation, **shape)
    model = AdaptiveTransformer(config, 1, dtype=torch.float64, sliced=sliced)
    model.initialise([0], [5])
    disturb(model.rotation)
    for name, parameter in model.named_parameters():
        if name.endswith("norm"):
            parameter.add_(0.3 * normal(*parameter.shape))
    tokens = torch.randint(0, 256, (1, 1, 12), generator=torch.Generator().manual_seed(0))
    wanted = logits_by_hand(model, tokens[0, 0])
    torch.testing.assert_close(model(tokens)[0, 0], wanted, **CLOSE)
    cache = KeyValueCache()
    model(tokens[:, :, :7], cache=cache)
    torch.testing.assert_close(model(tokens[:, :, 7:], cache=cache)[0, 0], wanted[7:], **CLOSE)
