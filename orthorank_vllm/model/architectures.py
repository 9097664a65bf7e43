"""Which architectures have an OrthoRank version, and how vLLM is told to load it."""

from collections.abc import Callable, Mapping
from typing import Any

from orthorank_vllm.options import OptionError

# vLLM's names of architectures whose layers are made of the parts in `decoder`.
SUPPORTED = (
    "LlamaForCausalLM",
    "LLaMAForCausalLM",
    "InternLM3ForCausalLM",
    "IQuestCoderForCausalLM",
    "TeleChat3ForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeForCausalLM",
    "Phi3ForCausalLM",
)
# To our own names, under which vLLM loads them.
ORTHORANK_OF = {architecture: f"OrthoRank{architecture}" for architecture in SUPPORTED}
# Stock, but for a fingerprint of their weights: what the commands measure.
MEASURED_OF = {architecture: f"Measured{architecture}" for architecture in SUPPORTED}


class SwapArchitecture:
    """`hf_overrides` that a user gave as a function, followed by ours.

    A class, not a closure: vLLM pickles the overrides into its workers.
    """

    def __init__(self, user_overrides: Callable[[Any], Any], architectures: list[str]) -> None:
        self.user_overrides = user_overrides
        self._architectures = architectures

    def __call__(self, hf_config: Any) -> Any:
        hf_config = self.user_overrides(hf_config)
        hf_config.architectures = self._architectures
        return hf_config


def orthorank_architectures(
    architectures: list[str], names: Mapping[str, str] = ORTHORANK_OF
) -> list[str]:
    """Our name for the first of a model's architectures that has one, as a list.

    Args:
        names: our names of the architectures.

    Raises:
        OptionError: none of the model's architectures has an OrthoRank version.
    """
    for architecture in architectures:
        if architecture in names.values():
            return [architecture]
        if architecture in names:
            return [names[architecture]]
    raise OptionError(
        f"--orthorank-ratio: not possible with the architecture {', '.join(architectures)}; "
        f"supported are {', '.join(ORTHORANK_OF)}"
    )


def hf_overrides_for(engine_args: Any, names: Mapping[str, str] = ORTHORANK_OF) -> Any:
    """The `hf_overrides` with which vLLM loads our version of a model.

    Args:
        engine_args: vLLM's `EngineArgs`, unchanged.
        names: our names of the architectures.

    Raises:
        OptionError: the architecture is not supported.
    """
    from vllm.transformers_utils.config import get_config

    given = engine_args.hf_overrides
    if isinstance(given, SwapArchitecture):
        return given
    hf_config = get_config(
        engine_args.hf_config_path or engine_args.model,
        engine_args.trust_remote_code,
        engine_args.revision,
        engine_args.code_revision,
        engine_args.config_format,
        hf_overrides_kw=None if callable(given) else _flat(given),
        hf_overrides_fn=given if callable(given) else None,
    )
    architectures = orthorank_architectures(hf_config.architectures or [], names)
    if callable(given):
        return SwapArchitecture(given, architectures)
    return {**given, "architectures": architectures}


def _flat(overrides: dict[str, Any]) -> dict[str, Any]:
    # vLLM applies nested overrides later; none of them changes an architecture.
    return {key: value for key, value in overrides.items() if not isinstance(value, dict)}
