"""A checkpoint with some layers left out: what layer pruning would serve."""

import json
import re
from pathlib import Path
from typing import Any

from orthorank_vllm.options import OptionError

_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")


def write_pruned(model: Path, folder: Path, count: int) -> None:
    """The model without its last `count` layers; which ones they are does not change its speed.

    Args:
        model: a folder with a config.json and safetensors.
        folder: to be filled; small files are linked.

    Raises:
        OptionError: there is no such folder.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    shards = sorted(model.glob("*.safetensors"))
    if not (model / "config.json").is_file() or not shards:
        raise OptionError(
            f"--against prune: {model} is no folder with a config.json and safetensors to prune; "
            "give one as MODEL"
        )
    config = json.loads((model / "config.json").read_text())
    kept = config["num_hidden_layers"] - count
    (folder / "config.json").write_text(json.dumps(_config_of(config, kept)))
    for shard in shards:
        with safe_open(shard, framework="pt") as tensors:
            names = [name for name in list(tensors.keys()) if _is_in(name, kept)]
            wanted = {name: tensors.get_tensor(name) for name in names}
        if wanted:
            save_file(wanted, folder / shard.name, {"format": "pt"})
    for file in model.iterdir():
        # An index would name tensors that are gone; without one all of the files are read.
        if file.name != "config.json" and not file.name.endswith((".safetensors", ".index.json")):
            (folder / file.name).symlink_to(file.resolve())


def _is_in(name: str, layers: int) -> bool:
    found = _LAYER.fullmatch(name)
    return found is None or int(found[2]) < layers


def _config_of(config: dict[str, Any], layers: int) -> dict[str, Any]:
    pruned = {**config, "num_hidden_layers": layers}
    if isinstance(config.get("layer_types"), list):
        pruned["layer_types"] = config["layer_types"][:layers]
    return pruned
