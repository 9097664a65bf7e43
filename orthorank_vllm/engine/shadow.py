"""Which prompts are computed once more, densely, to see what their answers lose.

Decided by the configuration and the request alone, so that the scheduler and every worker do that
for themselves, without a word between them, and no answer depends on it.
"""

import hashlib
from typing import Any, NamedTuple

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine.request_ratio import KEY, is_dense
from orthorank_vllm.options import SHADOW, Options

# Says in a re-run's `extra_args` whose it is: in a tuple, which nothing that clients send becomes.
ORIGINAL = "orthorank_shadow_of"


class Shadow(NamedTuple):
    """A request's part in a comparison.

    Attributes:
        original: id of the request whose answer is looked at.
        is_rerun: whether this is its dense re-run, and not the request itself.
    """

    original: str
    is_rerun: bool


def rerun_args(original: str) -> dict[str, Any]:
    """The `extra_args` of a request's dense re-run."""
    return {KEY: 0.0, ORIGINAL: (original,)}


def shadow_of(
    config: OrthoRankConfig, request_id: str, request: Any, prompt_len: int
) -> Shadow | None:
    """A request's part, None where it has none.

    With an adapter it has none, as logits are compared as the base model makes them; nor where its
    prompt is more than token ids, which is all that a re-run is given.

    Args:
        request: vLLM's, as its scheduler or one of its runners has it.
    """
    if not config.shadow:
        return None
    params = request.sampling_params
    original = (getattr(params, "extra_args", None) or {}).get(ORIGINAL)
    if isinstance(original, tuple):
        return Shadow(original[0], is_rerun=True)
    # Position 0 and the tail are computed in any case.
    may_skip = prompt_len > config.tail + 1 and not is_dense(config, params, prompt_len)
    can_rerun = request.lora_request is None and request.prompt_embeds is None
    is_drawn = may_skip and can_rerun and _draw(request_id) < config.shadow
    return Shadow(request_id, is_rerun=False) if is_drawn else None


def _draw(request_id: str) -> float:
    """A number from 0 to below 1 that only the id decides."""
    digest = hashlib.blake2b(request_id.encode(errors="replace"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def check_shadow(vllm_config: Any, options: Options) -> None:
    """Refuse re-runs in an engine that would hand their K and V on.

    Raises:
        OptionError: names the options that exclude each other.
    """
    if options.shadow and vllm_config.kv_transfer_config is not None:
        raise SHADOW.rejected(
            options.shadow,
            "with --kv-transfer-config a dense re-run's K and V would be handed on; leave one of "
            "the two out",
        )
