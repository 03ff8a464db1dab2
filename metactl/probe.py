"""The probe of somebody else's run: a loss on held-out batches, asked for and not trusted."""

import logging
import math
from collections.abc import Callable

from torch import Tensor, nn

from metactl.adapters import AttachError
from metactl.adapters.trial import sealed

logger = logging.getLogger(__name__)


class Probe:
    """Asks the owner's function, with the model in evaluation mode and nothing of it changed.

    Args:
        function: Returns the loss, above 0; `None` where there is none.
        model: The model.
        strict: Raise what goes wrong in it; else it is left out from then on, with one warning.
    """

    def __init__(
        self, function: Callable[[], float | Tensor] | None, model: nn.Module, *, strict: bool
    ) -> None:
        self._function, self._model, self._strict = function, model, strict

    def first(self) -> float | None:
        """The loss before the first step, where a probe must work; `None` where there is none.

        Raises:
            AttachError: If it fails, or its loss is not finite and above 0.
        """
        if self._function is None:
            return None
        try:
            loss = self._ask(self._function)
        except Exception as error:
            raise AttachError(f"the probe failed: {type(error).__name__}: {error}") from error
        if not math.isfinite(loss):
            raise AttachError(f"the probe must return a finite loss, got {loss}")
        if loss < 0:
            raise AttachError(
                f"the probe must return a loss above 0, such as nats per token, got {loss:g}: "
                f"signals are ratios of losses"
            )
        return loss

    def loss(self) -> float | None:
        """The loss now; `None` where there is none, or it failed."""
        if self._function is None:
            return None
        try:
            return self._ask(self._function)
        except Exception as error:
            if self._strict:
                raise
            logger.warning(
                "metactl: the probe failed (%s: %s); going on without it",
                type(error).__name__,
                error,
            )
            self._function = None
            return None

    def _ask(self, function: Callable[[], float | Tensor]) -> float:
        with sealed(self._model, training=False):
            return float(function())
