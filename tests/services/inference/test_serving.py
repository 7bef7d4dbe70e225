"""The served engine with plaintext deltas: row mapping, mixed batches, failures, isolation, OpenAI's protocol.

One vLLM engine for the module. The encrypted path has the same hooks and is compared with the same reference in
tests/e2e; what is tested here does not depend on how a delta is computed.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from tensorguard.rpc.status import REASON_KEY
from tests.support.random_lora import write_random_lora

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
BASE, RED, BLUE, GREEN = "SmolLM2-135M-Instruct", "red", "blue", "green"
ADMIN = "the-operators-own-secret"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not MODEL.is_dir(), reason="the demo model is not prepared (make model)"),
]


@dataclass
class Served:
    core: Any
    stub: Any
    fail_dir: Path

    async def complete(self, endpoint: int = 2, **body: Any) -> tuple[int, str, bytes]:
        parts = [part async for part in self.call(endpoint, **body)]
        head = parts[0].head
        return head.status, head.content_type, b"".join(part.body for part in parts[1:])

    async def refused(self, **body: Any) -> tuple[grpc.StatusCode, str]:
        """Status and reason of a call that must fail."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.complete(**body)
        return caught.value.code(), str(dict(caught.value.trailing_metadata())[REASON_KEY])

    def call(self, endpoint: int = 2, **body: Any) -> Any:
        from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2

        return self.stub.Complete(inference_pb2.CompleteRequest(endpoint=endpoint, body=json.dumps(body).encode()))

    async def tokens(self, model: str, prompt: Any, max_tokens: int = 24, **options: Any) -> list[int]:
        status, _, body = await self.complete(
            model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, return_token_ids=True, **options
        )
        assert status == 200, body
        return list(json.loads(body)["choices"][0]["token_ids"])

    def failing(self, adapter: str) -> Path:
        return self.fail_dir / adapter


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        RED: write_random_lora(folder / RED, MODEL, targets=ALL, strength=0.05, seed=1),
        # Only some layers and projections: groups with one projection of three, layers without hooks.
        BLUE: write_random_lora(
            folder / BLUE, MODEL, targets=("v_proj", "down_proj"), layers=range(0, 30, 2), strength=0.4, seed=2
        ),
        # Attached by a test.
        GREEN: write_random_lora(folder / GREEN, MODEL, rank=4, targets=("q_proj",), strength=0.4, seed=3),
    }


