"""Log lines that do not repeat themselves."""

import logging
from time import monotonic

# vLLM shows the log lines of its own namespace only.
logger = logging.getLogger("vllm.orthorank")

SECONDS = 60.0
# So that causes that never come again are forgotten.
_MOST = 100


class Complaints:
    """At most one line a minute for each cause."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def warn(self, cause: str, text: str, *values: object) -> None:
        """Log a warning, once in a while for one cause.

        Args:
            cause: what is the same each time.
            text, values: as `logging` takes them.
        """
        now = monotonic()
        if now - self._told.get(cause, -SECONDS) < SECONDS:
            return
        if len(self._told) >= _MOST:
            self._told.clear()
        self._told[cause] = now
        logger.warning(text, *values)
