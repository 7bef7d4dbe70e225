#!/usr/bin/env bash
# Prepare .venv-peers, where `make bench-he` runs OpenFHE and TenSEAL. Their wheels are for CPython 3.10: without one
# this says so, prepares nothing and succeeds, and the benchmark lists them as not run.
#   PYTHON310=/path/to/python3.10   the interpreter to build the environment with
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv-peers
TENSEAL=tenseal==0.3.16
. scripts/environment.sh

need_python310 "OpenFHE and TenSEAL are not measured"
up_to_date && exit 0
create_environment python3.10-venv
# TenSafe too: its own openfhe backend is measured here.
"$VENV/bin/python" -m pip install -c constraints.txt -e '.[openfhe]' "$TENSEAL" || fail "installation failed; the lines above say why"
for module in openfhe tenseal; do
  "$VENV/bin/python" -c "import $module" || say "$module is installed but does not load here: it will be listed as not run"
done
finish
