"""Evaluation: a policy beside everything it should beat, on paired tasks it never saw."""

from metactl.evaluation.arms import (
    Arm,
    Results,
    paired_episodes,
    planned_runs,
    play_arms,
    policy_arm,
    static_arm,
)
from metactl.evaluation.headroom import by_family, headroom
from metactl.evaluation.place import Where
from metactl.evaluation.suite import Evaluation, EvaluationPlan, evaluate
from metactl.evaluation.summary import headline, summarise

__all__ = [
    "Arm",
    "Evaluation",
    "EvaluationPlan",
    "Results",
    "Where",
    "by_family",
    "evaluate",
    "headline",
    "headroom",
    "paired_episodes",
    "planned_runs",
    "play_arms",
    "policy_arm",
    "static_arm",
    "summarise",
]
