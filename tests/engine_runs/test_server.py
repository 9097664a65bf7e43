"""`vllm serve MODEL --orthorank-ratio 0.3`, over HTTP, in vLLM's default configuration.

The engine runs in a process of its own and the model is compiled, as a user has it.
"""

import json
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from orthorank_vllm import __version__
from orthorank_vllm.cli.main import main
from tests.conftest import Prompts
from tests.support.reference import Reference, Request, Rule
from tests.support.replay import SAFE_MARGIN, TOLERANCE
from tests.support.scripts import Script
from tests.support.servers import API_KEY, NAME, Server, serving
from tests.support.shipped import Shipped

pytestmark = pytest.mark.server

RATIO = 0.3
SHIPPED = Shipped.at(RATIO)
CLIENTS = """
from vllm.entrypoints.cli.main import main
[commands] = arguments
done = []
for words in commands:
    sys.argv = ["vllm", *words]
    main()
    done.append(words[0])
answer(done)
"""


@pytest.fixture(scope="module")
def server(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serving(model_path, folder, "--orthorank-ratio", str(RATIO)) as running:
        yield running


@pytest.fixture(scope="module")
def reference(model_path: str) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    return Reference(model, Rule(SHIPPED.keeps, stand_ins=SHIPPED.stand_ins))


def reference_logprobs(
    reference: Reference, prompt: list[int], generated: list[int]
) -> tuple[Request, list[torch.Tensor]]:
    request = reference.start(prompt)
    rows = [request.forward(0, len(prompt))[-1]]
    for position, token in enumerate(generated[:-1], start=len(prompt)):
        request.append(token)
        rows.append(request.forward(position, position + 1)[0])
    return request, rows


def safe_prompt(reference: Reference, prompts: Prompts, length: int) -> list[int]:
    """One in which float noise decides nothing."""
    while True:
        prompt = prompts.take(length)
        request = reference.start(prompt)
        request.forward(0, length)
        if request.margin > SAFE_MARGIN:
            return prompt


def test_the_start_up_line_says_what_is_run_and_what_answers_lose(server: Server) -> None:
    [line] = [line for line in server.log.read_text().splitlines() if "OrthoRank is active" in line]
    losses = ", ".join(f"{kind} {nats:.3f}" for kind, nats in SHIPPED.expected.loss.items())
    assert (
        f"ratio {SHIPPED.reached:.3f} (asked for 0.3), window 128, tail 64, "
        f"stand-ins of smollm2-135m.safetensors, {len(SHIPPED.keeps)} of 30 layers "
        f"selective [{SHIPPED.listed}], chosen by profile SmolLM2-135M-Instruct, "
        f"expected loss {losses} nats a token; {SHIPPED.expected.found:.0%} of numbers found, "
        "attention: cpu"
    ) in line


def test_it_warns_if_answers_lose_much(server: Server) -> None:
    told = server.log.read_text().count("OrthoRank expects answers to lose")
    assert told == SHIPPED.loses_much


def test_a_completion_equals_the_reference(
    server: Server, reference: Reference, prompts: Prompts
) -> None:
    """Prefill is sparse and decode compiled: both have to meet the reference."""
    prompt = safe_prompt(reference, prompts, 500)
    answer = server.client.completions.with_raw_response.create(
        model=NAME,
        prompt=prompt,
        max_tokens=6,
        temperature=0,
        logprobs=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    choice = json.loads(answer.text)["choices"][0]
    generated = choice["token_ids"]
    assert len(generated) == 6
    _, rows = reference_logprobs(reference, prompt, generated)
    for row, token, told in zip(rows, generated, choice["logprobs"]["token_logprobs"], strict=True):
        assert abs(float(row[token]) - told) < TOLERANCE


def asking(ratio: Any, **more: Any) -> dict[str, Any]:
    return {"extra_body": {"vllm_xargs": {"orthorank_ratio": ratio}, **more}}


def test_a_request_of_its_own_ratio_equals_the_reference_and_is_counted_so(
    server: Server, reference: Reference, prompts: Prompts
) -> None:
    prompt = prompts.take(400)
    for ratio, keeps in ((0.0, {}), (0.1, Shipped.at(0.1).keeps)):
        told = f"{Shipped.at(ratio).reached:.4g}" if keeps else "0"
        before = server.metric("orthorank_other_ratio_prefill_tokens_total", ratio=told)
        own = Reference(reference.model, Rule(keeps, stand_ins=reference.rule.stand_ins))
        more = asking(ratio, return_token_ids=True, ignore_eos=True)
        answer = server.client.completions.with_raw_response.create(
            model=NAME, prompt=prompt, max_tokens=6, temperature=0, logprobs=1, **more
        )
        choice = json.loads(answer.text)["choices"][0]
        request, rows = reference_logprobs(own, prompt, choice["token_ids"])
        assert request.margin > SAFE_MARGIN, "take another prompt"
        for row, token, given in zip(
            rows, choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True
        ):
            assert abs(float(row[token]) - given) < TOLERANCE
        counted_now = server.metric("orthorank_other_ratio_prefill_tokens_total", ratio=told)
        assert counted_now - before == len(prompt)
    assert server.metric("orthorank_ratio_max") == RATIO
    told_ratios = json.loads(server.get("/orthorank", API_KEY))["engines"][0]["other_ratio_tokens"]
    assert told_ratios["0"] >= len(prompt)


@pytest.mark.parametrize("ratio", [0.31, -0.1, "much", "0.1", [0.1], float("nan")])
@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_ratio_that_cannot_be_is_a_400_and_the_server_goes_on(
    server: Server, kind: str, ratio: Any
) -> None:
    body: dict[str, Any] = {"model": NAME, "max_tokens": 2}
    body["vllm_xargs"] = {"orthorank_ratio": ratio}
    path = "/v1/completions"
    if kind == "chat":
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "hello"}]
    else:
        body["prompt"] = "hello"
    headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
    # Python writes and reads NaN, which no client of OpenAI's sends.
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    told = json.loads(refused.value.read())["error"]
    assert refused.value.code == 400
    assert told["param"] == "orthorank_ratio"
    assert (
        "not allowed, give a number from 0 to 0.3, this server's --orthorank-max-ratio"
        in (told["message"])
    )
    assert server.client.completions.create(
        model=NAME, prompt="hello", max_tokens=2, **asking(RATIO)
    )


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_streamed_answer_is_the_same_as_a_whole_one(server: Server, kind: str) -> None:
    options: dict[str, Any] = {"model": NAME, "max_tokens": 14, "temperature": 0}
    question = "Name three colours of the rainbow."
    create: Any
    if kind == "chat":
        create = server.client.chat.completions.create
        options["messages"] = [{"role": "user", "content": question}]
        whole = create(**options).choices[0].message.content
        streamed = [each.choices[0].delta.content or "" for each in create(**options, stream=True)]
    else:
        create = server.client.completions.create
        options["prompt"] = question
        whole = create(**options).choices[0].text
        streamed = [each.choices[0].text for each in create(**options, stream=True)]
    assert whole
    assert len(streamed) > 1
    assert "".join(streamed) == whole


