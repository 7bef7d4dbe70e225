#!/usr/bin/env bash
# Prepare .venv310, the coprocessor's environment on Python 3.10 (run by `make test-coprocessor-310`). Without a Python 3.10
# it says so, prepares nothing and succeeds; a second run with nothing new takes no time.
#   PYTHON310=/path/to/python3.10   the interpreter to build the environment with
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv310
. scripts/environment.sh

need_python310 "nothing is tested on it"
up_to_date && exit 0
create_environment python3.10-venv
# tests/test_architecture.py loads every service that runs without vLLM, the gateway too.
"$VENV/bin/python" -m pip install -c constraints.txt -e '.[gateway,openfhe,test]' || fail "installation failed; the lines above say why"
"$VENV/bin/python" -c 'import openfhe' || say "OpenFHE does not run here, as the line above says (docs/engines.md): its tests are skipped"
finish
