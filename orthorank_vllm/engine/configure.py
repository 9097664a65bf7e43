"""From the options to an engine configuration that every worker can follow."""

import os
from collections.abc import Callable
from typing import Any

from orthorank_vllm.attention.backend import check_backend
from orthorank_vllm.engine.alignment import align
from orthorank_vllm.engine.connectors import with_ours
from orthorank_vllm.engine.drafts import check_overrides
from orthorank_vllm.engine.request_ratio import with_min_prompt
from orthorank_vllm.engine.shadow import check_shadow
from orthorank_vllm.engine.stores import with_maker
from orthorank_vllm.engine.unsupported import check_supported
from orthorank_vllm.metrics.collector import FOLDER_VARIABLE, prepare_server
from orthorank_vllm.model.architectures import hf_overrides_for
from orthorank_vllm.model.fingerprint import loads_weights
from orthorank_vllm.options import RATIO, Options
from orthorank_vllm.profile_store import kept_profiles
from orthorank_vllm.profiles import model_identity
from orthorank_vllm.resolve import resolve

RAY_VARIABLES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


def configure(
    engine_args: Any, create_engine_config: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """`EngineArgs.create_engine_config`, with OrthoRank where it was asked for.

    The options are `additional_config["orthorank"]`; in the result they are
    replaced by the resolved ones, so that a worker reads no file. A ratio of 0
    leaves no trace of OrthoRank: the configuration, and its hash, are stock.

    Raises:
        OptionError: see `resolve`, `unsupported`, `alignment` and `attention.backend`.
    """
    from vllm import envs

    additional = engine_args.additional_config
    if not isinstance(additional, dict) or "orthorank" not in additional:
        return create_engine_config(engine_args, *args, **kwargs)
    options = Options.from_mapping(additional["orthorank"])
    if not options.is_active:
        engine_args.additional_config = {k: v for k, v in additional.items() if k != "orthorank"}
        return create_engine_config(engine_args, *args, **kwargs)
    engine_args.hf_overrides = hf_overrides_for(engine_args)
    check_overrides(engine_args)
    vllm_config = create_engine_config(engine_args, *args, **kwargs)
    check_supported(vllm_config)
    model = model_identity(vllm_config.model_config.hf_text_config)
    check_backend(options.attention, vllm_config.device_config.device_type)
    check_shadow(vllm_config, options)
    options = with_min_prompt(options, vllm_config)
    has_weights = loads_weights(vllm_config.load_config)
    config = align(vllm_config, resolve(options, model, envs.VLLM_CACHE_ROOT, has_weights))
    kept = kept_profiles(envs.VLLM_CACHE_ROOT, model["config_sha256"], config.rule)
    if config.to_choose and not kept:
        _check_can_calibrate(vllm_config.model_config, options)
    vllm_config.kv_transfer_config = with_ours(vllm_config.kv_transfer_config)
    if not config.to_choose:
        config = with_maker(config, vllm_config.kv_transfer_config)
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        "orthorank": config.as_dict(),
    }
    prepare_server(str(vllm_config.model_config.served_model_name), envs.VLLM_CACHE_ROOT)
    _hand_on_to_ray(FOLDER_VARIABLE)
    return vllm_config


def options_in(additional_config: Any) -> Any:
    """The options in vLLM's `additional_config`, not validated; None if there are none.

    Args:
        additional_config: any type: vLLM leaves that open.
    """
    return additional_config.get("orthorank") if isinstance(additional_config, dict) else None


def _check_can_calibrate(model_config: Any, options: Options) -> None:
    if model_config.skip_tokenizer_init:
        raise RATIO.rejected(
            options.ratio,
            "with --skip-tokenizer-init this model's layers cannot be chosen at its first start, "
            "which takes its tokenizer; give --orthorank-profile or --orthorank-layers, or let "
            "vLLM load the tokenizer",
        )


def _hand_on_to_ray(variable: str) -> None:
    # Its workers inherit no environment; vLLM gives them its own variables, and those named here
    # (vllm/ray/ray_env.py).
    named = os.environ.get(RAY_VARIABLES, "").split(",")
    os.environ[RAY_VARIABLES] = ",".join(dict.fromkeys(filter(None, [*named, variable])))
