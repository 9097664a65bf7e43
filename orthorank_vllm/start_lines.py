"""What a start-up says of the layers that it runs, and when it warns of what they cost."""

from pathlib import Path

from orthorank_vllm.config import FEW_FOUND, MUCH_LOSS, OrthoRankConfig
from orthorank_vllm.options import at_most


def start_up_line(config: OrthoRankConfig) -> str:
    """What is run, how it was chosen and what it is expected to lose."""
    asked = ""
    if config.max_loss is not None:
        asked = f" (auto: at most {config.max_loss:.3g} nats lost)"
    elif config.ratio_asked is not None:
        asked = f" (asked for {config.ratio_asked:.3g})"
    stand_in = f", stand-ins of {Path(config.stand_in).name}" if config.stand_in else ""
    window = f"window {config.window}" if config.window else "window: whole prompt"
    if not config.is_aligned:
        window += ", not aligned (what is computed of a prompt depends on load)"
    if config.min_prompt:
        window += f", prompts from {config.min_prompt} tokens"
    expected = "" if config.expected is None else f", expected loss {config.expected}"
    layers, more = config.default_layers, config.layers[config.num_default :]
    by_request = ""
    if more:
        most = config.ratio_with(len(config.layers))
        by_request = f" and up to {most:.3f} by request [{','.join(map(str, more))}]"
    return (
        f"OrthoRank is active: ratio {config.ratio:.3f}{asked}, {window}, "
        f"tail {config.tail}{stand_in}, {len(layers)} of {config.num_layers} layers selective "
        f"[{','.join(map(str, layers))}]{by_request}, chosen by {config.source}{expected}"
    )


def warning(config: OrthoRankConfig) -> str:
    """What these layers cost, if that is much, or that nobody knows; else empty."""
    if not config.default_layers:
        return ""
    if config.expected is None:
        return (
            "OrthoRank does not know what answers lose with these layers: measure it with "
            "`orthorank evaluate`, look-ups above all, before you serve them."
        )
    found = 1.0 if config.expected.found is None else config.expected.found
    if config.max_loss is not None or (config.expected.worst <= MUCH_LOSS and found >= FEW_FOUND):
        return ""
    advice = (
        "give --orthorank-ratio 0"
        if config.advised is None
        else f"--orthorank-ratio {at_most(config.advised)} keeps them"
    )
    return (
        f"OrthoRank expects answers to lose {config.expected} at this ratio, more than "
        f"{MUCH_LOSS:g} nats on the worst kind of text or more than {1 - FEW_FOUND:.0%} of "
        f"the look-ups: {advice}."
    )
