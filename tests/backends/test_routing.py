"""A model name's route binds every request to its adapter, and only the server can."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams

from tensorguard.backends.vllm.failures import DELTA_UNAVAILABLE, ENDINGS, DeltaUnavailable
from tensorguard.backends.vllm.routing import ModelRoute, ServedAdapter
from tensorguard.backends.vllm.rows import ADAPTER_ARGUMENT
from tensorguard.errors import InvalidInputError


def output(text: str, finish: str | None = None, stop: str | None = None) -> RequestOutput:
    choice = CompletionOutput(0, text, [1], None, None, finish_reason=finish, stop_reason=stop)
    return RequestOutput("r", None, [1], None, [choice], finished=finish is not None)


class Engine:
    vllm_config = model_config = renderer = input_processor = None

    def __init__(self, *outputs: RequestOutput) -> None:
        self.outputs = outputs
        self.calls: list[tuple[Any, SamplingParams]] = []
        self.closed = False

    async def generate(
        self, prompt: Any, parameters: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        self.calls.append((prompt, parameters))
        try:
            for item in self.outputs:
                yield item
        finally:
            self.closed = True


def adapter() -> ServedAdapter:
    return ServedAdapter("red", "ab" * 32, 1)


async def run(route: ModelRoute, prompt: Any = None, **parameters: Any) -> list[str]:
    generated = route.generate(prompt or {"prompt": "x"}, SamplingParams(**parameters), "r")
    return [item.outputs[0].text async for item in generated]


async def test_an_adapters_requests_carry_key_and_salt() -> None:
    engine, red = Engine(output("a"), output("b", "stop")), adapter()
    parameters, prompt = SamplingParams(extra_args={"other": 1}), {"prompt_token_ids": [1]}
    route = ModelRoute(engine, red)  # type: ignore[arg-type]
    assert [item.outputs[0].text async for item in route.generate(prompt, parameters, "r")] == ["a", "b"]
    sent, bound = engine.calls[0]
    assert sent == {"prompt_token_ids": [1], "cache_salt": red.cache_salt}
    assert bound.extra_args == {"other": 1, ADAPTER_ARGUMENT: "red@" + "ab" * 8}
    assert parameters.extra_args == {"other": 1}, "the caller's parameters serve other requests too"
    assert "cache_salt" not in prompt


def test_only_one_release_between_two_failures_has_a_salt() -> None:
    red = adapter()
    others = [
        ServedAdapter("red", "cd" * 32, 2),
        ServedAdapter("blue", "ef" * 32, 1),
        ServedAdapter("red", "ab" * 32, 1, 1),
    ]
    assert red.cache_salt == adapter().cache_salt
    assert len({served.cache_salt for served in (red, *others)}) == 4


async def test_the_base_models_requests_stay_as_they_are() -> None:
    engine = Engine(output("a", "stop"))
    await run(ModelRoute(engine, None))  # type: ignore[arg-type]
    prompt, parameters = engine.calls[0]
    assert (prompt, parameters.extra_args) == ({"prompt": "x"}, None)


@pytest.mark.parametrize("red", [None, adapter()])
@pytest.mark.parametrize(
    ("prompt", "parameters"),
    [
        ({"prompt": "x", "cache_salt": "s"}, {}),
        ({"prompt": "x"}, {"extra_args": {ADAPTER_ARGUMENT: "red"}}),
        ("x", {}),
    ],
)
async def test_callers_choose_neither_adapter_nor_salt(
    red: ServedAdapter | None, prompt: Any, parameters: dict[str, Any]
) -> None:
    engine = Engine(output("a", "stop"))
    with pytest.raises(InvalidInputError):
        await run(ModelRoute(engine, red), prompt, **parameters)  # type: ignore[arg-type]
    assert not engine.calls


async def test_a_missing_delta_ends_the_request_and_moves_the_epoch() -> None:
    engine, red = Engine(output("a"), output("WRONG", "error", DELTA_UNAVAILABLE), output("b")), adapter()
    before, received = red.cache_salt, []
    with pytest.raises(DeltaUnavailable):
        async for item in ModelRoute(engine, red).generate({"prompt": "x"}, SamplingParams(), "r"):  # type: ignore[arg-type]
            received.append(item.outputs[0].text)
    assert received == ["a"]
    assert engine.closed
    assert red.cache_salt != before


@pytest.mark.parametrize("reason", ENDINGS)
async def test_each_reason_has_its_error(reason: str) -> None:
    red = adapter()
    with pytest.raises(ENDINGS[reason]):
        await run(ModelRoute(Engine(output("WRONG", "error", reason)), red))  # type: ignore[arg-type]
    assert red.epoch == 1


async def test_one_failed_choice_fails_the_request() -> None:
    """n > 1: vLLM's children of a request are requests of their own."""
    engine, red = Engine(output("a"), output("b", "stop")), adapter()
    failed = CompletionOutput(1, "", [], None, None, finish_reason="error", stop_reason=DELTA_UNAVAILABLE)
    engine.outputs[1].outputs.append(failed)
    with pytest.raises(DeltaUnavailable):
        await run(ModelRoute(engine, red), n=2)  # type: ignore[arg-type]
    assert engine.closed and red.epoch == 1


async def test_a_users_stop_string_is_not_a_failure() -> None:
    engine, red = Engine(output("a", "stop", DELTA_UNAVAILABLE)), adapter()
    assert await run(ModelRoute(engine, red)) == ["a"]  # type: ignore[arg-type]
    assert red.epoch == 0


async def test_leaving_the_loop_closes_the_engines_generator() -> None:
    engine = Engine(output("a"), output("b"))
    generated = ModelRoute(engine, adapter()).generate({"prompt": "x"}, SamplingParams(), "r")  # type: ignore[arg-type]
    await anext(generated)  # type: ignore[arg-type]
    await generated.aclose()  # type: ignore[attr-defined]
    assert engine.closed


def test_a_route_offers_nothing_that_bypasses_it() -> None:
    route = ModelRoute(Engine(), adapter())  # type: ignore[arg-type]
    for name in ("encode", "add_lora", "collective_rpc", "add_request", "reset_prefix_cache"):
        assert not hasattr(route, name)
