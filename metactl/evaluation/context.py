"""The static setting of somebody who is told how much data a task has, and tunes beforehand."""

from collections.abc import Sequence

import numpy as np

from metactl.evaluation.arms import Results
from metactl.evaluation.summary import column
from metactl.knobs import FloatArray
from metactl.rollout import PlayedRun

_CONTEXT = "signal/data_pressure"
_MOST_CLASSES = 4
_TASKS_PER_CLASS = 8


class TunedBeforehand:
    """Static settings chosen on tasks of meta-training, for all tasks and by size of the data.

    Args:
        played: By setting: its runs on tasks of meta-training.
        names: Of the observations' entries.
    """

    def __init__(self, played: Results, names: Sequence[str]) -> None:
        self._entry = names.index(_CONTEXT)
        self._settings = list(played)
        losses = np.stack([column(runs, "final_probe") for runs in played.values()])
        told = self._told(next(iter(played.values())))
        n_classes = int(np.clip(len(told) // _TASKS_PER_CLASS, 1, _MOST_CLASSES))
        self._edges = np.quantile(told, np.arange(1, n_classes) / n_classes)
        self._best = losses.mean(axis=1).argmin()
        classes = np.searchsorted(self._edges, told)
        self._best_of_class = [
            losses[:, classes == each].mean(axis=1).argmin()
            if (classes == each).any()
            else self._best
            for each in range(n_classes)
        ]

    def _told(self, runs: Sequence[PlayedRun]) -> FloatArray:
        """The data pressure, which no observation has before the first step is measured."""
        return np.array([run.observations[1, self._entry] for run in runs], dtype=np.float64)

    def chosen(self, played: Results) -> Results:
        """The runs of what was chosen, among the same settings' runs on other tasks."""
        classes = np.searchsorted(self._edges, self._told(played[self._settings[0]]))
        picks = [self._settings[self._best_of_class[each]] for each in classes]
        return {
            "best static of training tasks": list(played[self._settings[self._best]]),
            "the same by size of the data": [played[name][i] for i, name in enumerate(picks)],
        }
