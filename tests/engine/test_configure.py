"""From options to vLLM's configuration, for real, without loading a weight."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.executor.abstract import Executor

from orthorank_vllm.engine.unsupported import REFUSALS, check_supported
from orthorank_vllm.options import OptionError
from tests.support.drafts import write_eagle, write_eagle3, write_medusa
from tests.support.models import write_random

pytestmark = pytest.mark.model


def configured(model_path: str, orthorank: Any = None, **options: Any) -> VllmConfig:
    if orthorank is not None:
        options["additional_config"] = {"orthorank": orthorank}
    return EngineArgs(model=model_path, dtype="float32", **options).create_engine_config()


def test_the_architecture_is_swapped_and_the_options_are_resolved(model_path: str) -> None:
    config = configured(model_path, {"layers": "20:0,21:0,12:1/4,7", "tail": 16})
    assert config.model_config.architecture == "OrthoRankLlamaForCausalLM"
    resolved = config.additional_config["orthorank"]
    assert resolved["layers"] == [[20, 0.0], [21, 0.0], [12, 0.25], [7, 1 / 3]]
    assert (resolved["window"], resolved["tail"], resolved["num_layers"]) == (128, 16, 30)


def test_a_ratio_takes_the_shipped_profiles_layers(model_path: str) -> None:
    resolved = configured(model_path, {"ratio": 0.3}).additional_config["orthorank"]
    assert resolved["source"] == "profile SmolLM2-135M-Instruct"
    assert sum(1 - keep for _, keep in resolved["layers"]) >= 0.3 * 30 - 1e-9


@pytest.mark.parametrize("off", [{"ratio": 0}, {}, {"ratio": 0, "layers": [3]}])
def test_a_ratio_of_zero_is_the_stock_configuration(model_path: str, off: dict[str, Any]) -> None:
    """Break seen: the key left in, which changes the hash of the compile cache."""
    config, stock = configured(model_path, off), configured(model_path)
    assert config.model_config.architecture == "LlamaForCausalLM"
    assert config.additional_config == stock.additional_config
    assert config.compute_hash() == stock.compute_hash()


def test_two_ratios_never_share_a_compile_cache(model_path: str) -> None:
    hashes = {configured(model_path, {"ratio": r}).compute_hash() for r in (0.1, 0.2, 0.3)}
    assert len(hashes) == 3


class OfAnotherPlugin:
    """What vLLM takes as `additional_config` beside a dictionary."""

    def compute_hash(self) -> str:
        return "of another plugin"


def test_an_additional_config_that_is_no_dictionary_is_left_alone(model_path: str) -> None:
    """Break seen: its `get` called when an executor is made."""
    given = OfAnotherPlugin()
    config = configured(model_path, additional_config=given)
    assert config.additional_config is given

    idle: Any = {name: lambda self, *_: None for name in Executor.__abstractmethods__}
    assert type("Idle", (Executor,), idle)(config).vllm_config is config


def test_options_of_other_plugins_are_kept(model_path: str) -> None:
    args = EngineArgs(
        model=model_path, additional_config={"other": {"x": 1}, "orthorank": {"ratio": 0.3}}
    )
    assert args.create_engine_config().additional_config["other"] == {"x": 1}


def test_the_same_arguments_can_be_configured_twice(model_path: str) -> None:
    args = EngineArgs(model=model_path, additional_config={"orthorank": {"ratio": 0.3}})
    first, second = args.create_engine_config(), args.create_engine_config()
    assert first.additional_config == second.additional_config


def test_rays_workers_are_told_where_the_metrics_go(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By vLLM's own list of what it copies into their environment."""
    from vllm.ray.ray_env import get_env_vars_to_copy

    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "ANOTHER")
    configured(model_path, {"ratio": 0.3})
    configured(model_path, {"ratio": 0.3})
    assert {"ORTHORANK_METRICS_DIR", "ANOTHER"} <= get_env_vars_to_copy()


def test_overrides_that_a_user_gave_are_kept(model_path: str) -> None:
    """Break seen: `--hf-overrides` replaced by ours."""
    config = configured(model_path, {"ratio": 0.3}, hf_overrides={"rope_theta": 5e4})
    assert config.model_config.hf_config.rope_theta == 5e4
    assert config.model_config.architecture == "OrthoRankLlamaForCausalLM"


def halve_the_context(hf_config: Any) -> Any:
    hf_config.max_position_embeddings = 4096
    return hf_config


