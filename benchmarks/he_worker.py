"""One engine of `benchmarks/he_core.py`, in the interpreter it needs: cases as JSON lines in, records out.

The first line out is {"versions": ...} or {"unavailable": reason}; then for every case {"record": ...} or
{"skipped": reason}.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from he_peers.case import Engine, History, Skipped, from_json, measure

# By name: the module, how to make the engine of it, the packages whose versions are told.
ENGINES: dict[str, tuple[str, Callable[[Any], Engine], tuple[str, ...]]] = {
    "tensafe-cpu": ("tensafe", lambda m: m.TensafeCpu(), ("numba", "numpy")),
    "tensafe-cpu (pools)": ("tensafe", lambda m: m.TensafeCpuPools(), ("numba", "numpy")),
    "tensafe-openfhe": ("tensafe", lambda m: m.TensafeOpenfhe(), ("openfhe", "numba")),
    "openfhe-rotate-and-sum": ("openfhe_slots", lambda m: m.RotateAndSum(m.LARGE), ("openfhe",)),
    "openfhe-bsgs": ("openfhe_slots", lambda m: m.BabyStepGiantStep(m.LARGE), ("openfhe",)),
    "openfhe-bsgs-n4096": ("openfhe_slots", lambda m: m.BabyStepGiantStep(m.SMALL), ("openfhe",)),
    "openfhe-columns": ("openfhe_columns", lambda m: m.ColumnPacked(), ("openfhe",)),
    "openfhe-coefficients": ("openfhe_coefficients", lambda m: m.CoefficientPacked(), ("openfhe",)),
    "tenseal-mm": ("tenseal_matrix", lambda m: m.TensealMatrix(), ("tenseal",)),
}


def main() -> None:
    # What libraries print must not get between the lines.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    name, core = sys.argv[1], int(sys.argv[2])
    os.sched_setaffinity(0, {core})
    module, make, packages = ENGINES[name]
    try:
        engine = make(importlib.import_module(f"he_peers.{module}"))
        engine.name = name
    except Exception as error:
        answer(unavailable=f"{type(error).__name__}: {error}")
        return
    python = "{}.{}.{}".format(*sys.version_info[:3])
    answer(versions={"python": python, **{package: importlib.metadata.version(package) for package in packages}})
    history = History()
    for line in sys.stdin:
        try:
            answer(record=measure(engine, from_json(json.loads(line)), history))
        except Skipped as reason:
            answer(skipped=str(reason))


if __name__ == "__main__":
    main()
