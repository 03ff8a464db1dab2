"""Gradients written by hand, where autograd would waste passes."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses a graph of the gradient, which would silently leave out what was saved.

    (Torch's `once_differentiable` refuses only where the incoming gradient has a graph, too.)

    Raises:
        RuntimeError: For `create_graph=True`.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "There is no second derivative: create_graph=True asks for a graph of a gradient "
                "that is written by hand"
            )
        return backward(ctx, *grads)

    return checked
