"""What Gymnasium calls to build the environments of this package."""

from dataclasses import fields
from typing import Any

from metactl.shards import require_own_package

require_own_package("models")

from envs.transformer_run import AdaptiveTransformerRun, RunConfig, build_run  # noqa: E402
from metactl.config import ConfigError  # noqa: E402
from metactl.env import TrainingRunEnv, TrainingRunVectorEnv  # noqa: E402
from metactl.episodes import ControlConfig, split_options  # noqa: E402
from metactl.errors import unknown_name  # noqa: E402

__all__ = ["AdaptiveTransformerRun", "RunConfig", "make_environment", "make_vector_environment"]


def make_environment(render_mode: str | None = None, **options: Any) -> TrainingRunEnv:
    """One adaptive transformer as an environment; options of `RunConfig` and `ControlConfig`."""
    return TrainingRunEnv(*_built(1, options), render_mode=render_mode)


def make_vector_environment(
    num_envs: int = 1,
    render_mode: str | None = None,
    max_episode_steps: int | None = None,
    **options: Any,
) -> TrainingRunVectorEnv:
    """A population of adaptive transformers as a vector environment.

    Raises:
        ConfigError: For a bound of an episode's steps: an episode is a whole run.
    """
    if max_episode_steps is not None:
        raise ConfigError(
            f"max_episode_steps must be None, got {max_episode_steps}: an episode is a whole run, "
            f"of n_control_steps"
        )
    return TrainingRunVectorEnv(*_built(num_envs, options), render_mode=render_mode)


def _built(n_runs: int, options: dict[str, Any]) -> tuple[AdaptiveTransformerRun, ControlConfig]:
    known = [field.name for kind in (RunConfig, ControlConfig) for field in fields(kind)]
    for name in options:
        if name not in known:
            raise ConfigError(unknown_name("option", name, known))
    run_options, control = split_options(options)
    run = build_run(n_runs, run_options)
    if run.config.horizon_range[0] < control.n_control_steps:  # a draw would stop a training
        raise ValueError(
            f"horizon must be at least n_control_steps={control.n_control_steps} optimizer steps, "
            f"got {run.config.horizon}"
        )
    return run, control
