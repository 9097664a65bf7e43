"""vLLM's entry point: every touch on vLLM's globals is made here.

`register` runs in every process of vLLM, before anything else of it does. Each
function below says why the patch is needed and what breaks it.
"""

import functools
import sys
from typing import Any, NoReturn

from orthorank_vllm.compat import SEAMS, require_seams, worker_seams
from orthorank_vllm.model.architectures import MEASURED_OF, ORTHORANK_OF
from orthorank_vllm.options import OptionError

_registered = False


def register() -> None:
    """Entry point `vllm.general_plugins`; a second call changes nothing.

    Raises:
        RuntimeError: this vLLM lacks a seam; names it.
    """
    global _registered
    if _registered:
        return
    require_seams(SEAMS)
    _add_flags()
    _read_flags()
    _read_lists()
    _configure_engine()
    _calibrate_at_start()
    _limit_the_prefix_cache()
    _check_requests()
    _show_metrics_of_several_servers()
    _register_architectures()
    _registered = True


def _add_flags() -> None:
    # Why: vLLM has no interface for a plugin's own flags; general plugins load
    # just before `vllm serve` builds its parser with this function.
    # Breaks on: add_cli_args no longer being a static method of one parser.
    from vllm.engine.arg_utils import EngineArgs

    from orthorank_vllm.engine.flags import add_flags

    original = EngineArgs.add_cli_args

    @functools.wraps(original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        add_flags(parser)
        return parser

    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def _read_flags() -> None:
    # Why: the flags have to reach `additional_config`, which travels to every worker.
    # Breaks on: from_cli_args no longer being the one way from flags to EngineArgs.
    from vllm.engine.arg_utils import EngineArgs

    from orthorank_vllm.engine.flags import with_flags

    original = EngineArgs.from_cli_args.__func__

    @functools.wraps(original)
    def from_cli_args(cls: type, args: Any, *rest: Any, **kwargs: Any) -> Any:
        engine_args = original(cls, args, *rest, **kwargs)
        try:
            engine_args.additional_config = with_flags(engine_args.additional_config, args)
        except OptionError as error:
            _end_command(error)
        return engine_args

    EngineArgs.from_cli_args = classmethod(from_cli_args)


def _read_lists() -> None:
    # Why: of a list in a `--config` file our flag would get the first item, and the last would
    # become the model's name; a bare `off` would be left out.
    # Breaks on: a file that is read elsewhere (a list is then taken as it was).
    import yaml
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from orthorank_vllm.engine.flags import joined_lists, switched_off

    original = FlexibleArgumentParser.load_config_file

    @functools.wraps(original)
    def load_config_file(self: Any, file_path: str) -> list[str]:
        words = joined_lists(original(self, file_path))
        with open(file_path) as file:
            return words + switched_off(yaml.safe_load(file))

    FlexibleArgumentParser.load_config_file = load_config_file


def _configure_engine() -> None:
    # Why: the architecture has to be swapped, the layers resolved and the
    # unsupported features refused before weights load, for `vllm serve` and `LLM` alike.
    # Breaks on: an engine configured without create_engine_config (the workers then refuse).
    from vllm.engine.arg_utils import EngineArgs

    from orthorank_vllm.engine.configure import configure, options_in
    from orthorank_vllm.engine.flags import FromCommandLine

    original = EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_from_command_line = isinstance(options_in(self.additional_config), FromCommandLine)
        try:
            return configure(self, original, *args, **kwargs)
        except OptionError as error:
            if not is_from_command_line:
                raise
            _end_command(error)

    EngineArgs.create_engine_config = create_engine_config


def _end_command(error: OptionError) -> NoReturn:
    """A user's mistake on the command line: one line, no traceback."""
    print(f"vllm: error: {error}", file=sys.stderr)
    raise SystemExit(2) from None


def _calibrate_at_start() -> None:
    # Why: layers can be chosen by measurement only when the weights are there, and should be
    # before memory is measured; vLLM has no interface for that moment.
    # Breaks on: an executor that loads its model later (the first prompt is then refused).
    from vllm.v1.executor.abstract import Executor

    from orthorank_vllm.engine.configure import options_in

    original = Executor.__init__

    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        options = options_in(vllm_config.additional_config)
        is_open = isinstance(options, dict) and (
            options.get("to_choose") or options.get("measured_on") or options.get("stand_in")
        )
        if is_open:
            from orthorank_vllm.calibrate.startup import choose_layers

            choose_layers(self, vllm_config)

    Executor.__init__ = __init__


def _limit_the_prefix_cache() -> None:
    # Why: a prompt's tail may lie in blocks that a longer prompt filled without computing those
    # rows, or one of another ratio, and vLLM has no interface for how far a prompt may be reused,
    # or left for others; nor for what a KV connector's store knows blocks by; nor for work of the
    # engine's own when nothing else is to be done.
    # Breaks on: a scheduler that looks its requests up elsewhere (other classes are refused).
    from vllm.v1.core.sched.scheduler import Scheduler

    from orthorank_vllm.config import OrthoRankConfig
    from orthorank_vllm.engine.prefix_cache import keep_ratios_apart, keep_tails_out
    from orthorank_vllm.engine.shadow_runs import add_reruns
    from orthorank_vllm.engine.stores import keep_apart

    original = Scheduler.__init__

    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        config = OrthoRankConfig.of_engine(vllm_config.additional_config)
        if config is not None:
            keep_tails_out(self.kv_cache_manager, config, self.block_size)
            # In this order: what stores know a block by is made of hashes that tell ratios apart.
            keep_apart(self, config)
            keep_ratios_apart(self, config)
            add_reruns(self, config)

    Scheduler.__init__ = __init__


def _check_requests() -> None:
    # Why: a request's ratio must be refused before the engine has it, and a logits processor, whose
    # `validate_params` vLLM calls, would be one more step of sampling, refused with speculation.
    # Breaks on: requests that reach the engine past this one function (the workers then take the
    # server's own ratio for what is no number, and their largest for what is too large).
    from vllm.v1.engine.input_processor import InputProcessor

    from orthorank_vllm.engine.request_ratio import check_ratio

    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        is_session = kwargs.get("resumable", False)
        has_stores = self.vllm_config.kv_transfer_config is not None
        check_ratio(self.vllm_config.additional_config, params, is_session, has_stores)
        return original(self, request_id, prompt, params, *args, **kwargs)

    InputProcessor.process_inputs = process_inputs


def _show_metrics_of_several_servers() -> None:
    # Why: with PROMETHEUS_MULTIPROC_DIR, /metrics is made from a new registry at each scrape that
    # has this one collector; our counts are not in its folder, where a broken file ends them all.
    # Breaks on: a /metrics that reads that folder without prometheus-client's collector.
    from prometheus_client.multiprocess import MultiProcessCollector

    from orthorank_vllm.metrics.collector import beside_vllms

    original = MultiProcessCollector.collect

    @functools.wraps(original)
    def collect(self: Any) -> Any:
        return beside_vllms(getattr(self, "_path", None), original(self))

    MultiProcessCollector.collect = collect  # type: ignore[method-assign]


def _register_architectures() -> None:
    # vLLM's documented interface; the package hands the names on to __getattr__ below.
    from vllm.model_executor.models import ModelRegistry

    for architecture in (*ORTHORANK_OF.values(), *MEASURED_OF.values()):
        ModelRegistry.register_model(architecture, f"orthorank_vllm:{architecture}")


def __getattr__(name: str) -> Any:
    """An architecture's class, looked up by vLLM only where the model is built or inspected.

    That is the moment to hook the model runner: not before, so that other
    processes, and stock models, never import or patch it.
    """
    if name not in (*ORTHORANK_OF.values(), *MEASURED_OF.values()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_seams(worker_seams())
    if name in ORTHORANK_OF.values():
        _hook_model_runner()
        _hook_worker()
    from orthorank_vllm.engine.models import class_of

    # Kept: vLLM looks an architecture up more than once, and compares classes.
    return globals().setdefault(name, class_of(name))


def _hook_worker() -> None:
    # Why: weights that are copied into a model's own tensors, or lost in a deep sleep, pass no
    # method of the model's; the sinks' states made of the old ones would be used on.
    # Breaks on: a worker's extension that writes to them by itself (README, "New weights").
    from vllm.v1.worker.gpu_worker import Worker

    from orthorank_vllm.engine import weights

    weights.hook(Worker)


def _hook_model_runner() -> None:
    # Why: Model Runner V1 has no interface for an extra model input.
    # Breaks on: a runner that calls the model other than through _model_forward.
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from orthorank_vllm.engine import runner_v1

    runner_v1.hook(GPUModelRunner)
    left_out = [runner.__qualname__ for runner in runner_v1.unhooked(GPUModelRunner)]
    if left_out:
        raise RuntimeError(
            f"OrthoRank would be inactive: {', '.join(left_out)} overrides _model_forward"
        )
