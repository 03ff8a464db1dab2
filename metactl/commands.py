"""The commands and their flags, with the help that `metactl COMMAND --help` shows."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


def _by_default(what: str) -> Any:
    """What the help says instead of a default of None."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {what})")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a meta-controller on many small runs; the policy lands in RUN_DIR/policy."""

    run_dir: Path
    """New directory for the policy, TensorBoard files, checkpoints and the resolved config."""
    config: Annotated[str | None, _by_default("the values in metactl/config.py")] = None
    """YAML file, or the name of a packaged recipe: 'default' is that of the policy that ships."""
    data: Annotated[Path | None, _by_default("the Python standard library's sources")] = None
    """File or folder of text to train on."""
    rotation: str | None = None
    """Rotation variant by name, several joined by +, e.g. givens+t5 (see docs/rotations.md)."""
    total_timesteps: int | None = None
    """Control steps to learn from, over all runs."""
    n_envs: int | None = None
    """Training runs per worker process."""
    n_workers: int | None = None
    """Worker processes (-1: one per core, 0: none)."""
    shards: Literal["processes", "ray"] | None = None
    """Where workers live: processes of this machine, or actors of a Ray cluster."""
    num_shards: int | None = None
    """The same as --n-workers."""
    gpus_per_shard: float | None = None
    """GPUs, or a share of one, of each Ray actor."""
    address: Annotated[str | None, _by_default("RAY_ADDRESS, else one on this machine")] = None
    """Of the Ray cluster."""
    seed: int | None = None
    """Determines tasks, runs and learning."""
    resume: bool = False
    """Go on from the newest checkpoint in RUN_DIR."""
    set: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Any config key, e.g. --set ppo.learning_rate=3e-4 --set environment.options.context=64."""

    @property
    def workers(self) -> int | None:
        """By either name."""
        if self.num_shards is None or self.n_workers is None:
            return self.n_workers if self.num_shards is None else self.num_shards
        raise ValueError("--num-shards and --n-workers are the same: give one of them")


@dataclass(frozen=True, kw_only=True)
class Apply:
    """Train new models under a policy; with --compare, beside paired twins at default knobs."""

    policy: Path
    """Folder of a trained policy, such as RUN_DIR/policy, or the name of one that ships: 'default',
    or 'families' for what is not text."""
    run_dir: Path
    """New directory for the trained models, losses, figure and TensorBoard files."""
    data: Annotated[Path | None, _by_default("the Python standard library's sources")] = None
    """File or folder of text to learn."""
    optimizer_steps: Annotated[int | None, _by_default("as in the policy's training")] = None
    """Optimizer steps per run, at least 40; rounded to a multiple of the 40 control steps."""
    d_model: int | None = None
    """Channels of the transformer."""
    n_layers: int | None = None
    """Blocks of the transformer."""
    n_heads: int | None = None
    """Attention heads of the transformer."""
    context: int | None = None
    """Tokens (bytes) per sequence."""
    batch_size: int | None = None
    """Sequences per optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate."""
    unique_bytes: Annotated[
        int | None, _by_default("all of --data, or as in the policy's training")
    ] = None
    """Bytes of training data."""
    rotation: str | None = None
    """Rotation variant by name, several joined by +, e.g. givens+t5 (see docs/rotations.md)."""
    device: str | None = None
    """Torch device, such as cpu or cuda."""
    environment: str | None = None
    """Id of the environment, MODULE:NAME-vN, where the policy was trained in one of yours."""
    n_runs: int = 1
    """New training runs, advanced together."""
    seed: int = 0
    """Determines data, weights, batches and noise."""
    compare: bool = False
    """Also train paired twins at default knobs, and print the paired table."""
    sample: int = 0
    """Bytes of text to print that the first trained model writes."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare a policy on paired held-out runs: static settings, a rule, and itself made blind."""

    policy: Path = Path("default")
    """Folder of a trained policy, such as RUN_DIR/policy, or the name of one that ships: 'default',
    or 'families' for what is not text."""
    run_dir: Path | None = None
    """Keep what was played here: the same command goes on after a stop, and plays nothing twice."""
    json: Path | None = None
    """Write the report here as JSON."""
    update_card: bool = False
    """Also write the figures into the policy's own card."""
    figure: Path | None = None
    """Draw losses and knobs of some tasks here, as PNG."""
    data: Annotated[Path | None, _by_default("held-out part of what it was trained on")] = None
    """File or folder of text."""
    environment: str | None = None
    """Id of the environment, MODULE:NAME-vN, where the policy was trained in one of yours."""
    suite: Literal["quick", "full"] = "quick"
    """full: also PBT, single signals swapped, single knobs, --beforehand, --disturbed, searches:
    hours, so give --run-dir, too."""
    beforehand: bool = False
    """Also tune a static setting on tasks of meta-training, and begin there whatever moves
    knobs."""
    disturbed: bool = False
    """Also play the main arms again, with something befalling every run."""
    headroom: bool = False
    """Instead of the policy: how far static settings and schedules are apart, by task family."""
    families: tuple[str, ...] = ("text", "recall", "waves")
    """Task families of --headroom; there is also 'digits', with --set context=64."""
    n_tasks: Annotated[int | None, _by_default("32; full: 64")] = None
    """Paired held-out tasks."""
    grid: Annotated[int | None, _by_default("16; full: 64")] = None
    """Static settings over all knobs, the default among them."""
    static: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """A further static setting, e.g. --static dropout=0,attention_span=8."""
    rival: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Another policy on the same runs, folder or name, e.g. --rival default."""
    schedule_runs: Annotated[int | None, _by_default("0; full: 2688")] = None
    """Also search the best schedule by CMA-ES with so many runs (0: none), and with as many more
    one that is told what is known of a task."""
    linear_runs: Annotated[int | None, _by_default("0; full: 2688")] = None
    """Also search the best linear policy on the same signals, as PPO's rival (0: no search); it is
    left in RUN_DIR/linear, for --rival elsewhere."""
    optimizer_steps: Annotated[int | None, _by_default("as in the policy's training")] = None
    """Optimizer steps per run, at least 40; rounded to a multiple of the 40 control steps."""
    rotation: str | None = None
    """Rotation variant by name, several joined by +, e.g. givens+t5 (see docs/rotations.md)."""
    set: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Any option of the environment, e.g. --set task=waves --set d_model=64 --set n_layers=4."""
    n_envs: int = 16
    """Training runs per worker process."""
    n_workers: int = -1
    """Worker processes (-1: one per core, 0: none)."""
    seed: int = 0
    """Determines tasks and runs."""

    def sizes(self) -> dict[str, int]:
        """How much is played: those of the suite, where nothing else is said."""
        said = {
            "n_tasks": self.n_tasks,
            "grid_points": self.grid,
            "schedule_runs": self.schedule_runs,
            "linear_runs": self.linear_runs,
        }
        return _SIZES[self.suite] | {name: n for name, n in said.items() if n is not None}

    def check_headroom(self) -> None:
        """Refuses, with `ValueError`, the flags that --headroom has no use for."""
        of_policies = ("update_card", "figure", "rival", "static", "linear_runs")
        for flag in (*of_policies, "beforehand", "disturbed"):
            if getattr(self, flag):
                raise ValueError(f"--{flag.replace('_', '-')} is about a policy, --headroom is not")
        if self.suite != "quick":
            raise ValueError(f"--suite {self.suite} is about a policy, --headroom is not")
        if any(text.partition("=")[0].strip() == "task" for text in self.set):
            raise ValueError("--set task=... is not for --headroom; name families by --families")
        if not self.families:
            raise ValueError("--families needs at least one family, got none")


