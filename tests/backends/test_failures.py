"""What crosses from the worker to the scheduler, and what users get."""

from __future__ import annotations

import pickle

import pytest
from vllm.exceptions import GenerationError
from vllm.v1.outputs import ModelRunnerOutput

from tensorguard.backends.vllm.failures import DELTA_UNAVAILABLE, ENDINGS, StepOutput, told_reason
from tensorguard.errors import TenSafeError
from tensorguard.rpc.status import error_of, http_status


def step() -> ModelRunnerOutput:
    return ModelRunnerOutput(
        req_ids=["a", "b", "c"],
        req_id_to_index={"a": 0, "b": 1, "c": 2},
        sampled_token_ids=[[1], [2], [3]],
    )


def test_tokens_of_failed_requests_do_not_cross() -> None:
    output = StepOutput.without(step(), {"b": DELTA_UNAVAILABLE})
    assert output.sampled_token_ids == [[1], [], [3]]
    again = pickle.loads(pickle.dumps(output))
    assert again.failed_requests == {"b": DELTA_UNAVAILABLE}
    assert again.req_id_to_index == step().req_id_to_index


def test_a_chunk_of_a_prompt_has_no_tokens_to_remove() -> None:
    empty = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    output = StepOutput.without(empty, {"a": DELTA_UNAVAILABLE})
    assert (output.sampled_token_ids, list(output.failed_requests)) == ([], ["a"])


@pytest.mark.parametrize(
    ("reason", "status"), [("delta_unavailable", 503), ("lease_expired", 503), ("budget_exhausted", 429)]
)
def test_the_errors_are_both_ours_and_vllms(reason: str, status: int) -> None:
    error = ENDINGS[reason]()
    assert isinstance(error, TenSafeError) and isinstance(error, GenerationError)
    assert (error.reason, http_status(error)) == (reason, status)
    assert type(error_of(error.reason, error.message)) in type(error).__mro__


def test_only_what_a_coprocessor_says_itself_has_a_reason_of_its_own() -> None:
    told = {kind.reason: told_reason(kind("x")) for kind in all_errors()}
    assert set(told) >= {"delta_unavailable", "unavailable", "invalid_input", "authentication", "token_expired"}
    own = {reason for reason, shown in told.items() if shown != DELTA_UNAVAILABLE}
    assert own == {"lease_expired", "budget_exhausted"}
    assert all(told[reason] == reason for reason in own)


def all_errors(base: type[TenSafeError] = TenSafeError) -> list[type[TenSafeError]]:
    children = [kind for kind in base.__subclasses__() if kind.__module__ == TenSafeError.__module__]
    return [*children, *(kind for child in children for kind in all_errors(child))]
