"""The model as lm-eval asks it: log-probabilities of continuations."""

from collections.abc import Callable
from typing import Any

from lm_eval.api.model import TemplateLM

from orthorank_vllm.evaluate.scorer import Scorer


class ScoringLM(TemplateLM):
    """Scores context and continuation as one prompt, as a server's `prompt_logprobs` would."""

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Any,
        max_length: int,
        on_texts: Callable[[int], Any],
    ) -> None:
        super().__init__()
        self._scorer = scorer
        self.tokenizer = tokenizer
        self._max_length = max_length
        self._on_texts = on_texts

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return list(self.tokenizer.encode(string))

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts, first_scored = [], []
        for _, context, continuation in requests:
            text = (context + continuation)[-self._max_length :]
            texts.append(text)
            first_scored.append(max(1, len(text) - len(continuation)))
        scores = self._scorer(texts, first_scored, self._on_texts)
        return [(score.log_prob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("perplexity is measured without lm-eval")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("tasks are scored, nothing is generated")
