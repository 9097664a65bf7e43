"""vLLM's workers with a model loaded, and no engine around them: no KV cache, no requests."""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from orthorank_vllm.model.architectures import (
    MEASURED_OF,
    hf_overrides_for,
    orthorank_architectures,
)
from orthorank_vllm.model.fingerprint import loads_weights
from orthorank_vllm.offline import worker_calls
from orthorank_vllm.offline.served import Answered, AnswerLoss
from orthorank_vllm.options import OptionError
from orthorank_vllm.selection.method import Method


class Workers:
    """An executor's workers, called together; each call answers with the first one's answer."""

    def __init__(self, executor: Any) -> None:
        """Call a loaded model's workers.

        Args:
            executor: vLLM's `Executor` (vllm/v1/executor/abstract.py), its model loaded.
        """
        self._executor = executor

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function of the module `worker_calls` in each worker."""
        return self._executor.collective_rpc(function, args=args)[0]


class WorkersTrial:
    """`calibrate.search.Trial` on a loaded model.

    Attributes:
        dense: each text's loss in the dense model.
    """

    def __init__(
        self,
        workers: Workers,
        texts: Sequence[Answered],
        method: Method,
        keeps: Sequence[float],
        name: str = "texts",
    ) -> None:
        """Take some texts, beside those of other names.

        Args:
            keeps: those that layers will be tried with.
        """
        self._workers = workers
        self._name = name
        self.dense: list[AnswerLoss] = workers.call(
            worker_calls.use_texts, name, texts, method, tuple(keeps)
        )

    def start_step(self, chosen: Mapping[int, float]) -> None:
        self._workers.call(worker_calls.start_step, self._name, dict(chosen))

    def losses_with(self, more: Mapping[int, float]) -> list[AnswerLoss]:
        losses: list[AnswerLoss] = self._workers.call(worker_calls.losses_with, dict(more))
        return losses


def measuring_config(arguments: argparse.Namespace) -> Any:
    """vLLM's `VllmConfig` for `loaded_workers`: eager, and small in what serving alone needs.

    Args:
        arguments: parsed by a parser with vLLM's `EngineArgs.add_cli_args`.

    Raises:
        OptionError: vLLM cannot load the model, its layers are not like Llama's, or there
            would be no weights to measure.
    """
    from vllm.engine.arg_utils import EngineArgs

    with _mistakes_in_one_line(arguments.model):
        engine_args = EngineArgs.from_cli_args(arguments)
        engine_args.hf_overrides = hf_overrides_for(engine_args, MEASURED_OF)
        # One process where one will do: half the memory, and Ctrl-C meets no child.
        if engine_args.tensor_parallel_size * engine_args.pipeline_parallel_size == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            engine_args.distributed_executor_backend = "uni"
        engine_args.enforce_eager = True
        # Less than this free, and vLLM stops for the sake of a KV cache that will not be made.
        engine_args.gpu_memory_utilization = 0.01
        engine_args.max_num_seqs = 1
        vllm_config = engine_args.create_engine_config()
    if not loads_weights(vllm_config.load_config):
        raise OptionError(
            f"--load-format {vllm_config.load_config.load_format}: not possible here, it loads no "
            "weights, and random ones tell nothing; leave it out"
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise OptionError(
            f"--pipeline-parallel-size {vllm_config.parallel_config.pipeline_parallel_size}: "
            "not possible here, a choice of layers is measured on the whole model; give 1"
        )
    return vllm_config


def model_config_of(arguments: argparse.Namespace) -> Any:
    """vLLM's `ModelConfig` of a model that OrthoRank can serve.

    Args:
        arguments: as for `measuring_config`.

    Raises:
        OptionError: see `measuring_config`.
    """
    from vllm.engine.arg_utils import EngineArgs

    with _mistakes_in_one_line(arguments.model):
        model_config = EngineArgs.from_cli_args(arguments).create_model_config()
    orthorank_architectures(model_config.architectures)
    return model_config


@contextmanager
def loaded_workers(vllm_config: Any) -> Iterator[Workers]:
    """Load the model as vLLM would to serve it, and unload it in the end."""
    from vllm.v1.executor import Executor

    executor = Executor.get_class(vllm_config)(vllm_config)
    try:
        yield Workers(executor)
    finally:
        executor.shutdown()


def tokenizer_of(model_config: Any) -> Any:
    """The model's own tokenizer; its `encode` puts the special tokens before a text."""
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(model_config)


@contextmanager
def _mistakes_in_one_line(model: str) -> Iterator[None]:
    try:
        yield
    except OptionError:
        raise
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OptionError(f"MODEL {model}: vLLM cannot load it ({reason})") from None
