"""Where a prompt may be cut, so that the same tokens of it are chosen however it is served.

A window is chosen from as a whole where no forward ends in it and nothing of it comes from the
prefix cache (README.md, "The selection rule", 3). The tail is computed in any case, so it may be
cut anywhere.
"""

from typing import NamedTuple


class Borders(NamedTuple):
    """The ends of windows, of prompts with a tail.

    Attributes:
        window: positions per window, from 1.
    """

    window: int
    tail: int

    def chunk(self, start: int, num_tokens: int, prompt_len: int) -> int:
        """How many of a prompt's next tokens may be computed now, so that they end on a border.

        Args:
            start: how many are computed already.
            num_tokens: how many there is room for.

        Returns:
            0 where there is too little room: never with room for a window.
        """
        end = start + num_tokens
        if end >= prompt_len - self.tail:
            return num_tokens
        return max(self._before(end) - start, 0)

    def shared(self, prompt_len: int) -> int:
        """How many of a prompt's first tokens are as in every longer prompt that begins with them.

        Those may be left to other prompts and taken from them.
        """
        return self._before(max(prompt_len - self.tail, 0))

    def _before(self, position: int) -> int:
        return position // self.window * self.window
