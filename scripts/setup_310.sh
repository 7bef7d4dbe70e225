#!/usr/bin/env bash
# Prepare .venv310, the coprocessor's environment on Python 3.10 (run by `make test-coprocessor-310`). Without a Python 3.10
# it says so, prepares nothing and succeeds; a second run with nothing new takes no time.
#   PYTHON310=/path/to/python3.10   the interpreter to build the environment with
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv310
STAMP="$VENV/.tensafe-setup"

say() { printf '%s\n' "==> $*"; }
fail() { printf '%s\n' "error: $*" >&2; exit 1; }

python=$(scripts/python310.sh)
if [ -z "$python" ]; then
  rm -rf "$VENV" # one left from an interpreter that is gone
  say "No Python 3.10 on PATH or in pyenv: nothing is tested on it (pyenv install 3.10, or set PYTHON310)"
  exit 0
fi
wanted=$({ "$python" -c 'import sys; print(sys.version)'; cat pyproject.toml constraints.txt scripts/setup_310.sh; } | sha256sum | cut -d' ' -f1)
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ] && [ -x "$VENV/bin/python" ]; then
  say "$VENV is up to date"
  exit 0
fi
say "Creating $VENV with $("$python" --version)"
rm -rf "$VENV"
"$python" -m venv "$VENV" || fail "$VENV could not be created: on Debian and Ubuntu, apt-get install python3.10-venv"
# tests/test_architecture.py loads every service that runs without vLLM, the gateway too.
"$VENV/bin/python" -m pip install -c constraints.txt -e '.[gateway,openfhe,test]' || fail "installation failed; the lines above say why"
"$VENV/bin/python" -c 'import openfhe' || say "OpenFHE does not run here, as the line above says (docs/engines.md): its tests are skipped"
echo "$wanted" > "$STAMP"
say "Ready: $VENV"
