"""Whether a running server runs OrthoRank, and does what was asked of it."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from orthorank_vllm.doctor.check import Check, failed, ok, warning
from orthorank_vllm.doctor.engine import checks_of, requests_of
from orthorank_vllm.metrics.status import engines_of, is_up
from orthorank_vllm.options import OptionError

TIMEOUT = 10.0


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
        of = "" if len(engines) == 1 else f" (engine {engine.engine})"
        yield from checks_of(engine, requests_of(families, engine), of)
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
