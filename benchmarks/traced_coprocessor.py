"""The coprocessor with clocks in it; for benchmarks/step_trace.py. Its spans go to the file TRACE_FILE when it ends."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from benchmarks.timeline import COPROCESSOR, Recorder
from services.he_lora.__main__ import main

if __name__ == "__main__":
    recorder = Recorder(on=True)
    recorder.install(COPROCESSOR)
    try:
        code = main()
    finally:
        Path(os.environ["TRACE_FILE"]).write_text(json.dumps(recorder.take()))
    sys.exit(code)
