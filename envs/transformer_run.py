"""Adaptive transformers that learn: the `TrainingRun` behind `AdaptiveTransformer-v0`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.adamw import ReplicatedAdamW
from envs.disturbances import Disturbances
from envs.knobs import OPTIMIZER_KNOBS
from envs.reader import Reader
from envs.run_config import RunConfig, as_range
from envs.tasks import Task, build_family
from envs.tasks.family import PROBE_SEQUENCES, TEST_SEQUENCES
from metactl.config import parse
from metactl.knobs import Knob
from metactl.run import DISTURBED, FloatArray, Measurement, TrainingRun
from models import AdaptiveTransformer, Noise, cross_entropy, hashed_integers, training_flops

_PROMPT_BYTES = 16  # what a sample continues
_DATA_STREAM, _NOISE_STREAM, _WEIGHT_STREAM, _RATE_STREAM = 1, 2, 3, 4
_SCALE_STREAM = 6
_TASK_ROWS = ("train_start", "train_tokens", "probe", "test")
_LATER = "later_"  # the task that a run switches to


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
        self.family = build_family(config.task, config.data, config.context, config.unique_bytes)
        self._reader = Reader(self.family, config.context, self.device)
        self.disturbances = Disturbances(config.disturbances, config.disturb, n_runs, self.device)
        self._knobs = config.chosen_knobs()
        self._allocate_rows()
        self.draw_horizon(0)

    def _allocate_rows(self) -> None:
        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(self.n_runs, *shape, dtype=dtype, device=self.device)

        def task() -> dict[str, Tensor]:
            return {
                "train_start": integers(),
                "train_tokens": integers() + self.config.context + 1,
                "probe": integers(PROBE_SEQUENCES),
                "test": integers(TEST_SEQUENCES),
            }

        self._rows: dict[str, Tensor] = {
            "seed": integers(),
            "step": integers(),
            **task(),
            **{_LATER + name: tensor for name, tensor in task().items()},
            "peak": integers(dtype=torch.float64),
            "learning_rate_multiplier": integers(dtype=torch.float64),
            "weight_decay": integers(dtype=torch.float64),
            "flops": integers(dtype=torch.float64),
            "diverged": integers(dtype=torch.bool),
            **self.disturbances.rows,
        }

    @property
    def knobs(self) -> Sequence[Knob]:
        return self._knobs

    def sample_task(self, seed: int, split: str = "meta_train") -> Task:
        return self.family.sample(seed, split)

    def draw_horizon(self, seed: int) -> None:
        low, high = np.log(self.config.horizon_range)
        rng = np.random.default_rng([seed, 0x40712])
        self.horizon = round(float(np.exp(rng.uniform(low, high))))

    # One run's life ------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self, rows: Sequence[int], tasks: Sequence[Any], seeds: Sequence[int]) -> None:
        rows = list(rows)
        for row, task, seed in zip(rows, tasks, seeds, strict=True):
            self._rows["seed"][row] = seed
            self._rows["peak"][row] = _drawn(self.config.learning_rate, seed, _RATE_STREAM)
            self._assign(row, task)
            if self.disturbances.draw(row, seed, self.horizon):
                self._assign(row, self.family.unlike(task, seed), _LATER)
        for name in ("step", "flops", "diverged"):
            self._rows[name][rows] = 0
        keys = torch.tensor(list(seeds), dtype=torch.int64)
        weight_seeds = hashed_integers(1 << 62, keys, torch.tensor(_WEIGHT_STREAM)).tolist()
        self.model.initialise(rows, weight_seeds)
        for row, seed in zip(rows, seeds, strict=True):
            self.model.scale_weights_(row, _drawn(self.config.initial_scale, seed, _SCALE_STREAM))
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

    def _assign(self, row: int, task: Task, when: str = "") -> None:
        for name in _TASK_ROWS:
            value = torch.as_tensor(getattr(task, name), device=self.device)
            self._rows[when + name][row] = value

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
                self._rows["train_tokens"].double(),
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
            internal={DISTURBED: self.disturbances.befallen(self._rows["step"])}
            if self.config.disturb
            else {},
        )

    def _optimizer_step(self, *, measure: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = self._rows
        if self.config.disturb:
            self._befall()
        tokens, counted = self._reader.read(self._batch())
        targets = tokens[..., 1:]
        if self.config.disturb:
            vocabulary = self.family.vocabulary
            targets = self.disturbances.spoil(targets, rows["step"], rows["seed"], vocabulary)
        logits = self.model(
            tokens[..., :-1], Noise(rows["seed"] ^ (_NOISE_STREAM << 56), rows["step"])
        )
        loss = cross_entropy(logits, targets, counted)
        (loss.sum() + self.model.penalty().sum()).backward()
        norm, ratios = self.optimizer.step(
            self._learning_rate(),
            rows["weight_decay"],
            self.model.knobs.gates > 0,
            measure=measure,
        )
        rows["step"] += 1
        return loss.detach(), norm, ratios

    def _batch(self) -> Tensor:
        """Where the sequences of the next step begin, by each run's seed and step."""
        rows = self._rows
        return self._reader.draw(
            rows["train_start"],
            rows["train_tokens"],
            (rows["seed"] ^ (_DATA_STREAM << 56))[:, None],
            rows["step"][:, None],
            torch.arange(self.config.batch_size, device=self.device),
        )

    @torch.no_grad()
    def _befall(self) -> None:
        """What disturbs a run before a step: its task changes, or its weights."""
        step, seeds = self._rows["step"], self._rows["seed"]
        switched = self.disturbances.active("switch", step)
        for name in _TASK_ROWS:
            now, later = self._rows[name], self._rows[_LATER + name]
            mask = switched.view(-1, *(1,) * (now.ndim - 1))
            now.copy_(torch.where(mask, later, now))
        self.disturbances.kick_(self.optimizer.values, step, seeds)

    def _learning_rate(self) -> Tensor:
        """Linear warm-up, then cosine decay to `final_learning_rate` of the peak; multiplied."""
        config = self.config
        progress = self._rows["step"].double() / self.horizon
        warm = ((self._rows["step"] + 1) / max(1.0, config.warmup * self.horizon)).clamp(max=1)
        phase = ((progress - config.warmup) / (1 - config.warmup)).clamp(0, 1)
        low = config.final_learning_rate
        decay = low + (1 - low) * (1 + torch.cos(math.pi * phase)) / 2
        rate = self._rows["peak"] * self._rows["learning_rate_multiplier"] * warm * decay
        return rate * self.disturbances.rate(self._rows["step"]) if config.disturb else rate

    @torch.no_grad()
    def evaluate(self, split: str, rows: Sequence[int] | None = None) -> FloatArray:
        if split not in ("probe", "test"):
            raise ValueError(f"Unknown split {split!r}. Known: probe, test")
        tokens, counted = self._reader.read(self._rows[split])
        loss = cross_entropy(self.model(tokens[..., :-1]), tokens[..., 1:], counted).double()
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
        if self.config.task != "text":
            raise TypeError(f"task {self.config.task!r} is no text")
        prompt = self._reader.read(self._rows["test"][row : row + 1, :1])[0][0, :, :_PROMPT_BYTES]
        generator = torch.Generator(self.device).manual_seed(int(self._rows["seed"][row]))
        model = self.export(row)
        if model.config.rotary.static_matrices:
            model.fold_rotations_()
        written = model.generate(
            prompt[None], n_tokens, temperature=0.8, top_p=0.95, generator=generator
        )
        return bytes(written[0, 0].tolist()).decode("utf-8", errors="replace")


def _drawn(value: float | tuple[float, float], seed: int, stream: int) -> float:
    """A run's own number of a range, log-uniform by its seed."""
    low, high = as_range(value)
    return float(low * (high / low) ** np.random.default_rng([seed, stream]).uniform())
