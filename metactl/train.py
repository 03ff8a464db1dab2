"""Training a meta-controller: PPO on a row of shards, checkpointed, into a policy file."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn

from metactl.actor_critic import AsymmetricPolicy, Normaliser, entries_of, standardisation
from metactl.board import Board, BoardWriter
from metactl.checkpoint import load_newest_checkpoint, save_checkpoint
from metactl.config import SEED_BITS, ConfigError, EnvironmentConfig, TrainConfig, dump
from metactl.evaluation.healthy import healthy_set_points
from metactl.policy import CLIP, FORMAT_VERSION, Policy, PolicyCard
from metactl.progress import Progress
from metactl.rundir import RunDirectoryError, versions
from metactl.shards import Description, ShardRow, default_workers
from metactl.snapshot import n_shards_of, restore, restore_exploration, snapshot
from metactl.vec_env import ShardVecEnv
from metactl.worker import ProcessWorker, ShardError, Worker

logger = logging.getLogger(__name__)


_TASK_BITS = 31 - SEED_BITS  # environment seeds of one training seed: two seeds share no task
_CALIBRATION_SEED = 1 << 15  # the upper half of them


def n_shards(environment: EnvironmentConfig) -> int:
    """How many workers an environment gets; 0 keeps its runs in this process."""
    if environment.n_workers >= 0:
        return environment.n_workers
    return max(default_workers(), len(environment.variants))


def build_shards(
    config: TrainConfig, *, healthy: bool = False, workers: int | None = None
) -> ShardRow:
    """The runs that a policy learns on.

    Args:
        config: Says which.
        healthy: Without variants, and nothing befalls them.
        workers: How many, if not as the configuration has it on this machine.
    """
    environment = config.environment
    workers = n_shards(environment) if workers is None else workers
    variants = () if healthy else environment.variants
    unwanted = ("disturb",) if healthy else ()
    options = {name: v for name, v in environment.options.items() if name not in unwanted}
    spawn: Callable[..., Worker] = ProcessWorker
    if environment.shards == "ray":
        from metactl.ray_worker import RayWorker

        spawn = partial(RayWorker, gpus=environment.gpus_per_shard)
    return ShardRow(environment.id, environment.n_envs, options, workers, variants, spawn)


def train(
    config: TrainConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    report: Callable[[int, float], None] | None = None,
) -> Policy:
    """Trains a policy and saves it as `run_dir/policy`.

    Killed at any moment and resumed, it ends with the same policy as if it had never stopped.

    Args:
        config: What and how.
        run_dir: Holds `checkpoints/`, `tb/` and in the end `policy/`.
        resume: Go on from the newest checkpoint in `run_dir`; from the beginning, where a kill came
            before the first.
        progress: Told about every control step.
        report: Told before an update, if runs have ended since the last: control steps so far, mean
            return of those runs.

    Returns:
        The policy.

    Raises:
        RunDirectoryError: If there are checkpoints, and all are damaged.
        ConfigError: If set-points are wanted, and there are no runs without variants.
    """
    _require_healthy_runs(config)
    state = load_newest_checkpoint(run_dir / "checkpoints") if resume else None
    workers = None
    if state is not None and config.environment.n_workers < 0:
        workers = n_shards_of(state[0]) or None  # begun where there were more cores, or fewer
    with build_shards(config, workers=workers) as shards:
        env = ShardVecEnv(shards, config.ppo.paired_runs, config.ppo.bound_cost)
        model = build_ppo(config, env)
        tensors: dict[str, Tensor] | None = None
        pending: dict[str, float] = {}  # figures noted, but not yet on the board
        if state is not None:
            tensors, scalars = state
            restore(model, shards, tensors, scalars)
            scales, env.reward_unit = scalars["reward_scales"], scalars["reward_unit"]
            pending = scalars["pending"]
        elif resume and any((run_dir / "checkpoints").glob("step-*")):
            raise RunDirectoryError(f"{str(run_dir)!r} holds no intact checkpoint to resume")
        else:
            scales, env.reward_unit = _calibrate(model, env)
            env.seed(config.seed << _TASK_BITS)
            model._last_obs = env.reset()
            model._last_episode_starts = np.ones(env.num_envs, dtype=bool)
        shards.call("set_reward_scale", [(scale,) for scale in scales])
        purge_step = model.num_timesteps + 1 if state is not None else 0
        with Board(run_dir / "tb", purge_step=purge_step) as board:
            model.set_logger(Logger(folder=None, output_formats=[BoardWriter(board)]))
            for name, value in pending.items():
                model.logger.record(name, float(value))  # where not finite, a word
            keeper = _Keeper(config, run_dir, shards, scales, progress, report, tensors, board)
            remaining = config.ppo.total_timesteps - model.num_timesteps
            if remaining > 0:
                model.learn(remaining, callback=keeper, reset_num_timesteps=False)
        about = shards.describe()
    policy = _to_policy(model, about, config, scales)
    policy.save(run_dir / "policy")
    if config.set_point_runs:
        with build_shards(config, healthy=True) as healthy:
            points = healthy_set_points(healthy, config.set_point_runs, config.seed)
        policy = Policy(replace(policy.card, set_points=points), policy.weights)
        policy.save(run_dir / "policy")
    return policy


def _require_healthy_runs(config: TrainConfig) -> None:
    """Set-points are estimated at the end: what they are of is tried before anything is learned."""
    environment = config.environment
    if not (config.set_point_runs and environment.variants):
        return
    try:
        one = replace(config, environment=replace(environment, n_envs=1, variants=()))
        away = environment.shards == "ray"  # where this machine may lack what runs need
        build_shards(one, healthy=True, workers=int(away)).close()
    except (ValueError, ShardError) as error:
        raise ConfigError(
            f"set_point_runs={config.set_point_runs} needs runs with the options alone, without "
            f"variants (0: no set-points): {error}"
        ) from error


def build_ppo(config: TrainConfig, env: ShardVecEnv) -> PPO:
    ppo = config.ppo
    if ppo.n_steps * env.num_envs < 2:
        raise ConfigError(
            f"n_steps={ppo.n_steps} of {env.num_envs} run is too little to learn from: at least 2 "
            f"control steps are needed"
        )
    names = env.shards.describe().observation_names
    with warnings.catch_warnings():  # of a last batch that is smaller
        warnings.filterwarnings("ignore", message="You have specified a mini-batch size")
        return PPO(
            AsymmetricPolicy,
            env,
            learning_rate=lambda remaining: ppo.learning_rate * max(remaining, 0.0),
            n_steps=ppo.n_steps,
            batch_size=ppo.batch_size,
            n_epochs=ppo.n_epochs,
            gamma=ppo.gamma,
            gae_lambda=ppo.gae_lambda,
            clip_range=ppo.clip_range,
            ent_coef=ppo.ent_coef,
            use_sde=ppo.use_sde,
            policy_kwargs={
                "seen": entries_of(ppo.signals, names),
                "hidden": ppo.hidden,
                "log_std_init": ppo.log_std_init,
                "features_extractor_class": Normaliser,
            },
            seed=config.seed,
            device="cpu",
        )


def _calibrate(model: PPO, env: ShardVecEnv) -> tuple[list[float], float]:
    """Plays one episode per run, half at rest and half under random moves, and freezes the
    normaliser.

    Returns:
        The median improvement of each shard's runs at rest, in nats; and how far paired runs end
        apart under random moves, in units of it (1 without pairs).
    """
    about = env.shards.describe()
    n_knobs = len(about.knobs)
    env.shards.call_all("set_reward_scale", 1.0)
    env.seed(((model.seed or 0) << _TASK_BITS) + _CALIBRATION_SEED)
    rng = np.random.default_rng(model.seed)
    resting = np.arange(env.num_envs) % 2 == 0
    observations: list[Any] = [env.reset()]
    improvement = np.zeros(env.num_envs)
    for _ in range(about.n_control_steps):
        actions = rng.normal(0, 0.6, (env.num_envs, n_knobs)).clip(-1, 1)
        actions[resting] = 0
        observation, _, _, infos = env.step(actions)
        observations.append(observation)
        improvement += [info["own_reward"] for info in infos]
    normaliser = model.policy.features_extractor
    assert isinstance(normaliser, Normaliser)
    stacked = np.concatenate(observations[:-1])
    mean, std = standardisation(stacked, about.observation_names)
    normaliser.mean.copy_(torch.from_numpy(mean))
    normaliser.std.copy_(torch.from_numpy(std))
    by_shard = improvement.reshape(env.shards.n_shards, -1)
    rested = np.where(resting, improvement, np.nan).reshape(by_shard.shape)
    rested[np.isnan(rested).all(axis=1)] = by_shard[np.isnan(rested).all(axis=1)]
    scales = np.maximum(np.nanmedian(rested, axis=1), 1e-3)
    if env.paired_runs == 1:
        return scales.tolist(), 1.0
    relative = (by_shard / scales[:, None]).reshape(-1, env.paired_runs)
    return scales.tolist(), max(float(np.median(relative.std(axis=1))), 1e-3)


class _Keeper(BaseCallback):
    """Keeps checkpoints, the board and the progress bar up to date."""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        shards: ShardRow,
        scales: list[float],
        progress: Progress | None,
        report: Callable[[int, float], None] | None,
        resumed: dict[str, Tensor] | None,
        board: Board,
    ) -> None:
        super().__init__()
        self.board = board
        self._resumed = resumed
        self.config, self.run_dir, self.shards = config, run_dir, shards
        self.scales, self.progress, self.report = scales, progress, report
        self._updates = 0
        self._ended: list[dict[str, Any]] = []
        self._mean_return: float | None = None

    def _on_rollout_start(self) -> None:
        assert isinstance(self.model, PPO)
        kept = self._resumed is not None  # it begins at a checkpoint, which is there
        if self._resumed is not None:
            restore_exploration(self.model, self._resumed)
            self._resumed = None
        if self._updates % self.config.checkpoint_every == 0 and not kept:
            tensors, scalars = snapshot(self.model, self.shards, self.scales)
            folder = self.run_dir / "checkpoints"
            save_checkpoint(folder, self.num_timesteps, tensors, scalars)
            self.board.flush()
        every = self.config.policy_every
        before = self.num_timesteps - self.model.n_steps * self.model.n_envs
        if every and before // every < self.num_timesteps // every:
            policy = _to_policy(self.model, self.shards.describe(), self.config, self.scales)
            policy.save(self.run_dir / "policies" / f"{self.num_timesteps:09d}")
        self._updates += 1
        self._ended = []

    def _on_step(self) -> bool:
        self._ended += [self.locals["infos"][i] for i in np.flatnonzero(self.locals["dones"])]
        if self.progress is not None:
            total = self.config.ppo.total_timesteps
            self.progress(min(self.num_timesteps, total), total, self._status())
        return True

    def _status(self) -> str:
        return "" if self._mean_return is None else f"return {self._mean_return:.3f}"

    def _on_rollout_end(self) -> None:
        if not self._ended:
            return
        record = self.logger.record
        self._mean_return = float(np.mean([info["own_return"] for info in self._ended]))
        record("rollout/ep_rew_mean", self._mean_return)
        record("rollout/ep_count", len(self._ended))
        record("rollout/diverged", float(np.mean([info["diverged"] for info in self._ended])))
        for name in ("probe_loss", "train_loss", "relative_cost"):
            values = [info[name] for info in self._ended if name in info]
            finite = [value for value in values if np.isfinite(value)]  # who diverged has others
            if finite:
                record(f"probe/final_{name}", float(np.mean(finite)))
        for name in (key for key in self._ended[0] if key.startswith("knob/")):
            record(f"{name}_final", float(np.mean([info[name] for info in self._ended])))
        if self.report is not None:
            self.report(self.num_timesteps, self._mean_return)


def _to_policy(model: PPO, about: Description, config: TrainConfig, scales: list[float]) -> Policy:
    """The deterministic part of the actor, as data."""
    normaliser = model.policy.features_extractor
    assert isinstance(normaliser, Normaliser)
    layers = [m for m in model.policy.mlp_extractor.policy_net if isinstance(m, nn.Linear)]
    layers.append(model.policy.action_net)  # type: ignore[arg-type]
    seen = len(about.observation_names)
    weights = {"mean": normaliser.mean[:seen], "std": normaliser.std[:seen]}
    for i, layer in enumerate(layers):
        weights |= {f"weight_{i}": layer.weight, f"bias_{i}": layer.bias}
    weights["weight_0"] = weights["weight_0"] * model.policy.mlp_extractor.seen  # type: ignore[operator]
    card = PolicyCard(
        format_version=FORMAT_VERSION,
        metactl_version=versions()["metactl"],
        knobs=about.knobs.knobs,
        observations=about.observation_names,
        hidden=config.ppo.hidden,
        n_control_steps=about.n_control_steps,
        training={"config": dump(config), "reward_scales": scales, "versions": versions()},
        clip=CLIP,
    )
    return Policy(card, {name: w.detach().double().numpy() for name, w in weights.items()})
