"""One recipe for training adaptive transformers: what `RunConfig` holds, checked in words."""

import math
import warnings
from typing import Any

import numpy as np
import torch
from pydantic.dataclasses import dataclass

from envs.budget import BUDGETS
from envs.disturbances import KINDS
from envs.graph import has_compiler
from envs.knobs import USUAL_KNOBS, knobs_of
from envs.tasks import FAMILIES, TaskFamily, build_family
from metactl.config import STRICT
from metactl.errors import unknown_name
from metactl.knobs import Knob
from models import TransformerConfig

PRECISIONS = ("highest", "high", "medium")
_RATE_STREAM, _SCALE_STREAM = 4, 6
_LONGEST = 1 << 31  # optimizer steps, and more than anybody has


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """One recipe for training adaptive transformers.

    Args:
        task: What they learn: `"text"`, `"recall"`, `"digits"` or `"waves"` (see `envs.tasks`).
        data: File or folder of text; the Python standard library's sources without one.
        other_data: Other text, which a run goes over to where a `"switch"` disturbs it; another
            stretch of its own without.
        d_model: Channels at full width.
        n_layers: Blocks.
        n_heads: Attention heads at full width.
        context: Tokens (bytes of text) per sequence; 64 for `"digits"`.
        feed_forward: `"gelu"` or `"swiglu"`.
        rotation: Rotation variants by name, joined by `+`, or fields (see `models.rotary`).
        batch_size: Sequences per optimizer step.
        horizon: Optimizer steps of a run, or a range to draw from log-uniformly; rounded to a
            multiple of the control steps.
        budget: What a run spends: `"steps"`, or `"flops"`: as many FLOPs as `horizon` steps take at
            full width and span, so that cheaper knobs give more steps.
        unique_bytes: Range of the unique training data, in tokens, drawn log-uniformly.
        learning_rate: Peak of the schedule (linear warm-up, cosine decay), or a range from which
            each task draws its own log-uniformly.
        initial_scale: Factor of the initial weights (norms excepted), or a range from which each
            task draws its own log-uniformly.
        warmup: Share of the horizon spent warming up.
        final_learning_rate: Learning rate at the end, as a share of the peak.
        weight_decay: Decoupled decay of matrices and embeddings.
        max_gradient_norm: Clipping threshold, per replica.
        beta2: Decay of AdamW's second moment.
        default_dropout: Dropout of a run that nobody controls.
        knobs: What a controller can move; besides the usual four `learning_rate_multiplier`,
            `weight_decay`, `position_scale`, `rotation_strength` (with Givens rotations) and
            `orthogonality_weight` (with a free matrix). A base that does not exist is left out.
        disturb: Probability that something befalls a run at a random time (`envs.disturbances`).
        disturbances: What can: `"learning_rate"`, `"labels"`, `"switch"`, `"kick"`.
        internal: Also read signals from inside the models (`metactl.signals.INTERNAL`), at each
            control step; slower by one to two optimizer steps.
        device: Torch device, such as `"cpu"` or `"cuda"`.
        cuda_graph: On a GPU, replay the optimizer step as one CUDA graph. Without it and
            without `compile`, a single run computes only what its knobs leave active.
        compile: Fuse the optimizer step by `torch.compile`: up to a minute at the start of every
            worker (less where it was compiled before), then faster steps. By default on a GPU where
            there is a C++ compiler.
        matmul_precision: `"highest"`, `"high"` (TF32 on a GPU) or `"medium"` (bfloat16 on a CPU
            that has it): coarser and faster products while training, by torch's names.
        dtype: `"float32"`, or `"float64"` for exact comparisons.
    """

    task: str = "text"
    data: str | None = None
    other_data: str | None = None
    d_model: int = 32
    n_layers: int = 2
    n_heads: int = 4
    context: int = 32
    feed_forward: str = "gelu"
    rotation: str | dict[str, Any] = "rope"
    batch_size: int = 8
    horizon: int | tuple[int, int] = 400
    budget: str = "steps"
    unique_bytes: tuple[int, int] = (1_500, 1_000_000)
    learning_rate: float | tuple[float, float] = 8e-3
    initial_scale: float | tuple[float, float] = 1.0
    warmup: float = 0.1
    final_learning_rate: float = 0.1
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    beta2: float = 0.99
    default_dropout: float = 0.1
    knobs: tuple[str, ...] = USUAL_KNOBS
    disturb: float = 0.0
    disturbances: tuple[str, ...] = KINDS
    internal: bool = False
    device: str = "cpu"
    cuda_graph: bool = True
    compile: bool | None = None
    matmul_precision: str = "highest"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.task not in FAMILIES:
            raise ValueError(unknown_name("task", self.task, tuple(FAMILIES)))
        for name in ("data", "other_data"):
            if getattr(self, name) is not None and self.task != "text":
                raise ValueError(f"{name} is for task 'text'; task {self.task!r} makes its own")
        if self.budget not in BUDGETS:
            raise ValueError(unknown_name("budget", self.budget, BUDGETS))
        if self.budget == "flops" and self.disturb:
            raise ValueError(
                f"disturb must be 0 with budget 'flops': disturbances are timed by optimizer "
                f"steps, got {self.disturb}"
            )
        if not self.disturbances:
            raise ValueError(f"disturbances must name some of {', '.join(KINDS)}, got none")
        for kind in self.disturbances:
            if kind not in KINDS:
                raise ValueError(unknown_name("disturbance", kind, KINDS))
        first, last = self.horizon_range
        if not 1 <= first <= last < _LONGEST:
            raise ValueError(
                f"horizon must be 1 to {_LONGEST - 1} optimizer steps, low <= high in a range, "
                f"got {self.horizon}"
            )
        for name in ("learning_rate", "initial_scale"):
            low, high = as_range(getattr(self, name))
            if not 0 < low <= high < math.inf:
                raise ValueError(
                    f"{name} must be above 0 and finite, low <= high in a range, "
                    f"got {getattr(self, name)}"
                )
        if self.internal and self.batch_size < 2:
            raise ValueError("internal signals compare two half batches; got batch_size=1")
        for name in ("batch_size", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        if self.context < 2:
            raise ValueError(f"context must be at least 2 tokens, got {self.context}")
        highest = self.transformer().knob_ranges()["dropout"]["high"]
        if not 0 <= self.default_dropout <= highest:
            raise ValueError(
                f"default_dropout must be in [0, {highest}], got {self.default_dropout}"
            )
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must be in [0, 1), got {self.beta2}")
        for name in ("final_learning_rate", "disturb"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        self.chosen_knobs()  # refuses shapes and knobs that do not fit together
        _require_device(self.device)
        if self.compile and not has_compiler():
            raise ValueError(
                "compile needs a C++ compiler (CXX, g++ or clang++), and none is found"
            )
        if self.matmul_precision not in PRECISIONS:
            raise ValueError(unknown_name("matmul_precision", self.matmul_precision, PRECISIONS))
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {self.dtype!r}")

    @property
    def horizon_range(self) -> tuple[int, int]:
        return (self.horizon,) * 2 if isinstance(self.horizon, int) else self.horizon

    @property
    def compiles(self) -> bool:
        """Whether `torch.compile` is used."""
        on_gpu = torch.device(self.device).type == "cuda"
        return on_gpu and has_compiler() if self.compile is None else self.compile

    def chosen_knobs(self) -> tuple[Knob, ...]:
        return knobs_of(self.transformer(), self.knobs, self.default_dropout, self.weight_decay)

    def build_family(self) -> TaskFamily:
        """The tasks, with their data read."""
        of_data = (self.data, self.context, self.unique_bytes, self.other_data)
        return build_family(self.task, *of_data)

    def transformer(self) -> TransformerConfig:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the base, which is where a knob begins
            return TransformerConfig(
                vocab_size=FAMILIES[self.task].vocabulary,
                d_model=self.d_model,
                n_layers=self.n_layers,
                n_heads=self.n_heads,
                context=self.context,
                feed_forward=self.feed_forward,
                rotation=self.rotation,
            )


def _require_device(name: str) -> None:
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device, got {name!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available: torch finds no GPU")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error


def as_range(value: float | tuple[float, float]) -> tuple[float, float]:
    """A range as it is, and a number as the range that holds it alone."""
    return value if isinstance(value, tuple) else (value, value)


def peak_learning_rate(config: "RunConfig", task_seed: int) -> float:
    """That of a task, like its data: users know both before they train."""
    return _drawn(config.learning_rate, task_seed, _RATE_STREAM)


def initial_scale(config: "RunConfig", task_seed: int) -> float:
    """Factor of the initial weights of a task's runs."""
    return _drawn(config.initial_scale, task_seed, _SCALE_STREAM)


def _drawn(value: float | tuple[float, float], seed: int, stream: int) -> float:
    """A number of a range, log-uniform by a seed."""
    low, high = as_range(value)
    return float(low * (high / low) ** np.random.default_rng([seed, stream]).uniform())
