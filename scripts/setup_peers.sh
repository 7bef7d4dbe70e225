#!/usr/bin/env bash
# Prepare .venv-peers, where `make bench-he` runs OpenFHE and TenSEAL. Their wheels are for CPython 3.10: without one
# this says so, prepares nothing and succeeds, and the benchmark lists them as not run.
#   PYTHON310=/path/to/python3.10   the interpreter to build the environment with
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv-peers
STAMP="$VENV/.tensafe-setup"
TENSEAL=tenseal==0.3.16

say() { printf '%s\n' "==> $*"; }
fail() { printf '%s\n' "error: $*" >&2; exit 1; }

python=$(scripts/python310.sh)
if [ -z "$python" ]; then
  rm -rf "$VENV" # one left from an interpreter that is gone
  say "No Python 3.10 on PATH or in pyenv: OpenFHE and TenSEAL are not measured (pyenv install 3.10, or set PYTHON310)"
  exit 0
fi
wanted=$({ "$python" -c 'import sys; print(sys.version)'; cat pyproject.toml constraints.txt scripts/setup_peers.sh; } | sha256sum | cut -d' ' -f1)
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ] && [ -x "$VENV/bin/python" ]; then
  say "$VENV is up to date"
  exit 0
fi
say "Creating $VENV with $("$python" --version)"
rm -rf "$VENV"
"$python" -m venv "$VENV" || fail "$VENV could not be created: on Debian and Ubuntu, apt-get install python3.10-venv"
# TenSafe too: its own openfhe backend is measured here.
"$VENV/bin/python" -m pip install -c constraints.txt -e '.[openfhe]' "$TENSEAL" || fail "installation failed; the lines above say why"
for module in openfhe tenseal; do
  "$VENV/bin/python" -c "import $module" || say "$module is installed but does not load here: it will be listed as not run"
done
echo "$wanted" > "$STAMP"
say "Ready: $VENV"
