"""Knobs of a transformer: gates, width levels, validation, what is stored."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import KNOB_NAMES, AdaptiveTransformer, TransformerConfig
from models.width import level_of_channel, nearest_level, stepped_gates

LEVELS = (0.25, 0.5, 0.75, 1.0)


def build(n=1, *, sliced=False, dtype=torch.float64, **shape):
    config = TransformerConfig(**{"vocab_size": 13, "d_model": 16, "context": 12, **shape})
    model = AdaptiveTransformer(config, n, dtype=dtype, sliced=sliced)
    model.initialise(list(range(n)), list(range(n)))
    return model


def tokens(n=1, vocab=13):
    return torch.randint(0, vocab, (n, 2, 12), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_at(model, gates):
    model.knobs.gates.copy_(torch.tensor([gates]).expand_as(model.knobs.gates))
    model.knobs.width_level.fill_(int((torch.tensor(gates) > 0).nonzero().max()))
    model.refresh()
    return model(tokens(model.n_replicas))


# Levels and gates ----------------------------------------------------------------------------


def test_each_channel_belongs_to_the_lowest_level_that_has_it():
    assert level_of_channel(8, LEVELS).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert level_of_channel(6, (0.5, 1.0)).tolist() == [0, 0, 0, 1, 1, 1]


@settings(max_examples=20, deadline=None, database=None)
@given(width=st.floats(0, 1))
def test_no_other_level_is_nearer_than_the_nearest_level(width):
    index = nearest_level(torch.tensor([width], dtype=torch.float64), LEVELS).item()
    assert all(abs(LEVELS[index] - width) <= abs(level - width) for level in LEVELS)


def test_a_width_is_put_to_its_nearest_level():
    model = build(4)
    model.set_knobs({"embedding_width": [0.0, 0.3, 0.7, 0.9]})
    assert model.knobs.values()["embedding_width"].tolist() == [0.25, 0.25, 0.75, 1.0]


@settings(max_examples=20, deadline=None, database=None)
@given(
    gates=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    target=st.integers(0, 3),
    rate=st.floats(0.001, 1),
)
def test_gates_move_by_at_most_the_rate_and_never_past_their_target(gates, target, rate):
    before = torch.tensor([gates], dtype=torch.float64)
    after = stepped_gates(before, torch.tensor([target]), rate)
    wanted = torch.tensor([[1.0 if i <= target else 0.0 for i in range(4)]], dtype=torch.float64)
    assert (after - before).abs().max() <= rate + 1e-12
    assert ((wanted - after).abs() <= (wanted - before).abs()).all()
    assert ((after >= 0) & (after <= 1)).all()


@pytest.mark.parametrize("n_steps", [1, 3, 7, 10, 25, 40, 107, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_n_steps_of_one_nth_close_and_open_the_gates_exactly(n_steps, dtype):
    model = build(dtype=dtype)
    for width, wanted in ((0.25, [1, 0, 0, 0]), (1.0, [1, 1, 1, 1])):
        model.set_knobs({"embedding_width": width})
        for _ in range(n_steps):
            model.knobs.step_gates(1 / n_steps)
        assert model.knobs.gates[0].tolist() == wanted


def test_settled_gates_are_open_up_to_the_level_and_others_stay():
    model = build(3)
    model.set_knobs({"embedding_width": [0.5, 0.25, 0.75]})
    assert model.knobs.gates.eq(1).all()
    model.knobs.settle_gates([0, 2])
    assert model.knobs.gates.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]


def test_a_change_of_width_changes_nothing_before_the_gates_step():
    model = build()
    before = model(tokens())
    model.set_knobs({"embedding_width": 0.25})
    assert torch.equal(model(tokens()), before)


@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
@pytest.mark.parametrize("sliced", [False, True])
def test_a_level_fades_smoothly_between_the_narrower_and_the_full_model(feed_forward, sliced):
    model = build(feed_forward=feed_forward, sliced=sliced)
    narrow, full = logits_at(model, [1, 1, 1, 0.0]), logits_at(model, [1, 1, 1, 1.0])
    torch.testing.assert_close(logits_at(model, [1, 1, 1, 1e-7]), narrow, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits_at(model, [1, 1, 1, 1 - 1e-7]), full, atol=1e-5, rtol=0)
    distance = (full - narrow).abs().max()
    assert distance > 0.1
    for n_steps in (50, 200):  # no step takes much more than its share of the way
        model.set_knobs({"embedding_width": 0.75})
        model.knobs.settle_gates([0])
        model.set_knobs({"embedding_width": 1.0})
        before = narrow
        for _ in range(n_steps):
            model.knobs.step_gates(1 / n_steps)
            after = model(tokens()).detach()
            assert (after - before).abs().max() < 8 * distance / n_steps
            before = after


@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_narrow_model_is_a_smaller_transformer_with_the_prefix_of_each_weight(
    feed_forward, share
):
    model = build(feed_forward=feed_forward)
    model.set_knobs({"embedding_width": share})
    model.knobs.settle_gates([0])
    heads, d = round(4 * share), round(16 * share)
    small = build(feed_forward=feed_forward, d_model=d, n_heads=heads, width_levels=(1.0,))
    wide = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in small.named_parameters():
            source = wide[name]
            joined = {"qkv": 3, "ffn_in": 2 if feed_forward == "swiglu" else 1}
            parts = source.chunk(joined.get(name.rsplit(".", 1)[-1], 1), dim=-1)
            n_parts = len(parts)
            p.copy_(
                torch.cat(
                    [
                        part[tuple(slice(s) for s in (*p.shape[:-1], p.shape[-1] // n_parts))]
                        for part in parts
                    ],
                    dim=-1,
                )
            )
    torch.testing.assert_close(model(tokens()), small(tokens()), atol=1e-10, rtol=1e-10)


def test_parameter_levels_name_exactly_the_parameters_that_get_a_gradient():
    model = build(feed_forward="swiglu")
    seen = torch.arange(13).repeat(2)[None, None, :12]  # tokens 0 .. 11
    for top, width in enumerate(LEVELS):
        model.set_knobs({"embedding_width": width})
        model.knobs.settle_gates([0])
        model.zero_grad()
        model(seen).square().sum().backward()
        for name, level in model.parameter_levels().items():
            grad = model.get_parameter(name).grad[0]
            inactive = level > top
            assert (grad[inactive] == 0).all(), name
            if name != "embedding":
                assert (grad[~inactive] != 0).float().mean() > 0.99, name


# Validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"dropuot": 0.1}, ("Unknown knob 'dropuot'", *KNOB_NAMES)),
        ({"dropout": 1.0}, ("dropout", "0.95", "1.0")),
        ({"dropout": -0.1}, ("dropout", "-0.1")),
        ({"dropout": float("nan")}, ("dropout", "nan")),
        ({"rope_base": 0.5}, ("rope_base", "0.5")),
        ({"attention_span": 13.0}, ("attention_span", "12", "13.0")),
        ({"attention_span": 0.0}, ("attention_span", "0.0")),
        ({"embedding_width": 1.5}, ("embedding_width", "1.5")),
        ({"dropout": [0.1, 2.0]}, ("dropout", "2.0")),
        ({"attention_span": 4.0, "dropout": 2.0}, ("dropout", "2.0")),
    ],
)
def test_a_bad_knob_value_is_refused_by_name_range_and_value_and_changes_nothing(values, parts):
    model = build(2)
    before = {name: value.clone() for name, value in model.knobs.storage().items()}
    with pytest.raises(ValueError) as error:
        model.set_knobs(values)
    for part in parts:
        assert part in str(error.value)
    for name, value in model.knobs.storage().items():
        assert torch.equal(value, before[name])


def test_values_go_to_the_rows_named_and_to_no_other():
    model = build(3)
    model.set_knobs({"dropout": [0.1, 0.3], "attention_span": 4.0}, rows=[2, 0])
    values = model.knobs.values()
    assert values["dropout"].tolist() == pytest.approx([0.3, 0.0, 0.1])
    assert values["attention_span"].tolist() == [4.0, 12.0, 4.0]


@pytest.mark.parametrize("value", ["0.1", None, [0.1, "b"]])
def test_a_value_that_is_no_number_is_refused_by_the_knobs_name(value):
    with pytest.raises(ValueError, match="dropout must be numbers, got"):
        build(2).set_knobs({"dropout": value})


def test_a_value_that_a_gradient_hangs_on_becomes_a_plain_number():
    model = build(2)
    model.set_knobs({"dropout": torch.tensor(0.1, requires_grad=True)})
    assert not model.knobs.dropout.requires_grad
    assert copy.deepcopy(model).knobs.dropout.tolist() == pytest.approx([0.1, 0.1])


def test_a_sliced_model_settles_all_its_gates_or_none():
    model = build(2, sliced=True)
    model.set_knobs({"embedding_width": 0.5})
    before = model.knobs.gates.clone()
    with pytest.raises(ValueError, match="one embedding_width"):
        model.knobs.settle_gates([0])
    assert torch.equal(model.knobs.gates, before)


def test_gates_that_would_not_move_are_refused():
    with pytest.raises(ValueError, match=r"rate of the gates must be above 0, got 0\.0"):
        build(2).knobs.step_gates(0.0)


@pytest.mark.parametrize("rows", [[5], [-1], [True, False]])
def test_rows_that_are_no_indices_are_refused(rows):
    model = build(2)
    with pytest.raises(ValueError, match="rows must be indices below 2, got"):
        model.set_knobs({"dropout": 0.5}, rows)
    assert model.knobs.dropout.tolist() == [0.0, 0.0]


def test_setting_the_knobs_of_no_rows_changes_nothing():
    model = build(2)
    model.set_knobs({"dropout": 0.5, "rope_base": 30.0}, rows=[])
    assert model.knobs.values()["dropout"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "values", [{"attention_span": [4.0, 5.0]}, {"embedding_width": [0.5, 1.0]}]
)
def test_a_sliced_model_refuses_knobs_that_are_not_shared_and_keeps_its_own(values):
    model = build(2, sliced=True)
    (name,) = values
    with pytest.raises(ValueError, match="one " + name):
        model.set_knobs(values)
        model.knobs.settle_gates([0, 1])
    kept = model.knobs.values()[name]
    assert kept[0] == kept[1]


def test_setting_the_defaults_leaves_every_stored_bit():
    for dtype in (torch.float32, torch.float64):
        model = build(2, dtype=dtype)
        before = {name: value.clone() for name, value in model.knobs.storage().items()}
        model.set_knobs(
            {"rope_base": 10_000.0, "attention_span": 12.0, "embedding_width": 1.0, "dropout": 0.0}
        )
        for name, value in model.knobs.storage().items():
            assert torch.equal(value, before[name]), name


# Storage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sliced", [False, True])
def test_a_state_dict_restores_outputs_and_knobs_with_gates_half_open(sliced):
    model = build(2, sliced=sliced)
    model.set_knobs(
        {"rope_base": 77.0, "attention_span": 3.0, "embedding_width": 0.5, "dropout": 0.2}
    )
    model.knobs.step_gates(0.4)
    other = build(2, sliced=sliced)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens(2)), model(tokens(2)))
    for name, value in model.knobs.storage().items():
        assert torch.equal(other.knobs.storage()[name], value), name
    for m in (model, other):
        m.knobs.step_gates(0.4)
    assert other.knobs.gates.tolist() == model.knobs.gates.tolist()
    assert torch.equal(other(tokens(2)), model(tokens(2)))


def test_a_changed_base_changes_outputs_at_once_and_back_again():
    model = build(2)
    before = model(tokens(2))
    model.set_knobs({"rope_base": [10_000.0, 20.0]})
    moved = model(tokens(2))
    assert torch.equal(moved[0], before[0]) and not torch.allclose(moved[1], before[1])
    model.set_knobs({"rope_base": 10_000.0})
    assert torch.equal(model(tokens(2)), before)
