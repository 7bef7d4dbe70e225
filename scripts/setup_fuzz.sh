#!/usr/bin/env bash
# Prepare .venv-fuzz, the environment of `make fuzz`: TenSafe without vLLM, and atheris.
#   PYTHON=python3.11   the interpreter to build the environment with; atheris has wheels for some versions only
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv-fuzz
STAMP="$VENV/.tensafe-setup"

say() { printf '%s\n' "==> $*"; }
fail() { printf '%s\n' "error: $*" >&2; exit 1; }

python=$(command -v "${PYTHON:-python3.11}") || fail "no ${PYTHON:-python3.11} on PATH: set PYTHON to a Python that atheris has a wheel for"
wanted=$({ "$python" -c 'import sys; print(sys.version)'; cat pyproject.toml constraints.txt scripts/setup_fuzz.sh; } | sha256sum | cut -d' ' -f1)
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ] && [ -x "$VENV/bin/python" ]; then
  say "$VENV is up to date"
  exit 0
fi
say "Creating $VENV with $("$python" --version)"
rm -rf "$VENV"
"$python" -m venv "$VENV" || fail "$VENV could not be created: on Debian and Ubuntu, apt-get install python3-venv"
"$VENV/bin/python" -m pip install -c constraints.txt -e '.[gateway,test,fuzz]' || fail "installation failed (atheris is built with clang where it has no wheel); the lines above say why"
echo "$wanted" > "$STAMP"
say "Ready: $VENV"
