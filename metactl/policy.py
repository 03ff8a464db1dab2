"""The policy file: a learned controller as data, never as code.

A policy is a folder of two files: `policy.json` (the card: what it observes, what it moves, how it
was trained, what it reached) and `weights.safetensors`. Reading one parses strict JSON and plain
tensors; nothing in it can run. The card holds the checksum of the weights.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from metactl.config import STRICT, ConfigError, dump, parse
from metactl.errors import unknown_name
from metactl.files import read_bytes, write_atomically
from metactl.homeostasis import SetPoints
from metactl.knobs import FloatArray, Knob

FORMAT_VERSION = 1
_SMALL = 1e-3  # of a tanh unit that is to be linear
CLIP = 4.0  # of new policies: no observation lies far outside of what training saw
_MAX_BYTES = 64 << 20
_CARD = "policy.json"
_SHIPPED = Path(__file__).parent / "policies"


class PolicyError(ValueError):
    """A policy file that cannot be used; the message says which and why."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PolicyCard:
    """Everything about a policy but its weights.

    Args:
        format_version: Of this file format.
        metactl_version: That wrote it.
        knobs: What it moves, in the order of its actions.
        observations: What it observes, by name, in order.
        hidden: Units of the hidden tanh layers.
        members: Networks whose actions are averaged.
        n_control_steps: Decisions per run in training.
        training: Configuration it was trained with.
        evaluation: Figures it reached, by name.
        clip: Bound of the standardised observations, as in training.
        set_points: Where healthy runs are, on the tasks of its training.
        weights_sha256: Checksum of `weights.safetensors`.
    """

    format_version: int
    metactl_version: str
    knobs: tuple[Knob, ...]
    observations: tuple[str, ...]
    hidden: tuple[int, ...]
    n_control_steps: int
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    members: int = 1
    clip: float = 10.0
    set_points: SetPoints | None = None
    weights_sha256: str = ""


def find_policy(policy: str | Path) -> Path:
    """The folder of a policy: the one given, or that of a policy that ships, by its name.

    Raises:
        PolicyError: For a bare name that is neither.
    """
    if not isinstance(policy, str | Path):
        raise PolicyError(f"policy must be a name or a folder, got {policy!r}")
    folder = Path(os.path.expanduser(policy))
    if folder.is_dir() or len(folder.parts) != 1:
        return folder
    shipped = sorted(path.parent.name for path in _SHIPPED.glob(f"*/{_CARD}"))
    if folder.name not in shipped:
        unknown = unknown_name("policy", folder.name, shipped)
        raise PolicyError(f"{unknown} There is no folder of this name either.")
    return _SHIPPED / folder.name