COUNTERS = (
    "prefill_tokens",
    "token_updates",
    "token_updates_skipped",
    "layer_token_updates",
    "layer_token_updates_skipped",
    "flops_saved",
    "step_prefill_tokens",
    "step_prefill_seconds",
)


def counted(server: Server) -> dict[str, float]:
    """Each counter's value by its name, with the label that it has beside vLLM's."""
    return {
        " ".join([name, *labels.values()]): value
        for name in COUNTERS
        for labels, value in server.samples(f"orthorank_{name}_total")
    }


def test_the_counts_on_metrics_are_exact(
    server: Server, reference: Reference, prompts: Prompts
) -> None:
    """The engine is another process."""
    before = counted(server)
    prompt = prompts.take(334)[1:]  # no other test's, so nothing of it is cached
    server.client.completions.create(model=NAME, prompt=prompt, max_tokens=4, temperature=0)
    more = {name: value - before[name] for name, value in counted(server).items()}
    request, _ = reference_logprobs(reference, prompt, [0])
    assert more["prefill_tokens"] == more["step_prefill_tokens sparse"] == len(prompt)
    assert more["token_updates"] == request.updates
    assert more["token_updates_skipped"] == request.skipped
    by_layer = [more[f"layer_token_updates_skipped {layer}"] for layer in range(30)]
    assert {layer for layer, skipped in enumerate(by_layer) if skipped} == SHIPPED.keeps.keys()
    assert sum(by_layer) == request.skipped
    for layer, skipped in enumerate(by_layer):
        assert more[f"layer_token_updates {layer}"] == len(prompt) - skipped
    assert more["step_prefill_tokens stock"] == 0
    assert more["step_prefill_seconds sparse"] > 0
    # At least the MLP of each skipped update, at most everything that its layer computes.
    assert 1 < more["flops_saved"] / (request.skipped * 2 * 576 * 1536 * 3) < 2