_SIZES = {
    "quick": {"n_tasks": 32, "grid_points": 16, "schedule_runs": 0, "linear_runs": 0},
    # searches with as many runs as one training by configs/default.yaml
    "full": {"n_tasks": 64, "grid_points": 64, "schedule_runs": 2688, "linear_runs": 2688},
}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Vary a meta-training, where a policy is applied, or the knobs themselves, on Ray Tune."""

    run_dir: Path
    """Directory of the sweep, on a cluster one that all nodes see; what was stopped goes on."""
    config: str = "sweep"
    """YAML file, or the name of a packaged sweep: sweep, sweep_default, sweep_apply, sweep_pbt."""
    address: Annotated[str | None, _by_default("RAY_ADDRESS, else one on this machine")] = None
    """Of a Ray cluster."""
    rotation: str | None = None
    """Rotation variant of all trials, several joined by +, e.g. givens+t5 (docs/rotations.md)."""
    dry_run: bool = False
    """Print the trials and what they need, and start nothing."""
    set: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Any key of the sweep, e.g. --set samples=4 --set resources.gpu=0.25."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check somebody's own TrainingRun or environment against the contract, in words."""

    target: tyro.conf.Positional[str]
    """An environment id such as 'envs:AdaptiveTransformer-v0', or MODULE:CLASS."""
    rotation: str | None = None
    """Rotation variant of an environment that has them (see docs/rotations.md)."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The main job in minutes: train a policy, apply it to text it never saw, compare."""

    run_dir: Path = Path("runs/demo")
    """Directory for everything the demo makes; an earlier demo in it is replaced."""
    config: str = "demo"
    """YAML file, or the name of a packaged recipe."""
    rotation: str | None = None
    """Rotation variant by name, several joined by +, e.g. givens+t5 (see docs/rotations.md)."""


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Apply, tyro.conf.subcommand("apply")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def read_command(arguments: list[str] | None = None) -> Any:
    """The command that somebody typed; a module of theirs can be imported from where they stand.

    Args:
        arguments: Those of this process by default.

    Raises:
        ValueError: For an argument that is empty, a folder that is none.
        SystemExit: For what is no command; the help, or what is wrong, is printed.
    """
    _require_filled(sys.argv[1:] if arguments is None else arguments)
    command: Any = tyro.cli(
        Command,
        args=arguments,
        prog="metactl",
        description="A learned controller that adjusts a transformer's knobs while it trains.",
    )
    if (here := _current_folder()) not in sys.path:
        sys.path.append(here)
    return with_home(command)


def _require_filled(arguments: Sequence[str]) -> None:
    """Refuses, with `ValueError`, arguments that are empty."""
    for argument in arguments:
        if argument == "" or re.fullmatch("--[a-z-]+=", argument):
            what = argument.removesuffix("=") or "an argument"
            raise ValueError(f"{what} is empty: is a variable of the shell not set?")


def with_home(command: Any) -> Any:
    """A command with its run directory spelt out: a shell leaves `--run-dir=~/x` as it is."""
    run_dir = getattr(command, "run_dir", None)
    if run_dir is None:
        return command
    from metactl.rundir import resolved

    return replace(command, run_dir=resolved(run_dir, "Run directory"))


def _current_folder() -> str:
    """Where somebody stands; refuses, with `ValueError`, one that is gone."""
    try:
        return str(Path.cwd())
    except FileNotFoundError as error:
        raise ValueError("the current folder is gone; change to another") from error
