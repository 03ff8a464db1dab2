"""Adaptive transformers that learn: the `TrainingRun` behind `AdaptiveTransformer-v0`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.adamw import ReplicatedAdamW
from envs.budget import Budget
from envs.disturbances import Disturbances
from envs.graph import Graph, OwnPrograms, as_it_is, fused, matmul_precision
from envs.knobs import OPTIMIZER_KNOBS
from envs.memory import require_memory
from envs.reader import Reader
from envs.run_config import RunConfig, initial_scale, peak_learning_rate
from envs.tasks import Task
from envs.tasks.family import PROBE_SEQUENCES, TEST_SEQUENCES
from metactl.config import parse
from metactl.errors import unknown_name
from metactl.knobs import FloatArray, Knob
from metactl.run import DISTURBED, Measurement, TrainingRun
from metactl.signals import INTERNAL_NAMES
from models import AdaptiveTransformer, Noise, cross_entropy, hashed_integers, training_flops
from models.device import brought
from models.internals import noise_scale

_WATCHED = 8  # probe sequences from which internal signals are read
_PROMPT_BYTES = 16  # what a sample continues
_DATA_STREAM, _NOISE_STREAM, _WEIGHT_STREAM = 1, 2, 3
_REAL_ROWS = ("peak", "learning_rate_multiplier", "weight_decay", "flops")
_TASK_ROWS = ("train_start", "train_tokens", "probe", "test")
_SHOWN = (
    *("train_loss", "train_loss_std", "gradient_norm"),
    *("update_ratio_median", "update_ratio_max"),
)
_LATER = "later_"  # the task that a run switches to


def build_run(n_runs: int, options: Mapping[str, Any]) -> "AdaptiveTransformerRun":
    """A run from options as YAML or keyword arguments give them."""
    config = parse(RunConfig, options, "AdaptiveTransformer-v0")
    require_memory(config, n_runs)
    return AdaptiveTransformerRun(config, n_runs)


class AdaptiveTransformerRun(OwnPrograms, TrainingRun):
    """N adaptive transformers trained together, each on its own task.

    Args:
        config: The recipe.
        n_runs: Replicas advanced in one tensor program.
        capturable: Whether that program is the same at every step, whatever the knobs are; where it
            is compiled or a CUDA graph, by default.
    """

    programs = ("_starts", "_training_loss", "_step", "_measured_step", "_probe")

    def __init__(self, config: RunConfig, n_runs: int, *, capturable: bool | None = None) -> None:
        self.config, self.n_runs = config, n_runs
        self.device = torch.device(config.device)
        self.dtype = getattr(torch, config.dtype)
        graphs = self.device.type == "cuda" and config.cuda_graph
        compiles = config.compiles
        same = graphs or compiles
        self.model = AdaptiveTransformer(
            config.transformer(),
            n_runs,
            device=self.device,
            dtype=self.dtype,
            capturable=same if capturable is None else capturable,
        )
        if same:
            self.model.reserve_noise(config.batch_size * config.context)
        betas, max_norm = (0.9, config.beta2), config.max_gradient_norm
        self.optimizer = ReplicatedAdamW(self.model, betas=betas, max_norm=max_norm, fuse=compiles)
        self.family = config.build_family()
        self._reader = Reader(self.family, config.context, self.device)
        self.disturbances = Disturbances(config.disturbances, config.disturb, n_runs, self.device)
        self._knobs = config.chosen_knobs()
        self._allocate_rows()
        self._step_cost = self._cost()  # in force; written to, never replaced
        self._budget = Budget(config.budget, self._full_cost(), self.device)
        self.draw_horizon(0)
        self._recorded = graphs
        self.build_programs()

    def build_programs(self) -> None:
        fuse = fused if self.config.compiles else as_it_is
        self._starts, self._training_loss = fuse(self._batch), fuse(self._loss_under_noise)
        record = partial(Graph, state=tuple(self._state().values())) if self._recorded else as_it_is
        self._step = record(partial(self._optimizer_step, measure=False))
        self._measured_step = record(partial(self._optimizer_step, measure=True))
        self._probe = record(fuse(partial(self._losses, "probe")))

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
            **{name: integers(dtype=torch.float64) for name in _REAL_ROWS},
            "diverged": integers(dtype=torch.bool),
            **self.disturbances.rows,
        }

    @property
    def knobs(self) -> Sequence[Knob]:
        return self._knobs

    @property
    def internal_names(self) -> Sequence[str]:
        return INTERNAL_NAMES if self.config.internal else ()

    @property
    def horizon(self) -> int:
        return self._horizon

    @horizon.setter
    def horizon(self, n_steps: int) -> None:
        self._horizon = n_steps
        self._budget.set_horizon(n_steps)

    def sample_task(self, seed: int, split: str = "meta_train") -> Task:
        return self.family.sample(seed, split)

    def descriptors(self, seed: int, split: str = "meta_train") -> Mapping[str, float]:
        known = {
            "unique_tokens": self.sample_task(seed, split).train_tokens,
            "peak_learning_rate": peak_learning_rate(self.config, seed),
        }
        return {name: float(np.log10(value)) for name, value in known.items()}

    def fingerprint(self) -> str:
        return self.family.fingerprint()

    def draw_horizon(self, seed: int) -> None:
        low, high = np.log(self.config.horizon_range)
        rng = np.random.default_rng([seed, 0x40712])
        self.horizon = round(float(np.exp(rng.uniform(low, high))))

    # One run's life ------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self, rows: Sequence[int], tasks: Sequence[Any], seeds: Sequence[int]) -> None:
        rows, seeds = list(rows), list(seeds)
        if not rows:
            return
        self._write(rows, "seed", seeds)
        self._write(rows, "peak", [peak_learning_rate(self.config, task.seed) for task in tasks])
        self._assign(rows, tasks)
        switching = self.disturbances.draw(rows, seeds, self.horizon)
        if switching:
            begun = dict(zip(rows, zip(tasks, seeds, strict=True), strict=True))
            later = [self.family.unlike(*begun[row]) for row in switching]
            self._assign(switching, later, _LATER)
        for name in ("step", "flops", "diverged"):
            self._rows[name][rows] = 0
        weight_seeds = hashed_integers(1 << 62, torch.tensor(seeds), torch.tensor(_WEIGHT_STREAM))
        self.model.initialise(rows, weight_seeds.tolist())
        self.model.scale_weights_(rows, [initial_scale(self.config, task.seed) for task in tasks])
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

    def _assign(self, rows: list[int], tasks: Sequence[Task], when: str = "") -> None:
        for name in _TASK_ROWS:
            self._write(rows, when + name, np.array([getattr(task, name) for task in tasks]))

    def _write(self, rows: list[int], name: str, values: Any) -> None:
        column = self._rows[name]
        column[rows] = brought(torch.as_tensor(values, dtype=column.dtype), self.device)

    def _set_knobs(self, values: Mapping[str, Any], rows: Sequence[int] | None = None) -> None:
        index = slice(None) if rows is None else list(rows)
        for name in set(OPTIMIZER_KNOBS) & set(values):
            value = torch.as_tensor(values[name], dtype=torch.float64)
            self._rows[name][index] = brought(value, self.device)
        rest = {name: v for name, v in values.items() if name not in OPTIMIZER_KNOBS}
        self.model.set_knobs(rest, rows)

    def apply(self, values: Mapping[str, FloatArray]) -> None:
        self._set_knobs(values)
        self.model.knobs.settle_gates(self._rows["step"] == 0)

    def advance(self, n_steps: int) -> Measurement:
        cost = self._cost(self.model.knobs.computed_width())  # a width fades, and is paid for
        self._step_cost.copy_(cost)
        shares = self._budget.shares(n_steps, self._rows["flops"], cost)
        seen: list[Tensor] = []  # by step, of all replicas
        shown = torch.zeros(len(_SHOWN), self.n_runs, dtype=torch.float64, device=self.device)
        paused = []
        due = self.disturbances.due(self._rows["step"], n_steps) if self.config.disturb else ()
        for last, rows in shares:
            while len(seen) < last:
                if len(seen) in due:
                    self._befall()
                self.model.knobs.step_gates(1 / n_steps)
                step = self._measured_step if len(seen) == last - 1 else self._step
                with matmul_precision(self.config.matmul_precision):
                    loss, norm, *ratios = step()
                seen.append(torch.stack((loss, norm.to(loss))))  # copied: a step writes there
            losses, norms = torch.stack(seen).double()[:, :, rows].unbind(1)
            spread = losses.std(0, unbiased=False)
            own = [ratio[rows] for ratio in ratios]
            shown[:, rows] = torch.stack((losses.mean(0), spread, norms.mean(0), *own))
            if isinstance(rows, list) and last < shares[-1][0]:
                paused.append((rows, self.state_dict(rows)))
        for rows, state in paused:  # the others' steps were not theirs
            self.load_state_dict(rows, state)
        finite = torch.isfinite(shown[:3]).all(0) & torch.isfinite(self.optimizer.values).all(1)
        self._rows["diverged"] |= ~finite
        names = ("diverged", "step", "train_tokens", "flops")
        on_device = {
            **{name: self._rows[name] for name in names},
            **dict(zip(_SHOWN, shown, strict=True)),
            "probe_loss": self._probe()[0],
            "relative_cost": self._cost() / self._full_cost(),
        }
        internal = self._internal()
        on_device |= internal
        packed = torch.stack([tensor.double() for tensor in on_device.values()])
        here = dict(zip(on_device, packed.cpu().numpy(), strict=True))
        tokens_per_step = self.config.batch_size * self.config.context
        inside = {name: here.pop(name) for name in internal}
        return Measurement(
            diverged=here.pop("diverged").astype(bool) | ~np.isfinite(here["probe_loss"]),
            tokens_seen=here.pop("step") * tokens_per_step,
            unique_tokens=here.pop("train_tokens"),
            n_parameters=np.full(self.n_runs, float(self.model.count_parameters())),
            internal=inside,
            **here,
        )

    def _internal(self) -> dict[str, Tensor]:
        """What is known beyond the training loop, `[n_runs]`, where the recipe asks for it."""
        found: dict[str, Tensor] = {}
        if self.config.disturb:
            found[DISTURBED] = self.disturbances.befallen(self._rows["step"])
        if self.config.internal:
            tokens, _ = self._reader.read(self._rows["probe"][:, :_WATCHED])
            signals = self.model.internal_signals(tokens[..., :-1])
            signals["gradient_noise_scale"] = self._gradient_noise_scale()
            found |= signals
        return found

    def _gradient_noise_scale(self) -> Tensor:
        """From the halves of the batch that comes next, without dropout."""
        tokens, counted = self._reader.read(self._starts())
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        half = self.config.batch_size // 2
        gradients = []
        for part in (slice(None, half), slice(half, 2 * half)):
            mask = None if counted is None else counted[:, part]
            logits = self.model(tokens[:, part, :-1])
            loss = cross_entropy(logits, tokens[:, part, 1:], mask).sum()
            gradients.append(list(torch.autograd.grad(loss, parameters, allow_unused=True)))
        return noise_scale(*gradients)

    def _optimizer_step(self, *, measure: bool) -> tuple[Tensor, ...]:
        """Losses and gradient norms; with `measure` median and largest update ratio, too."""
        rows = self._rows
        tokens, counted = self._reader.read(self._starts())
        targets = tokens[..., 1:]
        if self.config.disturb:
            vocabulary = self.family.vocabulary
            targets = self.disturbances.spoil(targets, rows["step"], rows["seed"], vocabulary)
        loss = self._training_loss(tokens[..., :-1], targets, counted)
        (loss.sum() + self.model.penalty().sum()).backward()
        norm, ratios = self.optimizer.step(
            self._learning_rate(),
            rows["weight_decay"],
            self.model.knobs.gates > 0,
            measure=measure,
        )
        rows["step"] += 1
        rows["flops"] += self._step_cost
        if ratios is None:
            return loss.detach(), norm
        return loss.detach(), norm, ratios.double().median(1).values, ratios.double().amax(1)

    def _loss_under_noise(self, tokens: Tensor, targets: Tensor, counted: Tensor | None) -> Tensor:
        noise = Noise(self._rows["seed"] ^ (_NOISE_STREAM << 56), self._rows["step"])
        return cross_entropy(self.model(tokens, noise), targets, counted)

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
        rows, config = self._rows, self.config
        rate = self._budget.learning_rate(
            rows["peak"] * rows["learning_rate_multiplier"],
            rows["step"],
            rows["flops"],
            warmup=config.warmup,
            final=config.final_learning_rate,
        )
        return rate * self.disturbances.rate(rows["step"]) if config.disturb else rate

    def evaluate(self, split: str, rows: Sequence[int] | None = None) -> FloatArray:
        if split not in ("probe", "test"):
            raise ValueError(unknown_name("split", split, ("probe", "test")))
        losses = self._probe() if split == "probe" else self._losses(split)
        return losses[0].cpu().numpy()[slice(None) if rows is None else list(rows)]

    @torch.no_grad()
    def _losses(self, split: str) -> tuple[Tensor]:
        tokens, counted = self._reader.read(self._rows[split])
        loss = cross_entropy(self.model(tokens[..., :-1]), tokens[..., 1:], counted)
        return (loss.double(),)

    # What it costs, and what there is to keep ------------------------------------------------

    def cost(self) -> FloatArray:
        return self._cost().cpu().numpy()

    def _cost(self, width: Tensor | None = None) -> Tensor:
        values = self.model.knobs.values()
        width = values["embedding_width"] if width is None else width
        return self._flops(width, values["attention_span"])

    def _full_cost(self) -> float:
        return float(self._flops(1.0, float(self.config.context)))

    def _flops(self, width: float | Tensor, span: float | Tensor) -> Tensor:
        size = {"batch": self.config.batch_size, "seq": self.config.context}
        return training_flops(self.model.config, width=width, span=span, **size)

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
