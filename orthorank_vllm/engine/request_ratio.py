"""A request's own ratio: `vllm_xargs` over HTTP, `SamplingParams.extra_args` offline; 0 if short.

What it means is decided by the configuration alone, so the server's process, the scheduler and the
workers each do that for themselves, from the request as vLLM hands it on.
"""

from dataclasses import replace
from reprlib import repr as shortened
from typing import Any

from vllm.exceptions import VLLMValidationError

from orthorank_vllm.config import FLOAT_NOISE, OrthoRankConfig
from orthorank_vllm.options import MAX_RATIO, MIN_PROMPT, MIN_PROMPT_ON_GPU, Options, at_most

KEY = "orthorank_ratio"


class RequestError(VLLMValidationError, ValueError):
    """A mistake in a request: to vLLM's server a status of 400, offline a `ValueError`."""

    def __init__(self, line: str) -> None:
        super().__init__(line)
        self.parameter = KEY


def with_min_prompt(options: Options, vllm_config: Any) -> Options:
    """The options with the shortest prompt of which something is skipped: the device's own.

    Raises:
        OptionError: it was given beside a KV connector, some of which know K and V by their tokens
            alone, a short prompt's and the beginning of a longer one alike.
    """
    has_stores = vllm_config.kv_transfer_config is not None
    if options.min_prompt and has_stores:
        raise MIN_PROMPT.rejected(
            options.min_prompt,
            "with --kv-transfer-config a longer prompt could be given a shorter one's K and V; "
            "leave one of the two out",
        )
    is_gpu = vllm_config.device_config.device_type == "cuda"
    if options.min_prompt is None and is_gpu and not has_stores:
        return replace(options, min_prompt=MIN_PROMPT_ON_GPU)
    return options


def num_selective(config: OrthoRankConfig, params: Any, prompt_len: int) -> int:
    """In how many of the selective layers, the first of their order, a request skips tokens.

    Args:
        params: vLLM's `SamplingParams`; what `check_ratio` would refuse is the server's own.
        prompt_len: tokens of its prompt.
    """
    if prompt_len < config.min_prompt:
        return 0
    asked = _asked(params)
    return config.num_for(asked) if _is_ratio(asked) else config.num_default


def is_dense(config: OrthoRankConfig, params: Any, prompt_len: int) -> bool:
    """Whether nothing of a request's prompt is skipped; see `num_selective`."""
    return num_selective(config, params, prompt_len) == 0


def check_ratio(
    additional_config: Any, params: Any, is_session: bool, has_stores: bool = False
) -> None:
    """Refuse a ratio that this server cannot serve a request with.

    Args:
        additional_config: vLLM's, resolved.
        params: vLLM's `SamplingParams`, or others, which ask for nothing.
        is_session: whether more of its prompt will come once this part is answered.
        has_stores: whether a KV connector hands K and V on: some know them by their tokens alone.

    Raises:
        RequestError: names what can be asked for.
    """
    asked = _asked(params)
    if asked is None and not is_session:
        return
    config = OrthoRankConfig.of_engine(additional_config)
    if is_session and config is not None and config.min_prompt:
        raise RequestError(
            f"a prompt that comes in parts: not possible in a server with {MIN_PROMPT.flag} "
            f"{config.min_prompt}, as its length is not known; that server has to be given 0"
        )
    if asked is None:
        return
    most = 0.0 if config is None else config.most_ratio
    if not (_is_ratio(asked) and asked <= most + FLOAT_NOISE):
        allowed = f"give a number from 0 to {at_most(most)}, this server's {MAX_RATIO.flag}"
        if not most:
            allowed = "OrthoRank is off in this server: give 0, or leave it out"
        raise RequestError(f"{KEY} {_told(asked)}: not allowed, {allowed}")
    if is_session:
        raise RequestError(
            f"{KEY} {asked}: not possible for a prompt that comes in parts, leave it out"
        )
    if has_stores:
        raise RequestError(
            f"{KEY} {asked}: not possible in a server with --kv-transfer-config, leave it out"
        )


def _told(asked: Any) -> str:
    try:
        return shortened(asked)
    except ValueError:
        # Of whole numbers with more than some thousand digits.
        return "so large"


def _is_ratio(asked: Any) -> bool:
    return isinstance(asked, int | float) and not isinstance(asked, bool) and asked >= 0


def _asked(params: Any) -> Any:
    extra = getattr(params, "extra_args", None)
    return extra.get(KEY) if extra else None
