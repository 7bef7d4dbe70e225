"""The demo's comparison and its last line."""

from __future__ import annotations

from types import SimpleNamespace

from tensorguard.cli.demo import Answer, Comparison, compare, summary

REFERENCE = {"token_ids": [1, 2, 3], "gaps": [0.5, 0.25, 0.125]}


def test_equal_tokens_are_identical() -> None:
    assert compare(Answer("", [1, 2, 3], 0), REFERENCE) == Comparison(True, None, None)


def test_the_first_difference_has_the_references_logit_gap() -> None:
    assert compare(Answer("", [1, 9, 3], 0), REFERENCE) == Comparison(False, 1, 0.25)


def test_a_shorter_or_longer_answer_is_not_identical() -> None:
    assert compare(Answer("", [1, 2], 0), REFERENCE) == Comparison(False, 2, 0.125)
    assert compare(Answer("", [1, 2, 3, 4], 0), REFERENCE) == Comparison(False, 3, None)
    assert not compare(Answer("", [], 0), REFERENCE).identical


def test_summary() -> None:
    adapter = SimpleNamespace(coprocessor_evidence_kind="simulated", bytes_up=10, bytes_down=5, calls=2)
    seconds = ("encrypt_seconds", "wait_seconds", "evaluate_seconds", "decrypt_seconds")
    vars(adapter).update(dict.fromkeys(seconds, 1.0), failed_calls=0)
    operations = SimpleNamespace(rotations=0, key_switches=0, evaluation_key_bytes=0)
    inference = SimpleNamespace(evidence_kind="simulated", adapters=[adapter])
    coprocessor = SimpleNamespace(evidence_kind="simulated", operations=operations)
    answers = [Answer("", [1], 1.0), Answer("", [2], 1.0)]
    same = [Comparison(True, None, None)] * 2
    numbers = summary(inference, coprocessor, [Answer("", [3], 1.0)] * 2, answers, same)
    expected = {"identical": True, "prompts": 2, "evidence": "simulated", "he_bytes_up": 10, "rotations": 0}
    assert expected.items() <= numbers.items()
    assert numbers["adapter_differs_from_base"]
    # One answer that equals the base model's, or one that differs from the reference, is enough to say no.
    assert not summary(inference, coprocessor, [answers[0]] * 2, answers, same)["adapter_differs_from_base"]
    broken = [same[0], Comparison(False, 3, 0.001)]
    assert not summary(inference, coprocessor, answers, answers, broken)["identical"]
