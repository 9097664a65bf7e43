"""`GET /orthorank`: what a server's engines run and have counted, as JSON.

It reads what `/metrics` shows, from wherever the workers are, and changes nothing.
"""

import hashlib
import secrets
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from vllm import envs

from orthorank_vllm import __version__
from orthorank_vllm.metrics.collector import orthorank_metrics
from orthorank_vllm.metrics.status import as_json, engines_of, is_up

PATH = "/orthorank"


class StatusRoute:
    """Adds the route when the server starts, and else hands everything on.

    A middleware, because vLLM takes those by their name from its own options (`--middleware`);
    the route itself is an ordinary one, which the server's other middleware sees and counts.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI's interface."""
        if scope["type"] == "lifespan":
            add_route(scope["app"])
        await self._app(scope, receive, send)


def add_route(app: FastAPI) -> None:
    """Let a server of vLLM's answer `GET /orthorank`, to those who have its API key."""
    # vLLM's middleware guards a fixed list of paths; ours is not on it. The keys as there.
    given = app.state.args.api_key or [envs.VLLM_API_KEY]
    api_keys = [key for key in given if key]

    @app.get(PATH)
    def orthorank(request: Request) -> JSONResponse:
        """What OrthoRank runs here and has counted so far."""
        if not is_allowed(request.headers.get("Authorization"), api_keys):
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        return JSONResponse(status())


def is_allowed(authorization: str | None, api_keys: Sequence[str]) -> bool:
    """Whether a request's header has one of the keys, or none is needed.

    Compared as vLLM does it, whose own function lies elsewhere in each version: in a time that
    tells nothing about the key.
    """
    if not api_keys:
        return True
    scheme, _, given = (authorization or "").partition(" ")
    hashes = [hashlib.sha256(key.encode()).digest() for key in (given, *api_keys)]
    matches = [secrets.compare_digest(hashes[0], known) for known in hashes[1:]]
    return scheme.lower() == "bearer" and any(matches)


def status() -> dict[str, Any]:
    """The route's answer."""
    metrics = orthorank_metrics()
    engines = engines_of(metrics)
    return {
        "active": any(engine.active for engine in engines),
        "metrics_up": is_up(metrics),
        "versions": {"orthorank-vllm": __version__, "vllm": version("vllm")},
        "engines": [as_json(engine) for engine in engines],
    }