class Policy:
    """A normaliser and a small tanh network, or several of them: observation -> mean action.

    Args:
        card: What it is.
        weights: `mean` and `std` of the observations; `weight_0`, `bias_0`, ... of the layers,
            the last of which gives the actions. With several members, each has its own, along a
            leading dimension.

    Raises:
        PolicyError: If the weights do not fit the card.
    """

    def __init__(self, card: PolicyCard, weights: dict[str, FloatArray]) -> None:
        self.card, self.weights = card, dict(sorted(weights.items()))
        for what, names in (
            ("knobs", [knob.name for knob in card.knobs]),
            ("observations", list(card.observations)),
        ):
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise PolicyError(f"policy card: {what} must differ, {twice!r} is there twice")
        sizes = (len(card.observations), *card.hidden, len(card.knobs))
        if card.members < 1:
            raise PolicyError(f"policy card: members must be at least 1, got {card.members}")
        shapes: dict[str, tuple[int, ...]] = {"mean": sizes[:1], "std": sizes[:1]}
        for i, (n_in, n_out) in enumerate(pairwise(sizes)):
            shapes |= {f"weight_{i}": (n_out, n_in), f"bias_{i}": (n_out,)}
        several = () if card.members == 1 else (card.members,)
        expected = {name: several + shape for name, shape in shapes.items()}
        found = {name: tuple(value.shape) for name, value in weights.items()}
        if found != expected:
            raise PolicyError(f"policy weights must have shapes {expected}, got {found}")
        for name, value in weights.items():
            if not np.isfinite(value).all():
                raise PolicyError(f"policy weight {name!r} has non-finite values")
        if card.n_control_steps < 1:
            raise PolicyError(
                f"policy card: n_control_steps must be at least 1, got {card.n_control_steps}"
            )
        if not card.clip > 0:
            raise PolicyError(f"policy card: clip must be above 0, got {card.clip}")
        if not (weights["std"] > 0).all():
            raise PolicyError("policy weight 'std' must be above 0 everywhere")
        self._n_layers = len(sizes) - 1
        self._members = {
            name: value.reshape(card.members, *shapes[name]) for name, value in self.weights.items()
        }

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1], `[n_runs, n_knobs]` in the order of `card.knobs`.

        Args:
            observation: `[n_runs, n_observations]`, in the order of `card.observations`.
        """
        weights = self._members
        with np.errstate(over="ignore", invalid="ignore"):  # an action not finite moves nothing
            x = (observation[None] - weights["mean"][:, None]) / weights["std"][:, None]
            x = np.clip(x, -self.card.clip, self.card.clip)
            for i in range(self._n_layers):
                # einsum, not a matrix product: one row's action must not depend on how many rows.
                x = np.einsum("mri,moi->mro", x, weights[f"weight_{i}"])
                x = x + weights[f"bias_{i}"][:, None]
                if i < self._n_layers - 1:
                    x = np.tanh(x)
        actions: np.ndarray = np.clip(x, -1.0, 1.0).mean(axis=0)
        return actions

    def as_network(self, hidden: Sequence[int]) -> "Policy":
        """A linear policy as a network, so that `mean_of` can take it together with networks.

        Its tanh units are driven so little that they are linear: with up to two hidden layers
        actions are the same to 1e-6.

        Args:
            hidden: Sizes of the hidden layers.

        Raises:
            PolicyError: If it is not linear, or a layer has fewer units than there are knobs.
        """
        n_knobs = len(self.card.knobs)
        if self.card.hidden or self.card.members > 1:
            raise PolicyError("Only a linear policy of one member can become a network")
        if not hidden or min(hidden) < n_knobs:
            raise PolicyError(
                f"hidden layers need at least {n_knobs} units, one per knob, got {tuple(hidden)}"
            )
        sizes = (len(self.card.observations), *hidden, n_knobs)
        weights = {name: self.weights[name] for name in ("mean", "std")}
        for i, (n_in, n_out) in enumerate(pairwise(sizes)):
            weight, bias = np.zeros((n_out, n_in)), np.zeros(n_out)
            if i == 0:
                weight[:n_knobs] = self.weights["weight_0"] * _SMALL
                bias[:n_knobs] = self.weights["bias_0"] * _SMALL
            else:
                passed = 1 / _SMALL if i == len(hidden) else 1.0
                weight[:n_knobs, :n_knobs] = passed * np.eye(n_knobs)
            weights |= {f"weight_{i}": weight, f"bias_{i}": bias}
        return Policy(replace(self.card, hidden=tuple(hidden)), weights)

    @classmethod
    def mean_of(cls, policies: Sequence["Policy"]) -> "Policy":
        """One policy that acts as several do on average; the rest of its card is the first's.

        Raises:
            PolicyError: If they do not see and move the same, or are not of one shape.
        """
        first = policies[0].card
        for name in ("knobs", "observations", "hidden", "n_control_steps", "clip"):
            if any(getattr(policy.card, name) != getattr(first, name) for policy in policies):
                raise PolicyError(f"Policies that differ in {name} have no mean")
        if len(policies) == 1:
            return policies[0]
        stacked = {
            name: np.concatenate([policy._members[name] for policy in policies])
            for name in policies[0].weights
        }
        return cls(replace(first, members=len(stacked["mean"]), evaluation={}), stacked)

    def member(self, index: int) -> "Policy":
        """One of the networks by itself, from 0 to `card.members` - 1."""
        alone = {name: value[index] for name, value in self._members.items()}
        return Policy(replace(self.card, members=1), alone)

    def with_evaluation(self, figures: dict[str, Any]) -> "Policy":
        """The same policy with figures on its card."""
        return Policy(replace(self.card, evaluation=figures), self.weights)

    def save(self, folder: str | Path) -> None:
        """Writes the policy into a folder, each file atomically, the card last.

        Raises:
            OSError: If that cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        blob = save_tensors({name: _compact(weight) for name, weight in self.weights.items()})
        card = dump(self.card)
        card["weights_sha256"] = hashlib.sha256(blob).hexdigest()
        write_atomically(folder / "weights.safetensors", blob)
        text = json.dumps(card, indent=2, allow_nan=False) + "\n"
        write_atomically(folder / _CARD, text.encode())

    @classmethod
    def load(cls, policy: str | Path) -> "Policy":
        """Reads a policy, by its folder or the name of one that ships, and checks all of it.

        Raises:
            PolicyError: If it is missing, of another version, damaged or not a policy.
        """
        folder = find_policy(policy)
        card = _read_card(folder / _CARD)
        blob = _read(folder / "weights.safetensors")
        if hashlib.sha256(blob).hexdigest() != card.weights_sha256:
            raise PolicyError(
                f"Policy {str(folder)!r} is damaged: weights.safetensors does not match the "
                f"checksum in policy.json"
            )
        try:
            weights = load_tensors(blob)
        except KeyError as error:  # a type that NumPy does not have
            raise PolicyError(
                f"Policy {str(folder)!r} has weights of type {error.args[0]}; F32 and F64 can be "
                f"read"
            ) from error
        except (SafetensorError, ValueError) as error:
            raise PolicyError(f"Policy {str(folder)!r} has unreadable weights: {error}") from error
        for name, weight in weights.items():
            if np.iscomplexobj(weight):
                raise PolicyError(f"Policy {str(folder)!r}: weight {name!r} is not of real numbers")
        try:
            return cls(card, {name: w.astype(np.float64) for name, w in weights.items()})
        except PolicyError as error:
            raise PolicyError(f"Policy {str(folder)!r}: {error}") from error


def _compact(weight: FloatArray) -> np.ndarray:
    """As numbers of half the size, where these are the same numbers."""
    single = np.ascontiguousarray(weight, dtype=np.float32)
    return single if np.array_equal(single, weight) else np.ascontiguousarray(weight)


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, _MAX_BYTES)
    except OSError as error:
        reason = error.strerror or error
        raise PolicyError(
            f"{str(path.parent)!r} is no policy: {path.name} cannot be read: {reason}"
        ) from error


def _read_card(path: Path) -> PolicyCard:
    try:
        fields = json.loads(
            _read(path),
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            object_pairs_hook=_once_each,
        )
    except (ValueError, RecursionError) as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError(f"Policy card {str(path)!r} is not JSON: {error}") from error
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise PolicyError(
            f"Policy card {str(path)!r} has format_version {version!r}; this metactl reads "
            f"{FORMAT_VERSION}"
        )
    try:
        return parse(PolicyCard, fields, f"Policy card {str(path)!r}")
    except ConfigError as error:
        raise PolicyError(str(error)) from error


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r} is there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")
