"""AdamW for many replicas at once, in one flat buffer."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models import AdaptiveTransformer


class ReplicatedAdamW:
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
    """

    def __init__(
        self,
        model: AdaptiveTransformer,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        max_norm: float = 1.0,
    ) -> None:
        self.betas, self.eps, self.max_norm = betas, eps, max_norm
        self._parameters = list(model.parameters())
        n = model.n_replicas
        self.values = torch.cat([p.detach().reshape(n, -1) for p in self._parameters], dim=1)
        self._point_parameters_at_values()
        self.moment1 = torch.zeros_like(self.values)
        self.moment2 = torch.zeros_like(self.values)
        self.gradient = torch.zeros_like(self.values)
        n_levels = model.knobs.gates.shape[1]
        device = self.values.device
        self.counts = torch.zeros(n, n_levels, dtype=torch.float64, device=device)
        levels = model.parameter_levels()
        self._level = torch.cat([levels[name].flatten() for name, _ in model.named_parameters()])
        self._decayed = _stretches(model)
        self._sizes = [p[0].numel() for p in self._parameters]
        names = [name for name, _ in model.named_parameters()]
        # A rotation's parameters may be exactly 0: how far they move says nothing of their size.
        self._measured = [i for i, name in enumerate(names) if not name.startswith("rotation.")]

    def _point_parameters_at_values(self) -> None:
        start = 0
        for p in self._parameters:
            size = p[0].numel()
            p.data = self.values[:, start : start + size].view(p.shape)
            start += size

    def collect_gradient(self) -> Float[Tensor, " replica"]:
        """Moves the parameters' gradients into the buffer; returns each replica's norm."""
        n = len(self.values)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        torch.cat([g.reshape(n, -1) for g in gradients], dim=1, out=self.gradient)
        for p in self._parameters:
            p.grad = None
        return torch.linalg.vector_norm(self.gradient, dim=1)

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
        norm = self.collect_gradient()
        scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        gradient = self.gradient.mul_(scale[:, None])
        self.counts += active
        beta1, beta2 = self.betas
        self.moment1.lerp_(gradient, self._expand(self._rate(beta1, active)))
        self.moment2.lerp_(gradient.square_(), self._expand(self._rate(beta2, active)))
        rate = learning_rate[:, None] * active
        step = torch.sqrt(self.moment2, out=self.gradient).add_(self.eps)
        torch.div(self.moment1, step, out=step).mul_(self._expand(rate))
        decay = self._expand(rate * weight_decay[:, None]).expand_as(step)
        for part in self._decayed:
            step[:, part].addcmul_(self.values[:, part], decay[:, part])
        ratios = None
        if measure:
            ratios = self._block_norms(step) / self._block_norms(self.values)
        self.values.sub_(step)
        return norm, ratios

    def _block_norms(self, flat: Tensor) -> Tensor:
        """Norm of each measured parameter tensor in a buffer, `[n_replicas, n_blocks]`."""
        blocks = flat.split(self._sizes, dim=1)
        norms = [torch.linalg.vector_norm(blocks[i], dim=1) for i in self._measured]
        return torch.stack(norms, dim=1)

    def _rate(self, beta: float, active: Tensor) -> Tensor:
        rate = (1 - beta) / (1 - beta ** self.counts.clamp(min=1))
        return rate * active

    def _expand(self, table: Tensor) -> Tensor:
        """Spreads `[replica, level]` over the parameters, `[replica, n_params]`.

        Where all levels have the same value, one column stands for all (told apart on a CPU only:
        elsewhere it would wait for the device).
        """
        table = table.to(self.values)
        if table.device.type == "cpu" and bool((table == table[:, :1]).all()):
            return table[:, :1]
        return table.index_select(1, self._level)

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
