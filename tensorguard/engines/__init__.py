"""Engines: what evaluates encrypted requests at the coprocessor. See docs/engines.md."""

from __future__ import annotations

from tensorguard.engines.interface import EncodedWeights, Engine, EngineOptions, RequestEvaluator
from tensorguard.engines.registry import BACKENDS, load_engine

__all__ = ["BACKENDS", "EncodedWeights", "Engine", "EngineOptions", "RequestEvaluator", "load_engine"]
