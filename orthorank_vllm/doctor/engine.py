"""Whether one engine of a running server does what was asked of it, and what that costs."""

from collections.abc import Iterable, Iterator

from prometheus_client import Metric

from orthorank_vllm import __version__
from orthorank_vllm.config import FEW_FOUND, MUCH_LOSS
from orthorank_vllm.doctor.check import Check, failed, ok, warning
from orthorank_vllm.metrics.status import EngineStatus
from orthorank_vllm.options import LAYERS, LayerKeep
from orthorank_vllm.profiles import Cost

# Of the configured ratio: below it the reason is told.
FAR_FROM_CONFIGURED = 0.8
# Of what its prompts' lengths let be skipped: small parts of windows round up much.
LEAST_REACHED = 0.5
# So few say nothing.
LEAST_SINKS = 20
MANY_MISSES = 0.05
# vLLM's own samples. Each is a prefill, whole or begun anew.
PREFILLS = ("vllm:request_success_total", "vllm:num_requests_running", "vllm:num_preemptions_total")


def requests_of(metrics: Iterable[Metric], engine: EngineStatus) -> float:
    """How many prompts an engine has computed, by vLLM's counts; some of them in part."""
    return sum(
        sample.value
        for metric in metrics
        for sample in metric.samples
        if sample.name in PREFILLS
        and sample.labels.get("model_name") == engine.model_name
        and sample.labels.get("engine") == engine.engine
    )


def checks_of(engine: EngineStatus, requests: float, of: str) -> Iterator[Check]:
    """All checks of one engine.

    Args:
        requests: see `requests_of`.
        of: said after each check's name, where there are more engines.
    """
    what = f"OrthoRank{of}"
    if not engine.active:
        yield failed(what, f"not active for {engine.model_name}", "Look at the server's log")
        return
    yield ok(what, f"active for {engine.model_name}, orthorank-vllm {engine.version}")
    if engine.version != __version__:
        yield warning(
            f"version{of}",
            f"the server has {engine.version}, this command {__version__}",
            "Use the same",
        )
    yield _layers(f"layers{of}", engine)
    yield _ratio(f"ratio{of}", engine, requests)
    if engine.layers:
        yield _loss(f"expected loss{of}", engine)
    yield _sinks(f"sinks{of}", engine)


def _layers(what: str, engine: EngineStatus) -> Check:
    layers = ",".join(str(LayerKeep(layer, keep)) for layer, keep in engine.layers.items())
    found = f"{len(engine.layers)} of {len(engine.by_layer)} selective [{layers}]"
    found += f", chosen by {engine.chosen_by}"
    by_request_alone = engine.ratio_asked == 0
    if not (engine.is_measured and (engine.layers or by_request_alone)):
        how = "guessed, or fewer than were asked for" if engine.layers else "prefill is dense"
        return failed(
            what,
            f"{found}: {how}",
            "Do what the server's log says after `OrthoRank serves less than was asked for, or "
            "guessed its layers`, or measure them with `orthorank calibrate`, and start anew",
        )
    return ok(what, found)


def _ratio(what: str, engine: EngineStatus, requests: float) -> Check:
    configured = engine.ratio_configured or 0.0
    asked = f"{engine.ratio_asked:.3f}" if engine.ratio_asked is not None else "auto"
    if engine.chosen_by == LAYERS.flag and engine.ratio_asked is None:
        asked = "none"
    found = f"asked {asked}, configured {configured:.3f}, reached "
    if engine.ratio_reached is None:
        found += "nothing yet: no prompt was served"
    else:
        found += f"{engine.ratio_reached:.3f} in {engine.prefill_tokens} prompt tokens"
    if engine.ratio_asked is not None and engine.ratio_asked > configured + _one_layer(engine):
        return failed(
            what,
            f"{found}: less than was asked for, as the calibration at its start was cut",
            "Start anew, which goes on from there, for --orthorank-calibrate-seconds; or run "
            "`orthorank calibrate` once",
        )
    if engine.ratio_reached is None or not requests:
        return ok(what, found)
    each = engine.prefill_tokens / requests
    found += f", about {each:.0f} a request"
    # Of each request at most the tail and position 0 do not compete.
    wanted = engine.ratio_wanted
    possible = wanted * (1 - ((engine.tail or 0) + 1) / each)
    if engine.ratio_reached < LEAST_REACHED * possible:
        return warning(
            what,
            f"{found}, of which {possible:.3f} could be skipped",
            "If prompts are computed in small chunks, raise --max-num-batched-tokens; else look at "
            "the server's log",
        )
    if engine.other_ratio_tokens:
        found += f", {wanted:.3f} by what requests asked for"
    if engine.ratio_reached < FAR_FROM_CONFIGURED * wanted:
        # What prompts there are is not the server's fault, and they are served right.
        found += f": prompts are short, and the last {engine.tail} tokens of each are computed"
    return ok(what, found)


def _one_layer(engine: EngineStatus) -> float:
    """The most that one layer adds to the ratio."""
    share = max((1 - keep for keep in engine.layers.values()), default=0.0)
    return share / max(len(engine.by_layer), 1) + 1e-9


def _loss(what: str, engine: EngineStatus) -> Check:
    if not engine.expected_loss:
        return warning(
            what,
            "not known for these layers",
            "Measure it with `orthorank evaluate`, look-ups above all",
        )
    cost = Cost(engine.expected_loss, engine.expected_found)
    found = str(cost)
    if cost.worst > MUCH_LOSS or (cost.found is not None and cost.found < FEW_FOUND):
        return warning(
            what,
            found,
            "Lower --orthorank-ratio: the server's log names one that keeps them, and "
            "`--orthorank-ratio auto` finds one",
        )
    return ok(what, found)


def _sinks(what: str, engine: EngineStatus) -> Check:
    needed = engine.sink_hits + engine.sink_misses
    found = f"{engine.sink_misses} of {needed} states that a step lacked were recomputed"
    if needed >= LEAST_SINKS and engine.sink_misses > MANY_MISSES * needed:
        return warning(
            what,
            found,
            "Prompts begin with more different tokens than the table holds: raise --max-num-seqs",
        )
    return ok(what, found)