@pytest.fixture(scope="module")
def environment(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    fail_dir = tmp_path_factory.mktemp("fail")
    changes = {
        "TENSAFE_TEST_ADAPTERS": json.dumps({name: str(path) for name, path in adapters.items()}),
        "TENSAFE_TEST_FAIL_DIR": str(fail_dir),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    yield fail_dir
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(environment: Path) -> AsyncIterator[Served]:
    from services.inference.server import build_inference_server
    from services.inference.settings import InferenceSettings
    from tensorguard.backends.vllm.config import AdapterConnection
    from tensorguard.backends.vllm.core import EngineCore
    from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2_grpc

    (environment / "admin").write_text(ADMIN)
    settings = InferenceSettings(
        model=str(MODEL),
        dtype="float32",
        max_model_len=1024,
        listen="127.0.0.1:0",
        adapters=tuple(
            AdapterConnection(
                name=name, coprocessor_endpoint="none", attestor_endpoint="none", publisher_keys=(Path("none"),)
            )
            for name in (RED, BLUE)
        ),
        admin_secret_file=environment / "admin",
        _cli_parse_args=[],
    )
    core = await EngineCore.start(
        settings.engine_options(),
        settings.adapters,
        worker_class="tests.support.plaintext_worker.PlaintextWorker",
    )
    try:
        server = build_inference_server(settings, core)
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Served(core, inference_pb2_grpc.InferenceServiceStub(channel), environment)
        await server.stop(0)
    finally:
        core.shutdown()


PROMPTS = ["The capital of France is", "Explain homomorphic encryption:", "Once upon a time " * 40]


def reference(adapter: Path | None, folder: Path) -> list[dict[str, Any]]:
    """Greedy answers of unmodified PEFT in float32, in a process of its own."""
    prompts, output = folder / "prompts.json", folder / "answers.json"
    prompts.write_text(json.dumps([{"prompt": prompt} for prompt in PROMPTS]))
    command = [sys.executable, "-m", "tensorguard.models.reference", "--model", str(MODEL), "--max-tokens", "24"]
    command += ["--prompts", str(prompts), "--json", str(output)]
    if adapter is not None:
        command += ["--adapter", str(adapter)]
    subprocess.run(command, check=True, cwd=ROOT)
    return list(json.loads(output.read_text()))


async def test_mixed_batches_equal_plaintext_peft(served: Served, adapters: dict[str, Path], tmp_path: Path) -> None:
    names = [BASE, RED, BLUE]
    answers = await asyncio.gather(*(served.tokens(name, p) for p in PROMPTS for name in names))
    for column, adapter in enumerate([None, adapters[RED], adapters[BLUE]]):
        expected = await asyncio.to_thread(reference, adapter, tmp_path)
        for row, answer in enumerate(expected):
            assert answers[row * len(names) + column][: len(answer["token_ids"])] == answer["token_ids"]
    for row in range(len(PROMPTS)):
        assert len({tuple(a) for a in answers[row * 3 : row * 3 + 3]}) == 3, "an adapter changed nothing"


async def test_a_failed_delta_ends_only_requests_of_its_adapter(served: Served) -> None:
    before = await served.tokens(BLUE, PROMPTS[1])
    epoch = served.core.adapters[RED].epoch
    served.failing(RED).touch()
    try:
        failed, streamed, base, blue = await asyncio.gather(
            served.refused(model=RED, prompt=PROMPTS[1], max_tokens=24),
            served.refused(model=RED, prompt=PROMPTS[1], max_tokens=24, stream=True),
            served.tokens(BASE, PROMPTS[1]),
            served.tokens(BLUE, PROMPTS[1]),
        )
    finally:
        served.failing(RED).unlink()
    assert failed == streamed == (grpc.StatusCode.ABORTED, "delta_unavailable")
    assert blue == before
    assert len(base) == 24
    assert served.core.adapters[RED].epoch >= epoch + 2
    assert served.core.adapters[BLUE].epoch == 0
    assert len(await served.tokens(RED, PROMPTS[1])) == 24


async def test_a_stream_ends_with_the_error_and_without_a_wrong_token(served: Served) -> None:
    whole = await served.tokens(RED, PROMPTS[1], max_tokens=120, ignore_eos=True)
    base = asyncio.create_task(served.tokens(BASE, PROMPTS[0], max_tokens=60, ignore_eos=True))
    events: list[dict[str, Any]] = []
    try:
        call = served.call(
            model=RED,
            prompt=PROMPTS[1],
            max_tokens=120,
            temperature=0,
            ignore_eos=True,
            stream=True,
            return_token_ids=True,
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for part in call:
                for line in part.body.decode().split("\n\n"):
                    if line:
                        events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 4:
                    served.failing(RED).touch()
    finally:
        served.failing(RED).unlink(missing_ok=True)
    assert dict(caught.value.trailing_metadata())[REASON_KEY] == "delta_unavailable"
    received = [token for event in events for token in event["choices"][0]["token_ids"]]
    assert 4 <= len(received) < 120
    assert received == whole[: len(received)]
    assert all(event["choices"][0]["finish_reason"] is None for event in events)
    assert len(await base) == 60


async def test_chat_streams_and_answers_as_openai_does(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 8, "temperature": 0}
    status, kind, whole = await served.complete(1, model=RED, **body)
    document = json.loads(whole)
    assert (status, kind, document["object"], document["model"]) == (
        200,
        "application/json",
        "chat.completion",
        RED,
    )
    status, kind, streamed = await served.complete(1, model=RED, stream=True, **body)
    events = streamed.decode().split("\n\n")
    assert (status, kind, events[-2]) == (200, "text/event-stream", "data: [DONE]")
    pieces = [json.loads(event[6:])["choices"][0]["delta"].get("content", "") for event in events[:-2]]
    assert "".join(pieces) == document["choices"][0]["message"]["content"]


async def test_cached_prefixes_are_not_shared_between_models(served: Served) -> None:
    """Prompts longer than a block (128 tokens). Without salts, who asks second gets the first one's blocks."""
    prompt = "A story about a lighthouse keeper and the sea. " * 30 + "It ends"
    for order in ((BASE, RED, BLUE), (BLUE, RED, BASE)):
        answers = {name: await served.tokens(name, f"{order[0]} {prompt}", max_tokens=12) for name in order}
        served.core.adapters[RED].epoch += 1
        served.core.adapters[BLUE].epoch += 1
        await served.core.llm.reset_prefix_cache()
        alone = {}
        for name in order:
            alone[name] = await served.tokens(name, f"{order[0]} {prompt}", max_tokens=12)
            await served.core.llm.reset_prefix_cache()
        assert answers == alone
        assert len({tuple(tokens) for tokens in answers.values()}) == 3


async def test_an_adapters_prefixes_are_reused_by_its_own_requests(served: Served) -> None:
    prompt = "A list of birds that live near the river. " * 30 + "First"
    first = await served.tokens(RED, prompt, max_tokens=4)
    before = (await served.core.status())["adapted_rows"]
    assert await served.tokens(RED, prompt, max_tokens=4) == first
    assert (await served.core.status())["adapted_rows"] - before < 128 + 8


async def test_blocks_of_a_failed_request_are_never_reused(served: Served) -> None:
    prompt = "The ship's log of a long voyage to the north. " * 30 + "Then"
    served.failing(BLUE).touch()
    try:
        await served.refused(model=BLUE, prompt=prompt, max_tokens=24, temperature=0)
    finally:
        served.failing(BLUE).unlink()
    # The same salt again, as a request that was waiting meanwhile has it: only eviction protects it.
    served.core.adapters[BLUE].epoch -= 1
    with_old_salt = await served.tokens(BLUE, prompt, max_tokens=8)
    served.core.adapters[BLUE].epoch += 1
    assert with_old_salt == await served.tokens(BLUE, prompt, max_tokens=8)


async def test_several_choices_prompts_and_beams_go_through_the_adapter(served: Served) -> None:
    expected = await served.tokens(RED, PROMPTS[0], max_tokens=8)
    status, _, body = await served.complete(
        model=RED, prompt=[PROMPTS[0]] * 2, n=2, max_tokens=8, top_k=1, return_token_ids=True
    )
    assert status == 200
    assert [choice["token_ids"] for choice in json.loads(body)["choices"]] == [expected] * 4
    beams: dict[str, Any] = {"prompt": PROMPTS[1], "n": 2, "use_beam_search": True, "max_tokens": 12}
    texts = {}
    for name in (BASE, RED):
        status, _, body = await served.complete(model=name, temperature=0, **beams)
        assert status == 200
        texts[name] = json.loads(body)["choices"][0]["text"]
    assert texts[BASE] != texts[RED]


async def test_what_a_caller_may_not_send(served: Served) -> None:
    for field, value in {
        "cache_salt": "mine",
        "vllm_xargs": {"tensafe_adapter": RED},
        "lora_request": "red",
        "kv_transfer_params": {"a": 1},
        "ec_transfer_params": {"a": 1},
    }.items():
        status, _, body = await served.complete(model=BASE, prompt="x", max_tokens=1, **{field: value})
        assert status == 400
        assert field in json.loads(body)["error"]["message"]


async def test_errors_have_openais_form(served: Served) -> None:
    status, _, body = await served.complete(model="nothing", prompt="x")
    assert status == 404
    assert json.loads(body)["error"]["code"] == "model_not_found"
    for bad in (
        {"model": BASE},
        {"model": BASE, "prompt": "x", "temperature": "warm"},
        {"model": BASE, "prompt": "x", "max_tokens": -1},
        {"model": BASE, "prompt": "x " * 2000, "max_tokens": 1},
        {"prompt": "x"},
    ):
        status, kind, body = await served.complete(**bad)
        error = json.loads(body)["error"]
        assert (status, kind, error["type"]) == (400, "application/json", "invalid_request_error"), body
    status, _, body = await served.complete(1, model=RED, messages=[], stream=True)
    assert status == 400


async def test_a_caller_that_goes_away_aborts_the_generation(served: Served) -> None:
    for model in (BASE, RED):
        for stream in (True, False):
            call = served.call(model=model, prompt="Count: 1 2 3", max_tokens=900, ignore_eos=True, stream=stream)
            reading = asyncio.ensure_future(call.read())
            for _ in range(100):
                await asyncio.sleep(0.05)
                if served.core.llm.get_num_unfinished_requests():
                    break
            call.cancel()
            reading.cancel()
            for _ in range(100):
                if not served.core.llm.get_num_unfinished_requests():
                    break
                await asyncio.sleep(0.1)
            assert served.core.llm.get_num_unfinished_requests() == 0


async def test_an_adapter_is_attached_and_detached_by_its_operator(served: Served) -> None:
    from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2

    status, _, _ = await served.complete(model=GREEN, prompt="x", max_tokens=1)
    assert status == 404
    adapter = inference_pb2.AdapterConnection(
        name=GREEN, coprocessor_endpoint="none", attestor_endpoint="none", publisher_keys=["none"]
    )
    operator = (("authorization", f"Bearer {ADMIN}"),)
    request = inference_pb2.AttachAdapterRequest(adapter=adapter)
    with pytest.raises(grpc.RpcError) as caught:
        await served.stub.AttachAdapter(request)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    attached = await served.stub.AttachAdapter(request, metadata=operator)
    assert (attached.model.name, attached.model.parent) == (GREEN, BASE)
    tokens = await served.tokens(GREEN, PROMPTS[1])
    assert tokens != await served.tokens(BASE, PROMPTS[1])
    # Beam search asks the engine again and again; the adapter stays until it is done.
    beams = asyncio.create_task(
        served.complete(model=GREEN, prompt=PROMPTS[1], n=2, use_beam_search=True, max_tokens=12, temperature=0)
    )
    await asyncio.sleep(1)
    detaching = inference_pb2.DetachAdapterRequest(name=GREEN)
    await served.stub.DetachAdapter(detaching, metadata=operator)
    assert beams.done()
    status, _, body = await beams
    assert status == 200, body
    status, _, _ = await served.complete(model=GREEN, prompt="x", max_tokens=1)
    assert status == 404


async def test_status_and_models(served: Served) -> None:
    from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2

    models = (await served.stub.ListModels(inference_pb2.ListModelsRequest())).models
    assert [(m.name, m.parent, m.answered_by_adapter) for m in models] == [
        (BASE, "", False),
        (RED, BASE, False),
        (BLUE, BASE, False),
    ]
    status = await served.stub.GetStatus(inference_pb2.GetStatusRequest())
    assert (status.model, [a.name for a in status.adapters]) == (BASE, [RED, BLUE])
    worker = await served.core.status()
    assert worker["hooked_layers"] == 120
    assert worker["calls"] > 0


async def test_the_library_route_raises_the_same_error(served: Served) -> None:
    from vllm import SamplingParams

    from tensorguard.errors import DeltaUnavailableError, InvalidInputError

    served.failing(RED).touch()
    try:
        with pytest.raises(DeltaUnavailableError):
            async for _ in served.core.route(RED).generate({"prompt": "x"}, SamplingParams(max_tokens=4), "a"):
                pytest.fail("a token left without its delta")
    finally:
        served.failing(RED).unlink()
    forged = SamplingParams(max_tokens=4, extra_args={"tensafe_adapter": RED})
    with pytest.raises(InvalidInputError):
        await anext(served.core.route(None).generate({"prompt": "x"}, forged, "b"))