def test_overrides_given_as_a_function_are_kept(model_path: str) -> None:
    config = configured(model_path, {"ratio": 0.3}, hf_overrides=halve_the_context)
    assert config.model_config.max_model_len == 4096
    assert config.model_config.architecture == "OrthoRankLlamaForCausalLM"


def test_layers_cannot_be_measured_without_a_tokenizer(tmp_path: Path) -> None:
    """Break seen: left to the calibration, which has the weights by then and no tokenizer."""
    options: dict[str, Any] = {"model_path": write_random("Llama", tmp_path)}
    options |= {"skip_tokenizer_init": True}
    with pytest.raises(OptionError) as caught:
        configured(orthorank={"ratio": 0.2}, **options)
    assert str(caught.value).startswith("--orthorank-ratio 0.2: not allowed, with --skip-tokenizer")
    assert "give --orthorank-profile or --orthorank-layers" in str(caught.value)
    for enough in ({"layers": [3]}, {"ratio": 0.1, "calibrate_seconds": 0}):
        assert configured(orthorank=enough, **options).additional_config["orthorank"]["layers"]


def test_an_unsupported_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OptionError, match="GPT2LMHeadModel; supported are LlamaForCausalLM"):
        configured(str(tmp_path), {"ratio": 0.3}, skip_tokenizer_init=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"enable_lora": True, "fully_sharded_loras": True}, "--fully-sharded-loras True"),
        (
            {
                "enable_lora": True,
                "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
            },
            "--enable-lora with ExampleConnector",
        ),
        (
            {
                "enable_prompt_embeds": True,
                "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
            },
            "--enable-prompt-embeds with ExampleConnector",
        ),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"runner": "pooling"}, "--runner pooling"),
        ({"cpu_offload_gb": 1}, "--cpu-offload-gb 1"),
        ({"hf_overrides": {"is_causal": False}}, "is_causal false"),
        ({"hf_overrides": {"llama_4_scaling": {"beta": 0.1}}}, "llama_4_scaling {'beta': 0.1}"),
        ({"hf_overrides": {"attention_sinks": True}}, "attention_sinks True"),
        ({"hf_overrides": {"dual_chunk_attention_config": {}}}, "dual_chunk_attention_config"),
        ({"compilation_config": {"mode": 1}}, "--compilation-config mode STOCK_TORCH_COMPILE"),
    ],
)
def test_a_feature_that_cannot_be_right_is_refused_by_name(
    model_path: str, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(OptionError) as caught:
        configured(model_path, {"ratio": 0.3}, **options)
    assert str(caught.value).startswith(named)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variable", ["VLLM_BATCH_INVARIANT", "VLLM_USE_BREAKABLE_CUDAGRAPH"])
def test_an_environment_that_cannot_be_right_is_refused_by_name(
    model_path: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(model_path)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(OptionError, match=f"{variable} 1"):
        check_supported(config)


SP_OF_026 = SimpleNamespace(enable_sp=True)
# Features that vLLM itself does not offer on this machine: set in a real
# configuration after the fact.
ELSEWHERE = {
    "device": ("device_config", "device_type", "xpu"),
    "--decode-context-parallel-size": ("parallel_config", "decode_context_parallel_size", 2),
    "--prefill-context-parallel-size": ("parallel_config", "prefill_context_parallel_size", 2),
    "--enable-eplb": ("parallel_config", "enable_eplb", True),
    "--enable-dbo": ("parallel_config", "enable_dbo", True),
    "--enable-return-routed-experts": ("model_config", "enable_return_routed_experts", True),
    "--calculate-kv-scales": ("cache_config", "calculate_kv_scales", True),
    "--compilation-config pass_config.enable_sp": ("compilation_config", "pass_config", SP_OF_026),
    "--kv-cache-dtype": ("cache_config", "cache_dtype", "nvfp4"),
    "multimodal input": ("model_config", "multimodal_config", SimpleNamespace()),
}


@pytest.fixture
def vllm_config(model_path: str) -> VllmConfig:
    return configured(model_path)


@pytest.mark.parametrize("option", ELSEWHERE)
def test_a_feature_of_other_machines_is_refused_by_name(
    vllm_config: VllmConfig, option: str
) -> None:
    part, attribute, value = ELSEWHERE[option]
    object.__setattr__(getattr(vllm_config, part), attribute, value)
    with pytest.raises(OptionError) as caught:
        check_supported(vllm_config)
    assert str(caught.value).startswith(option)


def test_experts_with_data_parallelism_are_refused_and_a_dense_model_is_not(
    tmp_path: Path, vllm_config: VllmConfig
) -> None:
    experts = configured(write_random("Mixtral", tmp_path), skip_tokenizer_init=True)
    for config in (experts, vllm_config):
        object.__setattr__(config.parallel_config, "data_parallel_size", 2)
    with pytest.raises(OptionError, match="--data-parallel-size 2"):
        check_supported(experts)
    check_supported(vllm_config)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_an_nvidia_gpu_is_supported(vllm_config: VllmConfig, kv_cache_dtype: str) -> None:
    """With K and V quantised too, which are not on CPU."""
    object.__setattr__(vllm_config.device_config, "device_type", "cuda")
    object.__setattr__(vllm_config.cache_config, "cache_dtype", kv_cache_dtype)
    check_supported(vllm_config)


def test_a_way_to_attend_that_is_not_for_this_device_is_refused(model_path: str) -> None:
    with pytest.raises(OptionError) as caught:
        configured(model_path, {"ratio": 0.3, "attention": "triton"})
    assert str(caught.value) == (
        "--orthorank-attention triton: not allowed, on this device (cpu) give auto, cpu, gather"
    )


def test_a_stock_configuration_is_supported(vllm_config: VllmConfig) -> None:
    check_supported(vllm_config)


def test_adapters_are_supported_but_for_those_of_experts(model_path: str, tmp_path: Path) -> None:
    lora = {"enable_lora": True, "skip_tokenizer_init": True}
    dense = configured(model_path, {"layers": [3]}, **lora)
    assert dense.lora_config is not None
    experts = write_random("Mixtral", tmp_path)
    with pytest.raises(OptionError, match="--enable-lora with a mixture of experts: not possible"):
        configured(experts, {"layers": [3]}, **lora)


SPECULATION: dict[str, dict[str, Any]] = {
    "ngram": {"prompt_lookup_max": 4},
    "custom_class": {"model": "somewhere.Proposer"},
    "draft_model": {"model": "the target"},
    "eagle": {"model": write_eagle},
    "eagle3": {"model": write_eagle3},
    "medusa": {"model": write_medusa},
}


@pytest.fixture(scope="module", params=SPECULATION)
def speculation(
    request: pytest.FixtureRequest, model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A `--speculative-config` of each method."""
    asked = {"method": request.param, "num_speculative_tokens": 3, **SPECULATION[request.param]}
    if callable(asked.get("model")):
        asked["model"] = asked["model"](model_path, tmp_path_factory.mktemp("drafts") / "head")
    elif asked.get("model") == "the target":
        asked["model"] = model_path
    return asked


def test_speculation_is_supported_and_a_draft_model_is_stock(
    model_path: str, speculation: dict[str, Any]
) -> None:
    config = configured(model_path, {"ratio": 0.3}, speculative_config=speculation)
    assert config.model_config.architectures == ["OrthoRankLlamaForCausalLM"]
    draft = config.speculative_config.draft_model_config
    if draft is not None and draft is not config.model_config:
        assert "OrthoRank" not in draft.architectures[0]


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("mtp", "vLLM has it for none"),
        ("dflash", "or its states"),
        ("extract_hidden_states", "out"),
    ],
)
def test_speculation_that_was_not_tried_or_hands_states_out_is_refused(
    model_path: str, method: str, why: str
) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    config = configured(model_path, {"ratio": 0.3}, speculative_config=ngram)
    # Models of these kinds are none of those that are served.
    object.__setattr__(config.speculative_config, "method", method)
    with pytest.raises(OptionError, match=f"--speculative-config {method}: .*{why}"):
        check_supported(config)


def smaller(hf_config: Any) -> Any:
    return hf_config


def test_overrides_by_a_function_are_refused_with_a_draft_model(
    model_path: str, speculation: dict[str, Any]
) -> None:
    """vLLM applies it to the draft's configuration too, and with it the swap of the architecture.

    Break seen: not refused, the draft was an OrthoRank model, or its architecture unknown to vLLM.
    """
    options = {"hf_overrides": smaller, "speculative_config": speculation}
    if speculation["method"] in ("ngram", "custom_class", "medusa"):
        configured(model_path, {"ratio": 0.3}, **options)
        return
    with pytest.raises(OptionError, match="hf_overrides: a function is not possible with"):
        configured(model_path, {"ratio": 0.3}, **options)


def test_every_refusal_gives_a_reason() -> None:
    assert all(refusal.option and refusal.reason for refusal in REFUSALS)
