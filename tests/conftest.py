"""Fixtures shared by all tests: the real model, and text to prompt it with."""

import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path(os.environ.get("ORTHORANK_TEST_MODEL", ROOT / ".models" / "SmolLM2-135M-Instruct"))

# Before vLLM is imported: one engine per process, all cores, nothing fetched or sent.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Not the user's own: a profile calibrated there would go before the shipped one. Nor that of tests
# that run at the same time.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ.setdefault("VLLM_CACHE_ROOT", str(ROOT / ".pytest_cache" / "vllm" / WORKER))


@pytest.fixture(autouse=True)
def read_environment() -> None:
    """Let vLLM read its variables anew: an engine of an earlier test has it remember them."""
    if (envs := sys.modules.get("vllm.envs")) is not None:
        envs.disable_envs_cache()


# vLLM's logger holds on to a stream that pytest has closed by then.
logging.raiseExceptions = False


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """What the test has our logger say; vLLM's own hands nothing on to pytest's."""
    handler = _Lines()
    logger = logging.getLogger("vllm.orthorank")
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def model_path() -> str:
    """SmolLM2-135M as a normal model folder, made by `make model`."""
    if not (MODEL / "config.json").exists():
        pytest.fail(f"the test model is not at {MODEL}: run `make model`")
    return str(MODEL)


@pytest.fixture(scope="session")
def small_model_path(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The real model's first six layers: a model for which no profile ships.

    Its predictions, from states that are not meant for the end, are made milder, until they are
    better than chance: 8.5 nats a token, where ln(vocabulary) is 10.8.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "SmolLM2-first-6-layers"
    model = AutoModelForCausalLM.from_pretrained(model_path, num_hidden_layers=6)
    model.model.norm.weight.data *= 0.25
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def text_tokens(model_path: str) -> list[int]:
    """Some thousands of tokens of English: the documentation that every Python carries."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    text = "\n".join(topics[name] for name in sorted(topics))[:120_000]
    return list(AutoTokenizer.from_pretrained(model_path)(text)["input_ids"])


class Prompts:
    """Different stretches of text, the same in every run."""

    def __init__(self, tokens: list[int], seed: int) -> None:
        self._tokens = tokens
        self._random = random.Random(seed)

    def take(self, length: int) -> list[int]:
        start = self._random.randrange(len(self._tokens) - length)
        return self._tokens[start : start + length]


@pytest.fixture
def prompts(text_tokens: list[int]) -> Prompts:
    return Prompts(text_tokens, seed=0)
