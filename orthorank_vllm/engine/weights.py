"""Weights that change while an engine runs: by a reload, a trainer that sends others, or a sleep.

What a model is told of it is `load_weights` alone. A sleep's second level discards the weights
(vllm/v1/worker/gpu_worker.py); what is on the device beside them, stand-ins and sinks, outlives it,
as it is made after the model is loaded.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.model.fingerprint import Fingerprint
from orthorank_vllm.resolve import measured_elsewhere

logger = logging.getLogger("vllm.orthorank")

# A worker's methods after which weights may be others. `finish_weight_update` is younger than 0.26.
RENEWING = ("reload_weights", "wake_up", "finish_weight_update")
_MARK = "_orthorank_hook"


def forgetting(renew: Callable[..., Any]) -> Callable[..., Any]:
    """A worker's method, after which nothing is left of what was made of its weights."""

    @functools.wraps(renew)
    def renewing(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = renew(self, *args, **kwargs)
        orthorank = getattr(self.get_model(), "orthorank", None)
        if orthorank is not None:
            orthorank.weights_changed()
        return result

    setattr(renewing, _MARK, True)
    return renewing


def hook(worker_class: Any) -> None:
    """Wrap those of `RENEWING` that a class of workers has; a second call changes nothing."""
    for name in RENEWING:
        renew = getattr(worker_class, name, None)
        if renew is not None and not hasattr(renew, _MARK):
            setattr(worker_class, name, forgetting(renew))


class Renewal:
    """Says once if new weights are not those that a configuration was measured on.

    They may come in parts, so that is asked when the next prompt does.
    """

    def __init__(self) -> None:
        self._fingerprint: Fingerprint | None = None
        self._has_said = False

    def note(self, fingerprint: Fingerprint) -> None:
        """Remember that there are new weights.

        Args:
            fingerprint: theirs; of those that are still to come, too.
        """
        self._fingerprint = fingerprint

    def say(self, config: OrthoRankConfig) -> None:
        """Compare them, if there are any."""
        fingerprint, self._fingerprint = self._fingerprint, None
        if fingerprint is None or self._has_said:
            return
        for line in measured_elsewhere(config, fingerprint.value):
            self._has_said = True
            logger.warning("%s", line)