def test_decoding_counts_as_stock_steps(server: Server) -> None:
    def steps(path: str) -> float:
        return server.metric("orthorank_step_duration_seconds_count", path=path)

    before = steps("sparse"), steps("stock")
    server.client.completions.create(
        model=NAME, prompt=list(range(1000, 1200)), max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert steps("sparse") - before[0] == 1
    assert steps("stock") - before[1] >= 4


def test_metrics_say_what_is_run_and_what_answers_lose(server: Server) -> None:
    assert server.metric("orthorank_active") == 1
    [(labels, value)] = server.samples("orthorank_config_info")
    assert value == 1
    assert labels == {
        "window": "128",
        "tail": "64",
        "aligned": "true",
        "stand_in": "smollm2-135m.safetensors",
        "layers": SHIPPED.listed,
        "chosen_by": "profile SmolLM2-135M-Instruct",
        "measured": "true",
        "version": __version__,
    }
    assert server.metric("orthorank_ratio_asked") == RATIO
    assert server.metric("orthorank_ratio_configured") == pytest.approx(SHIPPED.reached)
    losses = server.samples("orthorank_expected_loss_nats")
    assert {labels["kind"]: nats for labels, nats in losses} == SHIPPED.expected.loss
    assert server.metric("orthorank_expected_lookups_found_ratio") == SHIPPED.expected.found


def test_vllms_own_metrics_stay(server: Server) -> None:
    assert server.metric("vllm:prompt_tokens_total") > 0


def test_no_plugin_is_announced_that_the_user_did_not_ask_for(server: Server) -> None:
    """Break seen: an entry point of vLLM's for routes, of which it says that it is not named."""
    assert "endpoint plugin" not in server.log.read_text()


def test_the_endpoint_says_what_metrics_say(server: Server) -> None:
    told = json.loads(server.get("/orthorank", API_KEY))
    assert told["active"] is True
    assert told["versions"] == {"orthorank-vllm": __version__, "vllm": version("vllm")}
    [engine] = told["engines"]
    assert (engine["model_name"], engine["engine"]) == (NAME, "0")
    layers = [(int(layer), keep) for layer, keep in engine["layers"].items()]
    assert layers == [
        (layer, pytest.approx(keep, abs=1e-4)) for layer, keep in SHIPPED.keeps.items()
    ]
    assert (engine["window"], engine["tail"], engine["is_measured"]) == (128, 64, True)
    assert engine["expected_loss"] == SHIPPED.expected.loss
    assert engine["expected_found"] == SHIPPED.expected.found
    assert engine["ratio_asked"] == RATIO
    assert engine["chosen_by"] == "profile SmolLM2-135M-Instruct"
    for name in ("prefill_tokens", "token_updates", "token_updates_skipped", "flops_saved"):
        assert engine[name] == server.metric(f"orthorank_{name}_total") > 0
    skipped, updates = engine["token_updates_skipped"], engine["token_updates"]
    assert engine["ratio_reached"] == skipped / (skipped + updates)
    assert sum(layer["skipped"] for layer in engine["by_layer"].values()) == skipped
    sparse = engine["by_path"]["sparse"]
    assert sparse["prefill_tokens"] == server.metric(
        "orthorank_step_prefill_tokens_total", path="sparse"
    )
    assert 0 < sparse["prefill_seconds"] <= sparse["seconds"]


@pytest.mark.parametrize("api_key", [None, "another key"])
def test_the_endpoint_wants_the_servers_api_key(server: Server, api_key: str | None) -> None:
    """Break seen: left to vLLM's middleware, which guards its own paths only."""
    answers = []
    for path in ("/orthorank", "/v1/models"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.get(path, api_key)
        answers.append((refused.value.code, refused.value.read()))
    assert answers[0] == answers[1]
    assert answers[0][0] == 401


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_the_endpoint_can_only_be_read(server: Server, method: str) -> None:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    request = urllib.request.Request(server.url + "/orthorank", b"{}", headers, method=method)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 405


def test_the_doctor_finds_the_server_well(
    server: Server,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["doctor", f"{server.url}/v1/", "--api-key", API_KEY, "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    of_loss = "warning" if SHIPPED.loses_much else "ok"
    assert {check["what"]: check["state"] for check in checks} == {
        **dict.fromkeys(["server", "OrthoRank", "layers", "ratio"], "ok"),
        "expected loss": of_loss,
        **dict.fromkeys(["sinks", "GET /orthorank"], "ok"),
    }
    assert checks[-1]["found"] == "on"
    # Without the key, and with it where vLLM's own clients look for it.
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(["doctor", server.url]) == 0
    assert "wants the API key" in capsys.readouterr().out
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    assert main(["doctor", server.url]) == 0
    assert "wants the API key" not in capsys.readouterr().out


def test_vllms_own_clients_work_with_the_plugin_installed(server: Server, model_path: str) -> None:
    """One after the other, in one process."""
    to = ["--url", f"{server.url}/v1", "--api-key", API_KEY]
    random = ["--num-prompts", "2", "--random-input-len", "64", "--random-output-len", "4"]
    served = ["--model", model_path, "--served-model-name", NAME, "--base-url", server.url]
    # A chat's answer is as long as the context allows.
    long = "hello " * 1980
    commands = [
        ["complete", "--quick", "hello", "--max-tokens", "4", *to],
        ["chat", "--quick", long, *to],
        ["bench", "serve", *random, *served],
    ]
    run = Script(CLIENTS, commands, OPENAI_API_KEY=API_KEY)
    assert run.answer == ["complete", "chat", "bench"], run.output[-4000:]
    assert "Traceback" not in run.output


def test_a_mistake_in_a_request_is_answered_by_vllm(server: Server) -> None:
    with pytest.raises(openai.BadRequestError):
        server.client.completions.create(model=NAME, prompt=[1] * 3000, max_tokens=4)


def test_the_server_stops_on_ctrl_c_and_leaves_nothing(server: Server) -> None:
    """Last in the file: it ends the server."""
    metrics_folder = server.counts_file().parent
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=30) in (0, 130, -signal.SIGINT)
    assert not metrics_folder.exists()
