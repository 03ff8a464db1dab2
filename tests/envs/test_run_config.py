"""The options of a run: which are refused, in what words, and which knobs they leave."""

import re
import warnings

import pytest

from envs.transformer_run import RunConfig, build_run
from models import AdaptiveTransformer
from models.flops import matrix_weights


def test_an_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"unknown key 'd_modle'.*Known: .*mean 'd_model'"):
        build_run(1, {"d_modle": 16})


@pytest.mark.parametrize("horizon", ["x", [20, "y"], 20.5, [1, 2, 3], []])
def test_all_types_that_a_value_may_have_are_said(horizon):
    words = rf"horizon must be a whole number or a list of 2 whole numbers, got {horizon!r}"
    with pytest.raises(ValueError, match=re.escape(words)):
        build_run(1, {"horizon": horizon, "compile": "perhaps"})


def test_a_base_that_is_a_knob_may_begin_below_the_useful_bound_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RunConfig(context=4096).transformer().context == 4096


@pytest.mark.parametrize("unique_bytes", [3, [], [1, "y"], [1, 2, 3]])
def test_a_list_of_a_certain_length_is_told_as_a_whole(unique_bytes):
    words = f"unique_bytes must be a list of 2 whole numbers, got {unique_bytes!r}"
    with pytest.raises(ValueError, match=re.escape(words)):
        build_run(1, {"unique_bytes": unique_bytes})


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"horizon": 0}, ("horizon", "0")),
        ({"budget": "flop"}, ("budget", "'flop'", "steps, flops")),
        ({"budget": "flops", "disturb": 0.3}, ("disturb", "0.3", "flops")),
        ({"horizon": (5, 2)}, ("horizon", "low <= high", "(5, 2)")),
        ({"default_dropout": 0.7}, ("default_dropout", "0.6", "0.7")),
        ({"knobs": ()}, ("knobs must name at least one", "[]")),
        (
            {"rotation": "nope", "knobs": ("rope_base",)},
            ("at least one knob that moves", "rope_base"),
        ),
        (
            {
                "rotation": {"variant": "free", "orthogonality_weight": 50.0},
                "knobs": ("orthogonality_weight",),
            },
            ("orthogonality_weight", "[0.001, 10]", "50"),
        ),
        ({"learning_rate": 0.0}, ("learning_rate", "0.0")),
        ({"learning_rate": float("nan")}, ("learning_rate", "nan")),
        ({"learning_rate": (2e-3, 1e-3)}, ("learning_rate", "(0.002, 0.001)")),
        ({"weight_decay": 0.0, "knobs": ("weight_decay",)}, ("weight_decay", "above 0")),
        ({"batch_size": 0}, ("batch_size", "0")),
        ({"warmup": 1.0}, ("warmup", "1.0")),
        ({"dtype": "float16"}, ("dtype", "float16")),
        ({"d_model": 30}, ("d_model=30", "n_heads=4")),
        ({"device": "abacus"}, ("device", "abacus")),
    ],
)
def test_a_bad_option_is_refused_by_name_and_value(options, parts):
    with pytest.raises(ValueError) as error:
        RunConfig(**options)
    for part in parts:
        assert part in str(error.value)


def test_a_base_of_one_pair_alone_is_no_knob():
    def names(**options):
        return [knob.name for knob in RunConfig(**options).chosen_knobs()]

    assert "rope_base" in names(d_model=16) and "rope_base" not in names(d_model=8)
    assert "rope_base" in names(d_model=8, rotation="polar")  # a frequency for each channel


@pytest.mark.parametrize(
    ("n_runs", "options"),
    [
        (10**8, {}),
        (1, {"n_layers": 10**9}),
        (1, {"d_model": 10**9}),
        (1, {"batch_size": 10**9}),
        (1, {"context": 10**9, "rotation": "nope", "knobs": ("dropout",)}),
    ],
)
def test_runs_that_cannot_fit_are_refused_before_anything_is_allocated(n_runs, options):
    with pytest.raises(MemoryError, match=r"GB or more, and 'cpu' has [\d.]+ GB"):
        build_run(n_runs, options)


def test_what_is_counted_is_less_than_what_is_needed():
    config = RunConfig(n_layers=3, d_model=64, feed_forward="swiglu")
    model = AdaptiveTransformer(config.transformer())
    assert 0.9 < matrix_weights(config.transformer()) / model.count_parameters() < 1
