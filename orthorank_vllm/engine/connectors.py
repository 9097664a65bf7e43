"""Which KV connectors are asked for, and which of them can be right.

Those that find blocks by vLLM's hashes, which say who made them (`stores`), and versions of ours of
some of vLLM's others, of the same names. What they are asked, and when, is in
vllm/distributed/kv_transfer/kv_connector/v1/base.py.
"""

import copy
from collections.abc import Callable, Collection, MutableMapping
from typing import Any

from orthorank_vllm.compat import CONNECTOR_SEAMS, require_seams

# They find blocks by vLLM's hashes of them, and by nothing else.
STORES = ("OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector")
OURS = {
    "ExampleConnector": "orthorank_vllm.engine.example_connector",
    "NixlConnector": "orthorank_vllm.engine.nixl_connectors",
    "NixlPullConnector": "orthorank_vllm.engine.nixl_connectors",
    "NixlPushConnector": "orthorank_vllm.engine.nixl_connectors",
}
# Ours gives each configuration a folder, in which it finds blocks by their tokens.
BY_TOKENS_IN_FOLDER = ("ExampleConnector",)
BY_TOKENS = ("LMCacheConnectorV1", "LMCacheMPConnector", "FlexKVConnectorV1", "HF3FSKVConnector")
UNCOMPARED = ("MooncakeConnector", "MoRIIOConnector")
SEVERAL = "MultiConnector"
KNOWN = (*STORES, *OURS)


def asked_for(transfer: Any) -> list[MutableMapping[str, Any]]:
    """The connectors that are configured, several where one is made of them.

    Args:
        transfer: vLLM's `KVTransferConfig`, or None.
    """
    if transfer is None or transfer.kv_connector is None:
        return []
    if transfer.kv_connector == SEVERAL:
        return list(transfer.kv_connector_extra_config.get("connectors", []))
    return [vars(transfer)]


def with_ours(transfer: Any) -> Any:
    """A copy with our versions of vLLM's connectors, where there are such.

    Args:
        transfer: vLLM's `KVTransferConfig`, or None; the user's own may serve another engine.

    Raises:
        RuntimeError: this vLLM lacks a seam; names it.
    """
    transfer = copy.deepcopy(transfer)
    for connector in asked_for(transfer):
        ours = OURS.get(str(connector.get("kv_connector")))
        if ours is not None:
            require_seams(CONNECTOR_SEAMS[ours.rpartition(".")[2]])
            connector["kv_connector_module_path"] = ours
    return transfer


def connector_among(names: Collection[str]) -> Callable[[Any], object]:
    """A reader of the first of some KV connectors that is asked for."""

    def connector(vllm_config: Any) -> object:
        asked = (one.get("kv_connector") for one in asked_for(vllm_config.kv_transfer_config))
        return next((name for name in asked if name in names), None)

    return connector


def unknown_connector(vllm_config: Any) -> object:
    """The first KV connector that is none of `KNOWN`, or not vLLM's own or ours."""
    for one in asked_for(vllm_config.kv_transfer_config):
        name, module = one.get("kv_connector"), one.get("kv_connector_module_path")
        if name not in KNOWN or module not in (None, OURS.get(str(name))):
            return (module and f"{module}.{name}") or name
    return None


def connector_setting(name: str, expected: object = False) -> Callable[[Any], object]:
    """A reader of one of the KV connectors' settings, where it is not as expected."""

    def setting(vllm_config: Any) -> object:
        for one in asked_for(vllm_config.kv_transfer_config):
            found = (one.get("kv_connector_extra_config") or {}).get(name, expected)
            if bool(found) != expected:
                return str(found).lower()
        return None

    return setting


def load_failure_policy(vllm_config: Any) -> object:
    """What becomes of K and V that fail to load, if that is not a failed request."""
    transfer = vllm_config.kv_transfer_config
    policy = getattr(transfer, "kv_load_failure_policy", "fail")
    return None if policy == "fail" else policy
