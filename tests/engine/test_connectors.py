"""Which KV connectors may be asked for, and what vLLM then loads."""

from collections.abc import Mapping
from typing import Any

import pytest
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs

from orthorank_vllm.engine.connectors import asked_for
from orthorank_vllm.engine.unsupported import check_supported
from orthorank_vllm.options import OptionError

pytestmark = pytest.mark.model


def configured(model_path: str, transfer: dict[str, Any] | None = None) -> VllmConfig:
    return EngineArgs(
        model=model_path,
        dtype="float32",
        kv_transfer_config=transfer and KVTransferConfig(**transfer, kv_role="kv_both"),
        additional_config={"orthorank": {"ratio": 0.3}},
    ).create_engine_config()


@pytest.fixture(scope="module")
def vllm_config(model_path: str) -> VllmConfig:
    return configured(model_path)


def nixl(**settings: Any) -> dict[str, Any]:
    return {"kv_connector": "NixlConnector", "kv_connector_extra_config": settings}


def several(*names: str) -> dict[str, Any]:
    each = [{"kv_connector": name, "kv_role": "kv_both"} for name in names]
    settings = {"connectors": each}
    return {"kv_connector": "MultiConnector", "kv_connector_extra_config": settings}


@pytest.mark.parametrize(
    ("transfer", "named"),
    [
        ({"kv_connector": "LMCacheConnectorV1"}, " LMCacheConnectorV1: "),
        ({"kv_connector": "LMCacheMPConnector"}, " LMCacheMPConnector: "),
        ({"kv_connector": "MooncakeConnector"}, " MooncakeConnector: "),
        ({"kv_connector": "DecodeBenchConnector"}, " DecodeBenchConnector: "),
        (
            {"kv_connector": "ExampleConnector", "kv_connector_module_path": "their.own"},
            " their.own.ExampleConnector: ",
        ),
        (nixl(enforce_handshake_compat=False), " enforce_handshake_compat false: "),
        (nixl(bidirectional_kv_xfer=True), " bidirectional_kv_xfer true: "),
        (
            {"kv_connector": "ExampleConnector", "kv_load_failure_policy": "recompute"},
            " kv_load_failure_policy recompute: ",
        ),
        (several("OffloadingConnector", "HF3FSKVConnector"), " HF3FSKVConnector: "),
    ],
)
def test_a_connector_that_could_load_what_another_configuration_made_is_refused_by_name(
    vllm_config: VllmConfig, transfer: dict[str, Any], named: str
) -> None:
    vllm_config.kv_transfer_config = KVTransferConfig(**transfer, kv_role="kv_both")
    with pytest.raises(OptionError) as caught:
        check_supported(vllm_config)
    assert str(caught.value).startswith(f"--kv-transfer-config{named}not possible with OrthoRank")


def test_connectors_that_can_be_right_are_loaded_ours_where_vllms_cannot(model_path: str) -> None:
    modules = []
    for transfer in (several("OffloadingConnector", "ExampleConnector"), nixl()):
        config = configured(model_path, transfer)
        # Once more, as each worker does.
        check_supported(config)
        assert config.additional_config["orthorank"]["maker"]
        modules += [module_of(connector) for connector in asked_for(config.kv_transfer_config)]
        assert "orthorank" not in str(transfer)
    assert modules == [
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector",
        "orthorank_vllm.engine.example_connector",
        "orthorank_vllm.engine.nixl_connectors",
    ]


def module_of(connector: Mapping[str, Any]) -> str:
    asked = KVTransferConfig(
        kv_connector=connector["kv_connector"],
        kv_connector_module_path=connector.get("kv_connector_module_path"),
        kv_role="kv_both",
    )
    return KVConnectorFactory.get_connector_class(asked).__module__
