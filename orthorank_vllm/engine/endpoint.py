"""`GET /orthorank`: what a server's engines run and have counted, as JSON.

vLLM's interface for a plugin's routes (vllm/plugins/endpoint_plugins/interface.py). vLLM loads such
a plugin only where VLLM_PLUGINS names it. It reads what `/metrics` shows, from wherever the workers
are, and changes nothing.
"""

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from orthorank_vllm import __version__
from orthorank_vllm.metrics.folder import orthorank_metrics
from orthorank_vllm.metrics.status import as_json, engines_of, is_up

PATH = "/orthorank"


class StatusEndpoint:
    """vLLM's `EndpointPlugin`."""

    name = "orthorank_endpoint"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route, which asks for the server's API key if there is one."""
        # vLLM's middleware guards a fixed list of paths; ours is not on it. The keys as there.
        given = app.state.args.api_key or [envs.VLLM_API_KEY]
        guard = AuthenticationMiddleware(app, [key for key in given if key])

        @app.get(PATH)
        def orthorank(request: Request) -> JSONResponse:
            """What OrthoRank runs here and has counted so far."""
            if guard.api_tokens and not guard.verify_token(request.headers):
                return JSONResponse({"error": "Unauthorized"}, status_code=401)
            return JSONResponse(status())

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Nothing is kept."""


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
