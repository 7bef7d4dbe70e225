#!/usr/bin/env bash
# Prepare .venv-fuzz, the environment of `make fuzz`: TenSafe without vLLM, and atheris.
#   PYTHON=python3.11   the interpreter to build the environment with; atheris has wheels for some versions only
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv-fuzz
. scripts/environment.sh

python=$(command -v "${PYTHON:-python3.11}") || fail "no ${PYTHON:-python3.11} on PATH: set PYTHON to a Python that atheris has a wheel for"
up_to_date && exit 0
create_environment python3-venv
"$VENV/bin/python" -m pip install -c constraints.txt -e '.[gateway,test,fuzz]' || fail "installation failed (atheris is built with clang where it has no wheel); the lines above say why"
finish
