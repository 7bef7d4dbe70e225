"""Fuzzes one target with atheris: python -m fuzz.child TARGET LIBFUZZER-OPTIONS... CORPUS-FOLDER."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pkgutil
import sys
import tempfile
from pathlib import Path

import atheris
import structlog

from tensorguard import ckks

INSTRUMENTED = [
    "tensorguard.crypto.canonical",
    "tensorguard.evidence",
    "tensorguard.package",
    "tensorguard.session",
    "services.he_lora",
]


def main() -> None:
    name = sys.argv.pop(1)
    # Thousands of refusals are expected; a log line for each would only be slow.
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[lambda *_: ""])
    with contextlib.ExitStack() as stack:
        # numba cannot compile instrumented kernels: their package comes first, and its checks are done one by one.
        for module in pkgutil.iter_modules(ckks.__path__):
            importlib.import_module(f"{ckks.__name__}.{module.name}")
        for checked in (ckks.Evaluator, ckks.Plan):
            for function in filter(inspect.isfunction, vars(checked).values()):
                atheris.instrument_func(function)
        with atheris.instrument_imports(include=INSTRUMENTED):
            from fuzz.targets import open_target

            target = stack.enter_context(open_target(name, Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        corpus = Path(sys.argv[-1])
        for number, seed in enumerate(target.seeds):
            (corpus / f"seed-{number:02}").write_bytes(seed)
        atheris.Setup(sys.argv, target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
