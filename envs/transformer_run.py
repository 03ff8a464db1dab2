"""Adaptive transformers learning text: the `TrainingRun` behind `AdaptiveTransformer-v0`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from envs.adamw import ReplicatedAdamW
from envs.knobs import OPTIMIZER_KNOBS, USUAL_KNOBS, knobs_of
from envs.tasks import TextFamily, TextTask, load_corpus
from envs.tasks.text import PROBE_SEQUENCES, TEST_SEQUENCES
from metactl.config import parse
from metactl.knobs import Knob
from metactl.run import FloatArray, Measurement, TrainingRun
from models import (
    AdaptiveTransformer,
    Noise,
    TransformerConfig,
    cross_entropy,
    hashed_integers,
    training_flops,
)

_PROMPT_BYTES = 16  # what a sample continues
_DATA_STREAM, _NOISE_STREAM, _WEIGHT_STREAM, _RATE_STREAM = 1, 2, 3, 4


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class RunConfig:
    """One recipe for training adaptive transformers on text.

    Args:
        data: File or folder of text; the Python standard library's sources without one.
        d_model: Channels at full width.
        n_layers: Blocks.
        n_heads: Attention heads at full width.
        context: Tokens (bytes) per sequence.
        feed_forward: `"gelu"` or `"swiglu"`.
        rotation: Rotation variants by name, joined by `+`, or fields (see `models.rotary`).
        batch_size: Sequences per optimizer step.
        horizon: Optimizer steps of a run, or a range to draw from log-uniformly.
        unique_bytes: Range of the unique training data, in bytes, drawn log-uniformly.
        learning_rate: Peak of the schedule (linear warm-up, cosine decay), or a range from which
            each run draws its own log-uniformly.
        warmup: Share of the horizon spent warming up.
        final_learning_rate: Learning rate at the end, as a share of the peak.
        weight_decay: Decoupled decay of matrices and embeddings.
        max_gradient_norm: Clipping threshold, per replica.
        beta2: Decay of AdamW's second moment.
        default_dropout: Dropout of a run that nobody controls.
        knobs: What a controller can move; besides the usual four `learning_rate_multiplier`,
            `weight_decay`, `position_scale`, `rotation_strength` (with Givens rotations) and
            `orthogonality_weight` (with a free matrix). A base that does not exist is left out.
        device: Torch device, such as `"cpu"` or `"cuda"`.
        dtype: `"float32"`, or `"float64"` for exact comparisons.
    """

    data: str | None = None
    d_model: int = 32
    n_layers: int = 2
    n_heads: int = 4
    context: int = 32
    feed_forward: str = "gelu"
    rotation: str | dict[str, Any] = "rope"
    batch_size: int = 8
    horizon: int | tuple[int, int] = 400
    unique_bytes: tuple[int, int] = (1_500, 1_000_000)
    learning_rate: float | tuple[float, float] = 8e-3
    warmup: float = 0.1
    final_learning_rate: float = 0.1
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    beta2: float = 0.99
    default_dropout: float = 0.1
    knobs: tuple[str, ...] = USUAL_KNOBS
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        low, high = self.horizon_range
        if not 1 <= low <= high:
            raise ValueError(f"horizon must be at least 1 optimizer step, got {self.horizon}")
        slow, fast = self.learning_rate_range
        if not 0 < slow <= fast < math.inf:
            raise ValueError(
                f"learning_rate must be above 0 and finite, low <= high in a range, "
                f"got {self.learning_rate}"
            )
        for name in ("batch_size", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        if self.context < 2:
            raise ValueError(f"context must be at least 2 tokens, got {self.context}")
        for name in ("beta2", "final_learning_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        self.chosen_knobs()  # refuses shapes and knobs that do not fit together
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device must be a torch device, got {self.device!r}") from error
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r} is not available: torch finds no GPU")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {self.dtype!r}")

    @property
    def horizon_range(self) -> tuple[int, int]:
        return (self.horizon,) * 2 if isinstance(self.horizon, int) else self.horizon

    @property
    def learning_rate_range(self) -> tuple[float, float]:
        rate = self.learning_rate
        return rate if isinstance(rate, tuple) else (rate, rate)

    def chosen_knobs(self) -> tuple[Knob, ...]:
        return knobs_of(self.transformer(), self.knobs, self.default_dropout, self.weight_decay)

    def transformer(self) -> TransformerConfig:
        return TransformerConfig(
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            context=self.context,
            feed_forward=self.feed_forward,
            rotation=self.rotation,
        )


def build_run(n_runs: int, options: Mapping[str, Any]) -> "AdaptiveTransformerRun":
    """A run from options as YAML or keyword arguments give them."""
    config = parse(RunConfig, options, "AdaptiveTransformer-v0")
    return AdaptiveTransformerRun(config, n_runs)


class AdaptiveTransformerRun(TrainingRun):
    """N adaptive transformers trained together, each on its own task.

    Args:
        config: The recipe.
        n_runs: Replicas advanced in one tensor program.
    """

    def __init__(self, config: RunConfig, n_runs: int) -> None:
        self.config, self.n_runs = config, n_runs
        self.horizon = config.horizon_range[0]
        self.device = torch.device(config.device)
        self.dtype = getattr(torch, config.dtype)
        shape = config.transformer()
        self.model = AdaptiveTransformer(shape, n_runs, device=self.device, dtype=self.dtype)
        self.optimizer = ReplicatedAdamW(
            self.model, betas=(0.9, config.beta2), max_norm=config.max_gradient_norm
        )
        self.family = TextFamily(load_corpus(config.data), config.context, config.unique_bytes)
        self._text = torch.from_numpy(self.family.corpus.data.copy()).to(self.device)
        self._knobs = config.chosen_knobs()
        self._allocate_rows()
        self.draw_horizon(0)

    def _allocate_rows(self) -> None:
        n, device, window = self.n_runs, self.device, self.config.context + 1

        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(n, *shape, dtype=dtype, device=device)

        self._rows: dict[str, Tensor] = {
            "seed": integers(),
            "step": integers(),
            "train_start": integers(),
            "train_bytes": integers() + window,
            "probe": integers(PROBE_SEQUENCES, window),
            "test": integers(TEST_SEQUENCES, window),
            "peak": integers(dtype=torch.float64),
            "learning_rate_multiplier": integers(dtype=torch.float64),
            "weight_decay": integers(dtype=torch.float64),
            "flops": integers(dtype=torch.float64),
            "diverged": integers(dtype=torch.bool),
        }

    @property
    def knobs(self) -> Sequence[Knob]:
        return self._knobs

    def sample_task(self, seed: int, split: str = "meta_train") -> TextTask:
        return self.family.sample(seed, split)

    def draw_horizon(self, seed: int) -> None:
        low, high = np.log(self.config.horizon_range)
        rng = np.random.default_rng([seed, 0x40712])
        self.horizon = round(float(np.exp(rng.uniform(low, high))))

    # One run's life ------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self, rows: Sequence[int], tasks: Sequence[Any], seeds: Sequence[int]) -> None:
        rows = list(rows)
        window = torch.arange(self.config.context + 1, device=self.device)
        for row, task, seed in zip(rows, tasks, seeds, strict=True):
            self._rows["seed"][row] = seed
            self._rows["peak"][row] = self._drawn_peak(seed)
            self._rows["train_start"][row] = task.train_start
            self._rows["train_bytes"][row] = task.train_bytes
            for split in ("probe", "test"):
                starts = torch.from_numpy(getattr(task, split)).to(self.device)
                self._rows[split][row] = self._text[starts[:, None] + window].long()
        for name in ("step", "flops", "diverged"):
            self._rows[name][rows] = 0
        keys = torch.tensor(list(seeds), dtype=torch.int64)
        weight_seeds = hashed_integers(1 << 62, keys, torch.tensor(_WEIGHT_STREAM)).tolist()
        self.model.initialise(rows, weight_seeds)
        self.optimizer.reset_rows(rows)
        self._set_knobs(
            {
                "dropout": self.config.default_dropout,
                "learning_rate_multiplier": 1.0,
                "weight_decay": self.config.weight_decay,
                **{knob.name: knob.default for knob in self._knobs},
            },
            rows,
        )
        self.model.knobs.settle_gates(rows)

    def _drawn_peak(self, seed: int) -> float:
        low, high = self.config.learning_rate_range
        rng = np.random.default_rng([seed, _RATE_STREAM])
        return low * (high / low) ** rng.uniform()

    def _set_knobs(self, values: Mapping[str, Any], rows: Sequence[int]) -> None:
        for name in set(OPTIMIZER_KNOBS) & set(values):
            value = torch.as_tensor(values[name], dtype=torch.float64, device=self.device)
            self._rows[name][list(rows)] = value
        rest = {name: v for name, v in values.items() if name not in OPTIMIZER_KNOBS}
        self.model.set_knobs(rest, rows)

    def apply(self, values: Mapping[str, FloatArray]) -> None:
        self._set_knobs(values, range(self.n_runs))
        self.model.knobs.settle_gates(
            np.flatnonzero(self._rows["step"].cpu().numpy() == 0).tolist()
        )

    def advance(self, n_steps: int) -> Measurement:
        losses, norms = [], []
        ratios: Tensor | None = None
        flops = torch.from_numpy(self.cost()).to(self.device)
        for i in range(n_steps):
            self.model.knobs.step_gates(1 / n_steps)
            loss, norm, ratios = self._optimizer_step(measure=i == n_steps - 1)
            losses.append(loss)
            norms.append(norm)
        self._rows["flops"] += n_steps * flops
        loss, norm = torch.stack(losses).double(), torch.stack(norms).double()
        assert ratios is not None
        finite = torch.isfinite(loss).all(0) & torch.isfinite(norm).all(0)
        finite &= torch.isfinite(self.optimizer.values).all(1)
        self._rows["diverged"] |= ~finite
        probe = self.evaluate("probe")
        packed = torch.stack(
            (
                loss.mean(0),
                loss.std(0, unbiased=False),
                norm.mean(0),
                ratios.double().median(1).values,
                ratios.double().amax(1),
                self._rows["flops"],
                self._rows["diverged"].double(),
                self._rows["step"].double(),
                self._rows["train_bytes"].double(),
            )
        )
        mean, std, norm_mean, ratio, ratio_max, spent, diverged, step, unique = packed.cpu().numpy()
        return Measurement(
            train_loss=mean,
            train_loss_std=std,
            probe_loss=probe,
            gradient_norm=norm_mean,
            update_ratio_median=ratio,
            update_ratio_max=ratio_max,
            diverged=diverged.astype(bool) | ~np.isfinite(probe),
            tokens_seen=step * self.config.batch_size * self.config.context,
            unique_tokens=unique,
            n_parameters=np.full(self.n_runs, float(self.model.count_parameters())),
            flops=spent,
            relative_cost=self.cost() / self._default_cost(),
        )

    def _optimizer_step(self, *, measure: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens = self._batch()
        seeds = self._rows["seed"] ^ (_NOISE_STREAM << 56)
        logits = self.model(tokens[..., :-1], Noise(seeds, self._rows["step"]))
        loss = cross_entropy(logits, tokens[..., 1:])
        (loss.sum() + self.model.penalty().sum()).backward()
        norm, ratios = self.optimizer.step(
            self._learning_rate(),
            self._rows["weight_decay"],
            self.model.knobs.gates > 0,
            measure=measure,
        )
        self._rows["step"] += 1
        return loss.detach(), norm, ratios

    def _batch(self) -> Tensor:
        """Windows of each row's data, by its seed and step: `[n_runs, batch, context + 1]`."""
        rows, window = self._rows, self.config.context + 1
        places = torch.arange(self.config.batch_size, device=self.device)
        starts = rows["train_start"][:, None] + hashed_integers(
            (rows["train_bytes"] - window + 1)[:, None],
            (rows["seed"] ^ (_DATA_STREAM << 56))[:, None],
            rows["step"][:, None],
            places,
        )
        windows = self._text.as_strided((len(self._text) - window + 1, window), (1, 1))
        return windows.index_select(0, starts.flatten()).long().view(self.n_runs, -1, window)

    def _learning_rate(self) -> Tensor:
        """Linear warm-up, then cosine decay to `final_learning_rate` of the peak; multiplied."""
        config = self.config
        progress = self._rows["step"].double() / self.horizon
        warm = ((self._rows["step"] + 1) / max(1.0, config.warmup * self.horizon)).clamp(max=1)
        phase = ((progress - config.warmup) / (1 - config.warmup)).clamp(0, 1)
        low = config.final_learning_rate
        decay = low + (1 - low) * (1 + torch.cos(math.pi * phase)) / 2
        return self._rows["peak"] * self._rows["learning_rate_multiplier"] * warm * decay

    @torch.no_grad()
    def evaluate(self, split: str, rows: Sequence[int] | None = None) -> FloatArray:
        if split not in ("probe", "test"):
            raise ValueError(f"Unknown split {split!r}. Known: probe, test")
        tokens = self._rows[split]
        loss = cross_entropy(self.model(tokens[..., :-1]), tokens[..., 1:]).double()
        return loss.cpu().numpy()[slice(None) if rows is None else list(rows)]

    # What it costs, and what there is to keep ------------------------------------------------

    def cost(self) -> FloatArray:
        values = {name: value.tolist() for name, value in self.model.knobs.values().items()}
        pairs = zip(values["embedding_width"], values["attention_span"], strict=True)
        return np.array([self._flops(width, span) for width, span in pairs])

    def _default_cost(self) -> float:
        return self._flops(1.0, float(self.config.context))

    def _flops(self, width: float, span: float) -> float:
        return training_flops(
            self.model.config,
            width=width,
            span=span,
            batch=self.config.batch_size,
            seq=self.config.context,
        )

    def state_dict(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return {name: tensor[list(rows)].clone() for name, tensor in self._state().items()}

    @torch.no_grad()
    def load_state_dict(self, rows: Sequence[int], state: Mapping[str, Any]) -> None:
        for name, tensor in self._state().items():
            tensor[list(rows)] = state[name].to(tensor)
        self.model.refresh()

    def _state(self) -> dict[str, Tensor]:
        knobs = {f"knob/{name}": tensor for name, tensor in self.model.knobs.storage().items()}
        return {**self._rows, **knobs, **self.optimizer.tensors()}

    @torch.no_grad()
    def export(self, row: int) -> AdaptiveTransformer:
        model = AdaptiveTransformer(self.model.config, device=self.device, dtype=self.dtype)
        state = model.state_dict()
        for name, tensor in self.model.state_dict().items():
            state[name].copy_(tensor[row : row + 1])
        model.load_state_dict(state)
        return model

    def sample(self, row: int, n_tokens: int) -> str:
        """Continues the start of a test sequence; bytes that are no UTF-8 show as U+FFFD."""
        prompt = self._rows["test"][row, :1, :_PROMPT_BYTES]
        generator = torch.Generator(self.device).manual_seed(int(self._rows["seed"][row]))
        model = self.export(row)
        if model.config.rotary.static_matrices:
            model.fold_rotations_()
        written = model.generate(
            prompt[None], n_tokens, temperature=0.8, top_p=0.95, generator=generator
        )
        return bytes(written[0, 0].tolist()).decode("utf-8", errors="replace")
