"""Differences to plain RoPE, paired by seed, with 95 % bootstrap intervals."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.rotation.depth import DEPTHS
from benchmarks.rotation.recipes import LONGER_ARMS, variant_of
from metactl.knobs import FloatArray
from metactl.statistics import paired_difference
from models.rotary import parse_rotation

Results = Mapping[str, Any]


def comparison(results: Results, tasks: list[str]) -> dict[str, Any]:
    """What the results say, as far as they are there.

    Every interval is one of many: of 100 arms that are no better than plain RoPE, five or more
    (with few seeds a percentile bootstrap is narrow) seem to differ.
    """
    report: dict[str, Any] = {}
    for task in tasks:
        arms = _below(results, task)
        if "rope" in arms:
            report[task] = {arm: _arm(arm, arms) for arm in arms if arm not in LONGER_ARMS}
    report["depth"] = _depths(_below(results, "depth"))
    return report


def _below(results: Results, first: str) -> dict[str, Any]:
    prefix = f"{first}/"
    return {
        name.removeprefix(prefix): each for name, each in results.items() if name.startswith(prefix)
    }


def _arm(arm: str, arms: Results) -> dict[str, Any]:
    own, rope = arms[arm], arms["rope"]
    geometry = {name: _array(values) for name, values in own["geometry"].items()}
    norms = [geometry[f"{kind}_norm_change_turned"].max() for kind in ("query", "key")]
    report: dict[str, Any] = {
        "parameters": own["parameters"],
        "time_ratio": own["time_ratio"],
        "tests": {name: _test(test, rope["tests"][name]) for name, test in own["tests"].items()},
        "loss_minus_rope_at_equal_time": _at_equal_time(own, arms),
        "greatest_norm_change": float(np.max(norms)),
    }
    rotation = parse_rotation(variant_of(arm))
    if rotation.givens or rotation.orthogonal:
        before, block = geometry["correlation_projection"], geometry["correlation_block"]
        plain = _array(rope["geometry"]["correlation_projection"])
        report["correlation"] = {
            "block_minus_before": _difference(block, before),
            "block_minus_plain_rope": _difference(block, plain),
            "random_minus_before": _difference(geometry["correlation_random"], before),
        }
    if "scaled_at_test" in own:
        report["scaled_at_test"] = {
            scaling: {name: _test(test, own["tests"][name]) for name, test in tests.items()}
            for scaling, tests in own["scaled_at_test"].items()
        }
    return report


def _test(own: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for what in ("loss", "accuracy"):
        left, right = _array(own[what]), _array(rope[what])
        report[what] = float(left.mean())
        report[f"{what}_minus_rope"] = _difference(left, right)
    return report


def _at_equal_time(own: Mapping[str, Any], arms: Results) -> dict[str, Any] | None:
    """Against plain RoPE trained for as long, on the clock.

    RoPE's loss is read between trainings of fewer and more steps, each with its own whole
    schedule: linear in the log of the steps, seed by seed. `clipped` says that the arm's time is
    outside of what RoPE was trained for, and that its nearest end was taken.
    """
    trained = {factor: arms[name] for name, factor in LONGER_ARMS.items() if name in arms}
    trained[1.0] = arms["rope"]
    factors = np.array(sorted(trained))
    losses = np.stack([_array(trained[factor]["tests"]["test"]["loss"]) for factor in factors])
    ratio = own["time_ratio"]
    at = np.log(np.clip(ratio, factors[0], factors[-1]))
    rope = np.array([np.interp(at, np.log(factors), each) for each in losses.T])
    difference = _difference(_array(own["tests"]["test"]["loss"]), rope)
    clipped = not factors[0] <= ratio <= factors[-1]
    return None if difference is None else {**difference, "clipped": bool(clipped)}


def _depths(results: Results) -> dict[str, Any]:
    """Geometric means of the gradient ratios, and the block's over plain RoPE's as a log."""
    report: dict[str, Any] = {}
    for n_layers in DEPTHS:
        rope, block = (results.get(f"{rotation}/{n_layers}") for rotation in ("rope", "block"))
        if rope is None or block is None:
            continue
        report[str(n_layers)] = {}
        for when in rope:
            logs = [np.log(_array(each[when])) for each in (rope, block)]
            report[str(n_layers)][when] = {
                "rope": float(np.exp(logs[0].mean())),
                "block": float(np.exp(logs[1].mean())),
                "log_block_minus_log_rope": _difference(logs[1], logs[0]),
            }
    return report


def _array(values: list[float | None]) -> FloatArray:
    return np.array(values, dtype=np.float64)


def _difference(left: FloatArray, right: FloatArray) -> dict[str, float] | None:
    """Mean of left - right with its interval; `None` where a training diverged."""
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return None
    return asdict(paired_difference(left, right))
