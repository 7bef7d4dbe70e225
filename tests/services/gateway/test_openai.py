"""The unmodified OpenAI client against the gateway."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from services.gateway.server import running_gateway
from services.gateway.settings import GatewaySettings
from tensorguard.rpc.authorisation import bearer
from tests.services.gateway.conftest import Site, Start
from tests.support.fake_inference import WORDS, running_fake

HELLO = [{"role": "user", "content": "Hello!"}]
TEXT = "".join(WORDS)


def client_of(site: Site, key: str | None = None) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{site.url}/v1", api_key=key or site.key, max_retries=0)


async def test_chat_completion(start: Start) -> None:
    async with start() as site, client_of(site) as client:
        answer = await client.chat.completions.create(model="adapter", messages=HELLO)
        assert answer.choices[0].message.content == TEXT
        request = site.fake.requests[0]
        assert request.tenant == "tenant-one"
        assert len(request.request_id) == 24


async def test_streamed_chat_completion(start: Start) -> None:
    async with start() as site, client_of(site) as client:
        stream = await client.chat.completions.create(model="adapter", messages=HELLO, stream=True)
        assert [chunk.choices[0].delta.content async for chunk in stream] == WORDS


async def test_completion_streamed_and_not(start: Start) -> None:
    async with start() as site, client_of(site) as client:
        whole = await client.completions.create(model="org/base", prompt="Hello")
        assert whole.choices[0].text == TEXT
        stream = await client.completions.create(model="org/base", prompt="Hello", stream=True)
        assert [chunk.choices[0].text async for chunk in stream] == WORDS


async def test_body_is_forwarded_byte_for_byte(start: Start) -> None:
    body = '{ "model": "adapter",\n "x":  1.00, "messages": [{"role":"user","content":"\\u00e9 é"}] }'.encode()
    async with start() as site, httpx.AsyncClient() as client:
        headers = {"authorization": f"Bearer {site.key}", "content-type": "application/json; charset=utf-8"}
        answer = await client.post(f"{site.url}/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 200
        assert site.fake.requests[0].body == body


async def test_models_and_one_model_with_a_slash(start: Start) -> None:
    async with start() as site, client_of(site) as client:
        models = {model.id: model async for model in client.models.list()}
        assert set(models) == {"org/base", "adapter"}
        assert models["adapter"].to_dict()["parent"] == "org/base"
        one = await client.models.retrieve("org/base")
        assert one.id == "org/base" and one.created == 1700000000
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nothing")


async def test_a_key_sees_and_uses_only_its_models(start: Start) -> None:
    async with start() as site, client_of(site, site.limited_key) as client:
        assert [model.id async for model in client.models.list()] == ["adapter"]
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("org/base")
        with pytest.raises(openai.NotFoundError) as refused:
            await client.chat.completions.create(model="org/base", messages=HELLO)
        assert refused.value.code == "model_not_found"
        assert site.fake.requests == []
        await client.chat.completions.create(model="adapter", messages=HELLO)
        assert site.fake.requests[0].tenant == "tenant-two"


async def test_a_name_given_twice_cannot_pass_the_model_check(start: Start) -> None:
    async with start() as site, httpx.AsyncClient() as client:
        headers = {"authorization": f"Bearer {site.limited_key}", "content-type": "application/json"}
        for body in (
            b'{"model": "org/base", "model": "adapter"}',
            b'{"model": "adapter", "mod\\u0065l": "org/base"}',
        ):
            answer = await client.post(f"{site.url}/v1/chat/completions", content=body, headers=headers)
            assert answer.status_code == 400, answer.text
        assert site.fake.requests == []


@pytest.mark.parametrize("key", ["wrong", "tsk-" + "0" * 64, "x" * 5000, "\xff"])
async def test_wrong_keys(start: Start, key: str) -> None:
    async with start() as site, httpx.AsyncClient() as client:
        headers = {"authorization": f"Bearer {key}".encode("latin-1")}
        answer = await client.get(f"{site.url}/v1/models", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.json()["error"]["type"] == "authentication_error"
        assert key[:20] not in answer.text


async def test_missing_key_is_the_clients_authentication_error(start: Start) -> None:
    async with start() as site:
        async with client_of(site, "nonsense") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{site.url}/v1/models")).status_code == 401
            assert (await http.get(f"{site.url}/v1/models", headers={"authorization": "Basic x"})).status_code == 401


async def test_upstream_refusals_keep_their_status_and_body(start: Start) -> None:
    async with start() as site, client_of(site) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="bad-request", messages=HELLO)
        assert "max_tokens is too large" in refused.value.message


@pytest.mark.parametrize(
    ("model", "status", "code", "retry_after"),
    [
        ("unavailable", 503, "unavailable", "2"),
        ("delta", 503, "delta_unavailable", "2"),
        ("half", 503, "delta_unavailable", "2"),
        ("lease", 503, "lease_expired", "30"),
        ("budget", 429, "budget_exhausted", None),
        ("no-head", 500, "internal", None),
    ],
)
async def test_upstream_failures(start: Start, model: str, status: int, code: str, retry_after: str | None) -> None:
    async with start() as site, client_of(site) as client:
        with pytest.raises(openai.APIStatusError) as failed:
            await client.chat.completions.create(model=model, messages=HELLO)
        assert (failed.value.status_code, failed.value.code) == (status, code)
        assert failed.value.response.headers.get("retry-after") == retry_after


async def test_a_defect_upstream_tells_nothing(start: Start) -> None:
    async with start() as site, client_of(site) as client:
        with pytest.raises(openai.InternalServerError) as failed:
            await client.chat.completions.create(model="defect", messages=HELLO)
        assert "secret" not in failed.value.response.text


async def test_a_stream_that_fails_raises_in_the_client(start: Start) -> None:
    async with start() as site, client_of(site) as client:
        stream = await client.chat.completions.create(model="half", messages=HELLO, stream=True)
        seen = []
        with pytest.raises(openai.APIError) as failed:
            async for chunk in stream:
                seen.append(chunk.choices[0].delta.content)
        assert seen == WORDS[:1]
        assert failed.value.code == "delta_unavailable"


@pytest.mark.parametrize("model", ["slow", "slow-stream"])
async def test_a_client_that_leaves_cancels_the_call(start: Start, model: str) -> None:
    async with start() as site, client_of(site) as client:
        stream = model == "slow-stream"

        async def ask() -> None:
            answer = await client.chat.completions.create(model=model, messages=HELLO, stream=stream)
            if stream:
                async for _ in answer:
                    pass

        task = asyncio.create_task(ask())
        await asyncio.wait_for(site.fake.called.wait(), 5)
        await asyncio.sleep(0.05)
        assert not site.fake.cancelled.is_set()
        task.cancel()
        await asyncio.wait_for(site.fake.cancelled.wait(), 5)


async def test_an_unreachable_inference_service(start: Start) -> None:
    async with start(inference="127.0.0.1:1") as site, client_of(site) as client:
        with pytest.raises(openai.InternalServerError) as failed:
            await client.chat.completions.create(model="adapter", messages=HELLO)
        assert failed.value.status_code == 503
        assert failed.value.response.headers["x-tensafe-evidence"] == "unknown"
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{site.url}/health")).status_code == 503


async def test_the_gateways_secret_reaches_the_inference_service(start: Start, tmp_path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef\n")
    async with running_fake(bearer("0123456789abcdef")) as (_, address):
        options = {"listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0", "inference": address}
        for file, status in ((secret, 200), (None, 503)):
            settings = GatewaySettings(**options, inference_secret_file=file)
            async with running_gateway(settings) as gateway, httpx.AsyncClient() as http:
                # The inference service's refusal of the gateway is not the user's 401.
                assert (await http.get(f"http://{gateway.http_address}/v1/models")).status_code == status
