"""Whether a running server runs OrthoRank, and does what was asked of it."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from orthorank_vllm import __version__
from orthorank_vllm.doctor.check import Check, failed, ok, warning
from orthorank_vllm.metrics.status import EngineStatus, engines_of, is_up
from orthorank_vllm.options import OptionError

TIMEOUT = 10.0
# Of the configured ratio: what rounding up in windows of 128 costs is a few percent.
FAR_FROM_CONFIGURED = 0.2
# So few say nothing.
LEAST_SINKS = 20
MANY_MISSES = 0.05


class Client:
    """Asks one server."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """Take the address of a running server, and its key.

        Args:
            url: where the server answers; the `/v1` of its API may stand at its end.

        Raises:
            OptionError: it is not such a URL.
        """
        parts = urlsplit(url)
        try:
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is not a number
            is_url = False
        if not is_url:
            raise OptionError(f"URL {url}: not allowed, give one like http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a page.

        Raises:
            OSError: nobody answers.
        """
        request = urllib.request.Request(self.url + path, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return int(response.status), response.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, ""


def checks(client: Client) -> Iterator[Check]:
    """All checks, in an order in which the first failure is the cause of those after it."""
    try:
        health, _ = client.get("/health")
        found, metrics = client.get("/metrics")
        endpoint, told = client.get("/orthorank")
    except OSError as error:
        reason = getattr(error, "reason", error)
        yield failed(
            "server", f"{client.url} does not answer ({reason})", "Start it, or mend the URL"
        )
        return
    if health != 200:
        yield failed("server", f"/health answers {health}", _mend_of_health(health))
        return
    yield ok("server", f"{client.url} is healthy")
    if found != 200:
        yield failed("metrics", f"/metrics answers {found}", _mend_of_metrics(found))
        return
    try:
        families = list(text_string_to_metric_families(metrics))
        engines = engines_of(families)
    except (ValueError, KeyError) as error:
        yield failed("metrics", f"/metrics is not vLLM's ({error})", "Give vLLM's own URL")
        return
    if not is_up(families):
        yield failed(
            "metrics",
            "broken: orthorank_up is 0, so counts of OrthoRank's are missing",
            "The server's log says which file or folder it is, in a line with orthorank_up: make "
            "room there, or mend its permissions; the workers write it anew within seconds",
        )
        if not engines:
            return
    if not any(engine.active for engine in engines):
        yield failed(
            "OrthoRank",
            "not active: /metrics shows no orthorank_active 1",
            "Start the server with --orthorank-ratio; if it was, see `orthorank doctor` there",
        )
        return
    for engine in engines:
        yield from _engine(engine, is_only_one=len(engines) == 1)
    yield _endpoint(endpoint, told)


def _mend_of_health(status: int) -> str:
    if status == 404:
        return (
            "Give the URL under which vLLM's own /health is: before a proxy, with the proxy's "
            "path prefix, as http://127.0.0.1:8000/prefix"
        )
    return "Look at the server's log"


def _mend_of_metrics(status: int) -> str:
    if status < 500:
        return "Give the URL of vLLM's own server, and --api-key if what stands before it wants one"
    return "Look at the server's log; if PROMETHEUS_MULTIPROC_DIR is set, empty it and start again"


def _engine(engine: EngineStatus, is_only_one: bool) -> Iterator[Check]:
    of = "" if is_only_one else f" (engine {engine.engine})"
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
    yield _ratio(f"ratio{of}", engine)
    yield _sinks(f"sinks{of}", engine)


def _layers(what: str, engine: EngineStatus) -> Check:
    layers = ",".join(map(str, engine.layers))
    found = f"{len(engine.layers)} of {len(engine.by_layer)} selective [{layers}]"
    if not engine.is_measured:
        return failed(
            what,
            f"{found}, guessed: {engine.chosen_by}",
            "Do what the server's log says after `OrthoRank guessed its layers`, or measure them "
            "with `orthorank calibrate` and start anew: guessed layers cost quality",
        )
    return ok(what, f"{found}, chosen by {engine.chosen_by}")


def _ratio(what: str, engine: EngineStatus) -> Check:
    configured = engine.ratio_configured or 0.0
    asked = "none" if engine.ratio_asked is None else f"{engine.ratio_asked:.3f}"
    found = f"asked {asked}, configured {configured:.3f}, reached "
    if engine.ratio_reached is None:
        return ok(what, f"{found}nothing yet: no prompt was served")
    found += f"{engine.ratio_reached:.3f} in {engine.prefill_tokens} prompt tokens"
    if engine.ratio_reached < (1 - FAR_FROM_CONFIGURED) * configured:
        # What prompts there are is not the server's fault, and they are served right.
        found += ": prompts, or their chunks, are short, and OrthoRank is for long ones"
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


def _endpoint(status: int, told: str) -> Check:
    what = "GET /orthorank"
    if status == 404:
        return ok(what, "off, as the server was started without --orthorank-endpoint")
    if status == 401:
        return warning(what, "on, and wants the API key", "Give --api-key, or set OPENAI_API_KEY")
    try:
        is_active = status == 200 and json.loads(told)["active"]
    except (ValueError, KeyError, TypeError):
        is_active = False
    if is_active:
        return ok(what, "on")
    return warning(what, f"answers {status}, and not what it should", "Look at the server's log")
