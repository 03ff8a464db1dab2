"""AdamW for many replicas at once, in one flat buffer."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from envs.graph import OwnPrograms, as_it_is, fused
from models import AdaptiveTransformer
from models.width import active_along


@dataclass(frozen=True)
class _Views:
    """Parts of the buffers that are stepped together, each with a leading replica dimension.

    Args:
        values: Parameters.
        moment1: Their first moments.
        moment2: Their second moments.
        gradient: Their gradients.
        decayed: Stretches of the second dimension that decay.
    """

    values: Tensor
    moment1: Tensor
    moment2: Tensor
    gradient: Tensor
    decayed: list[slice]


class ReplicatedAdamW(OwnPrograms):
    """AdamW (arXiv 1711.05101) with a learning rate, a clip and an active mask per replica.

    All parameters of all replicas live in one buffer `[n_replicas, n_params]`; the model's
    parameters become views of it, so a step is a handful of elementwise operations and a replica
    is one row.

    The moments are kept bias-corrected: m <- m + (1 - b1) / (1 - b1^t) * (g - m) equals Adam's
    m / (1 - b1^t). `t` counts per replica and width level, so parameters of an inactive level are
    frozen whole (value, moments, count) and continue where they stopped.

    Args:
        model: Its parameters are moved into the buffer.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        max_norm: Gradient norm above which a replica's gradient is scaled down.
        fuse: Compile the elementwise part of a step.

    Where the model is capturable, or on a GPU, numbers on the device never decide what is computed.
    """

    programs = ("_whole", "_views", "_update")

    def __init__(
        self,
        model: AdaptiveTransformer,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        max_norm: float = 1.0,
        fuse: bool = False,
    ) -> None:
        self.betas, self.eps, self.max_norm = betas, eps, max_norm
        self._parameters = list(model.parameters())
        self._sizes = [p[0].numel() for p in self._parameters]
        n = model.n_replicas
        self._fused = fuse
        self.values = torch.cat([p.detach().reshape(n, -1) for p in self._parameters], dim=1)
        self.moment1 = torch.zeros_like(self.values)
        self.moment2 = torch.zeros_like(self.values)
        self.gradient = torch.zeros_like(self.values)
        n_levels = model.knobs.gates.shape[1]
        device = self.values.device
        self.counts = torch.zeros(n, n_levels, dtype=torch.float64, device=device)
        levels, decayed = model.parameter_levels(), model.decayed_parameters()
        names = [name for name, _ in model.named_parameters()]
        self._levels = [levels[name] for name in names]
        self._level = torch.cat([level.flatten() for level in self._levels]).int()
        self._decays = [[slice(None)] if name in decayed else [] for name in names]
        stretches = _stretches(model)
        self._decayed = torch.zeros_like(self.values[:1])
        for stretch in stretches:
            self._decayed[:, stretch] = 1
        self._stretches = [slice(None)] if fuse else stretches
        self._sliced = model.sliced
        self._may_look = device.type == "cpu" and not model.knobs.capturable and not fuse
        # A rotation's parameters may be exactly 0: how far they move says nothing of their size.
        self._measured = [i for i, name in enumerate(names) if not name.startswith("rotation.")]
        self.build_programs()

    def build_programs(self) -> None:
        """Also makes the parameters, and what is stepped, views of the buffers."""
        buffers = (self.values, self.moment1, self.moment2, self.gradient)
        self._whole = _Views(*buffers, self._stretches)
        self._views: dict[int, list[_Views]] = {}
        self._update = (fused if self._fused else as_it_is)(self._turn_all_into_step)
        for p, part in zip(self._parameters, self.values.split(self._sizes, dim=1), strict=True):
            p.data = part.view(p.shape)

    def _collect_gradient(self, changed: list[_Views]) -> Float[Tensor, " replica"]:
        """Moves the parameters' gradients into the buffer; returns each replica's norm."""
        n = len(self.values)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        torch.cat([g.reshape(n, -1) for g in gradients], dim=1, out=self.gradient)
        for p in self._parameters:
            p.grad = None
        norms = [
            torch.linalg.vector_norm(views.gradient, dim=tuple(range(1, views.gradient.dim())))
            for views in changed
        ]
        return torch.linalg.vector_norm(torch.stack(norms), dim=0) if norms[1:] else norms[0]

    @torch.no_grad()
    def step(
        self,
        learning_rate: Float[Tensor, " replica"],
        weight_decay: Float[Tensor, " replica"],
        active: Bool[Tensor, "replica level"],
        *,
        measure: bool = False,
    ) -> tuple[Float[Tensor, " replica"], Float[Tensor, "replica block"] | None]:
        """One optimizer step of every replica.

        Args:
            learning_rate: Step size per replica.
            weight_decay: Decoupled decay per replica, for matrices and embeddings.
            active: Width levels that take part; the others' parameters stay bit for bit.
            measure: Also return how far each parameter tensor moved.

        Returns:
            Gradient norm before clipping, and with `measure` the update-to-weight ratio
            ||p_new - p|| / ||p|| of each parameter tensor but the rotation's.
        """
        self.counts += active
        tables = [self._rate(beta, active) for beta in self.betas]
        tables = [t.to(self.values) for t in (*tables, learning_rate[:, None] * active)]
        decay = weight_decay[:, None].to(self.values)
        top = self._shared_top(active, tables)
        changed = [self._whole] if top is None else self._active_views(top)
        norm = self._collect_gradient(changed)
        scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for views in changed:
            views.gradient.mul_(_along(views, scale))
        if top is None:
            self._update(decay, *tables)
        else:
            for views in changed:
                numbers = (_along(views, t[:, 0]) for t in (decay, *tables))
                self._turn_into_step(views, *numbers)
        ratios = None
        if measure:
            ratios = self._block_norms(self.gradient) / self._block_norms(self.values)
        for views in changed:
            views.values.sub_(views.gradient)
        return norm, ratios

    def _turn_all_into_step(self, decay: Tensor, *tables: Tensor) -> None:
        if self._fused:  # one pass over all of it; a few unequal stretches would be many
            decay = decay * self._decayed
        self._turn_into_step(self._whole, decay, *(self._spread(table) for table in tables))

    def _turn_into_step(
        self, views: "_Views", decay: Tensor, rate1: Tensor, rate2: Tensor, rate: Tensor
    ) -> None:
        """Takes gradients in and leaves in their place what is to be subtracted."""
        step = views.gradient
        views.moment1.lerp_(step, rate1)
        views.moment2.lerp_(step.square_(), rate2)
        torch.sqrt(views.moment2, out=step).add_(self.eps)
        torch.div(views.moment1, step, out=step).mul_(rate)
        decay = (rate * decay).expand_as(step)
        for part in views.decayed:
            step[:, part].addcmul_(views.values[:, part], decay[:, part])

    def _shared_top(self, active: Tensor, tables: list[Tensor]) -> int | None:
        """The level up to which all replicas take part, where one number does for each table.

        Then what is inactive need not be touched.
        """
        if not self._sliced or not self._may_look or bool(active.all()):
            return None
        n_active = int(active[0].sum())
        alike = all(bool((t[:, :n_active] == t[:, :1]).all()) for t in tables)
        return n_active - 1 if alike and n_active else None

    def _active_views(self, top: int) -> "list[_Views]":
        """Views of what is active of each parameter; a level's elements lie in equal stretches."""
        if top not in self._views:
            buffers = (self.values, self.moment1, self.moment2, self.gradient)
            parts = zip(*(b.split(self._sizes, dim=1) for b in buffers), strict=True)
            shapes = [p.shape for p in self._parameters]
            self._views[top] = []
            for part, shape, level, decayed in zip(
                parts, shapes, self._levels, self._decays, strict=True
            ):
                values, first, second, gradient = (
                    _active(buffer.view(shape), level <= top) for buffer in part
                )
                self._views[top].append(_Views(values, first, second, gradient, decayed))
        return self._views[top]

    def _block_norms(self, flat: Tensor) -> Tensor:
        """Norm of each measured parameter tensor in a buffer, `[n_replicas, n_blocks]`."""
        blocks = flat.split(self._sizes, dim=1)
        norms = [torch.linalg.vector_norm(blocks[i], dim=1) for i in self._measured]
        return torch.stack(norms, dim=1)

    def _rate(self, beta: float, active: Tensor) -> Tensor:
        rate = (1 - beta) / (1 - beta ** self.counts.clamp(min=1))
        return rate * active

    def _spread(self, table: Tensor) -> Tensor:
        """`[replica, level]` over the parameters, `[replica, n_params]`.

        Where all levels have the same value, one column stands for all.
        """
        if self._may_look and bool((table == table[:, :1]).all()):
            return table[:, :1]
        if not self._fused:
            return table.index_select(1, self._level)
        spread = table[:, :1]  # by choices, since a gather would keep what is fused from vectors
        for level in range(1, table.shape[1]):
            spread = torch.where(self._level >= level, table[:, level : level + 1], spread)
        return spread

    def reset_rows(self, rows: list[int]) -> None:
        """Forgets the moments and counts of some replicas."""
        for state in (self.moment1, self.moment2, self.counts):
            state[rows] = 0

    def tensors(self) -> dict[str, Tensor]:
        """The state, each tensor with a leading replica dimension."""
        return {
            "values": self.values,
            "moment1": self.moment1,
            "moment2": self.moment2,
            "counts": self.counts,
        }


