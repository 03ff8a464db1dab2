"""One learned matrix per head, orthogonally initialised, in four parametrisations."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from models.rotary.component import Component, Shape, draw
from models.rotary.pairs import at_least_float32

_TAYLOR_8 = {torch.float32: (0.58, 4.0), torch.float64: (0.0499, 8.0)}  # norm, usual squarings
_TAYLOR = [1 / math.factorial(k) for k in range(9)]
_MOST_SQUARINGS = 20  # norms up to 6e5 in float32, 5e4 in float64


def _taylor_blocks(powers: Float[Tensor, "three n dim dim"]) -> Sequence[Tensor]:
    """Of 1, A and A^2: Taylor's polynomial of the exponential, in three parts by powers of A^3."""
    if powers.is_cuda:  # numbers from the CPU would be waited for
        of = [[_TAYLOR[3 * i + j] * powers[j] for j in range(3)] for i in range(3)]
        return [a + b + c for a, b, c in of]
    table = torch.tensor(_TAYLOR, dtype=torch.float64).view(3, 3).to(powers)
    return (table @ powers.view(3, -1)).view(powers.shape).unbind()


def skew(weight: Float[Tensor, "*batch dim dim"]) -> Float[Tensor, "*batch dim dim"]:
    """The skew-symmetric matrix of a strict lower triangle."""
    lower = weight.tril(-1)
    return lower - lower.transpose(-2, -1)


def cayley(weight: Float[Tensor, "*batch dim dim"]) -> Float[Tensor, "*batch dim dim"]:
    """(I + A)^-1 (I - A): every rotation without an eigenvalue of -1."""
    a = skew(weight)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve_ex(eye + a, eye - a).result  # I + A is never singular


def exponential(weight: Float[Tensor, "*batch dim dim"]) -> Float[Tensor, "*batch dim dim"]:
    """exp(A): every rotation."""
    a = skew(weight)
    if torch.compiler.is_compiling() and not a.is_cuda:  # there, how often to square is looked at
        return torch.linalg.matrix_exp(a)
    return _scaled_and_squared(a)


def _scaled_and_squared(a: Float[Tensor, "*batch dim dim"]) -> Float[Tensor, "*batch dim dim"]:
    """exp(A) by the Taylor polynomial of degree 8 of A / 2^s, squared s times.

    For many small matrices on a CPU faster than `torch.linalg.matrix_exp`, which sorts them by
    norm. The bounds on the norm are those of arXiv 1710.10989; s depends on the matrix alone, so
    that its neighbours do not change its last bit. On a GPU, where reading it would wait, all are
    squared `_MOST_SQUARINGS` times or left as they are, and a norm that needs more gives NaN.
    """
    bound, usual = _TAYLOR_8[a.dtype]
    norm = a.detach().abs().sum(dim=-1).amax(dim=-1)
    squarings = (norm / bound).log2().ceil().clamp(min=usual).nan_to_num(usual, usual, usual)
    most = _MOST_SQUARINGS if a.is_cuda else int(squarings.max())
    dim = a.shape[-1]
    flat = (a * torch.exp2(-squarings)[..., None, None]).reshape(-1, dim, dim)
    squared = torch.bmm(flat, flat)
    eye = torch.eye(dim, dtype=a.dtype, device=a.device).expand_as(flat)
    low, middle, high = _taylor_blocks(torch.stack((eye, flat, squared)))
    cube = torch.bmm(squared, flat)
    result = torch.baddbmm(low, cube, torch.baddbmm(middle, cube, high))
    for k in range(most):
        again = torch.bmm(result, result)
        done = squarings.flatten()[:, None, None] <= k
        result = again if k < usual else torch.where(done, result, again)
    if a.is_cuda:
        result = torch.where(squarings.flatten()[:, None, None] <= most, result, torch.nan)
    return result.view(a.shape)


def householder(weight: Float[Tensor, "*batch dim dim"]) -> Float[Tensor, "*batch dim dim"]:
    """H_1 ... H_dim with H_k = I - 2 v_k v_k^T / |v_k|^2, v_k the columns of the weight.

    By the compact form I - V T V^T, T^-1 = striu(V^T V) + diag(V^T V) / 2 (Joffrain et al. 2006);
    where v_k is 0, H_k is the identity.
    """
    gram = weight.transpose(-2, -1) @ weight
    squares = gram.diagonal(dim1=-2, dim2=-1)
    inverse = gram.triu() - torch.diag_embed(0.5 * squares - (squares == 0).to(squares))
    solved = torch.linalg.solve_triangular(inverse, weight.transpose(-2, -1), upper=True)
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    return eye - weight @ solved


_MAPS = {
    "free": lambda weight: weight,
    "cayley": cayley,
    "exp": exponential,
    "householder": householder,
}
PARAMETRISATIONS = tuple(_MAPS)


def random_rotation(n: int, dim: int, generator: torch.Generator) -> Float[Tensor, "n dim dim"]:
    """Uniformly distributed rotations (Haar measure, determinant 1), float64."""
    q, r = torch.linalg.qr(draw((n, dim, dim), generator))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    q[:, :, 0] *= torch.linalg.det(q).sign()[:, None]
    return q


def _skew_logarithm(rotation: Tensor) -> Tensor:
    """The real logarithm of rotations, float64."""
    values, vectors = torch.linalg.eig(rotation)
    log = (vectors * values.log()[:, None, :]) @ torch.linalg.inv(vectors)
    return (log.real - log.real.transpose(-2, -1)) / 2


def orthogonality_defect(
    matrix: Float[Tensor, "replica layer head dim dim"],
) -> Float[Tensor, "replica layer head"]:
    """||R R^T - I||_F^2 of every matrix."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return (matrix @ matrix.transpose(-2, -1) - eye).square().sum((-2, -1))


class OrthogonalMatrix(Component):
    """A learned matrix R per head, a random orthogonal matrix at the start.

    Uniformly distributed but for `"cayley"`, which starts from a random skew-symmetric matrix
    (uniform rotations have eigenvalues near -1, where the transform is badly conditioned), and for
    `"householder"`, a product of random reflections, which is nearer to the identity.

    Args:
        shape: Sizes.
        parametrisation: `"free"` (any matrix, kept near orthogonal by a penalty), or one that
            cannot leave the orthogonal matrices: `"cayley"`, `"exp"`, `"householder"`.
        n_layers: Layers that have a matrix of their own; 1 shares it.
    """

    weight: Tensor

    def __init__(self, shape: Shape, parametrisation: str, n_layers: int) -> None:
        super().__init__()
        self.parametrisation = parametrisation
        dim = shape.head_dim
        self.add("weight", shape, layer=n_layers, head=shape.n_heads, row=dim, column=dim)

    def initialise(self, row: int, generator: torch.Generator) -> None:
        size = self.weight.shape[1:]
        rotation = random_rotation(size[0] * size[1], size[-1], generator)
        if self.parametrisation == "cayley":  # far from -1, where its weights grow without bound
            rotation = draw(rotation.shape, generator) / math.sqrt(size[-1])
        elif self.parametrisation == "exp":
            rotation = _skew_logarithm(rotation)
        elif self.parametrisation == "householder":
            rotation = draw(rotation.shape, generator)
        self.weight[row].copy_(rotation.view(size))

    def forward(self) -> Float[Tensor, "replica layer head dim dim"]:
        """The matrices, to be applied as x @ R."""
        matrix: Tensor = _MAPS[self.parametrisation](at_least_float32(self.weight))
        return matrix
