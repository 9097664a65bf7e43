"""vLLM's NIXL connectors, whose two sides refuse each other unless their configurations agree.

A prompt's K and V go from the engine that computed it to the one that answers, whole and to no
other prompt, so that the tail of it is its own. Before that the sides compare a hash of all that
has to agree (vllm/distributed/kv_transfer/kv_connector/v1/nixl/metadata.py).
"""

import hashlib
from dataclasses import replace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import nixl

from orthorank_vllm.config import OrthoRankConfig


class Compared:
    """Put before a connector of vLLM's."""

    connector_worker: Any
    _vllm_config: Any

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        stock: Any = super()
        stock.register_kv_caches(kv_caches)
        config = OrthoRankConfig.of_engine(self._vllm_config.additional_config)
        assert config is not None
        worker = self.connector_worker
        both = f"{worker.compat_hash} {config.maker}".encode()
        worker.compat_hash = hashlib.sha256(both).hexdigest()
        worker.xfer_handshake_metadata = replace(
            worker.xfer_handshake_metadata, compatibility_hash=worker.compat_hash
        )


class NixlConnector(Compared, nixl.NixlConnector):
    """That one."""


class NixlPullConnector(Compared, nixl.NixlPullConnector):
    """That one."""


class NixlPushConnector(Compared, nixl.NixlPushConnector):
    """That one."""