def _stretches(model: AdaptiveTransformer) -> list[slice]:
    """Where the decayed parameters lie in the buffer, neighbours together."""
    decayed, start = model.decayed_parameters(), 0
    stretches: list[slice] = []
    for name, parameter in model.named_parameters():
        end = start + parameter[0].numel()
        if name in decayed and stretches and stretches[-1].stop == start:
            stretches[-1] = slice(stretches[-1].start, end)
        elif name in decayed:
            stretches.append(slice(start, end))
        start = end
    return stretches


def _along(views: _Views, number: Tensor) -> Tensor:
    """One number per replica, to be broadcast over what is stepped."""
    return number.view(-1, *(1,) * (views.values.dim() - 1))


def _active(whole: Tensor, active: Tensor) -> Tensor:
    """A view of the active elements of `[replica, *axes]`, which is their product over the axes.

    Along an axis they are the same share at the start of one or several equal stretches.
    """
    view, offset = whole, 1
    for axis in range(active.dim()):
        along = active_along(active, axis)
        starts = int((along[1:] & ~along[:-1]).sum()) + int(along[0])
        size = len(along) // starts
        view = view.unflatten(axis + offset, (starts, size)).narrow(
            axis + offset + 1, 0, int(along[:size].sum())
        )
        offset += 1
    return view
