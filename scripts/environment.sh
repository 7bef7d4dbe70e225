# What the scripts that prepare a virtual environment share. Sourced in the root of the checkout by a script that sets
# VENV, the environment's folder, and python, the interpreter to build it with.
# shellcheck shell=bash disable=SC2034,SC2154

say() { printf '%s\n' "==> $*"; }
fail() { printf '%s\n' "error: $*" >&2; exit 1; }

# Sets python. Without a Python 3.10 the script ends here, with success: need_python310 WHAT-IS-LEFT-OUT
need_python310() {
  python=$(scripts/python310.sh)
  [ -z "$python" ] || return 0
  rm -rf "$VENV" # one left from an interpreter that is gone
  say "No Python 3.10 on PATH or in pyenv: $1 (pyenv install 3.10, or set PYTHON310)"
  exit 0
}

# Everything that decides what is in the environment.
fingerprint() {
  { "$python" -c 'import sys; print(sys.version)'; cat pyproject.toml constraints.txt scripts/environment.sh "scripts/${0##*/}"; } |
    sha256sum | cut -d' ' -f1
}

# Whether a run before this one has prepared just this environment.
up_to_date() {
  [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/.tensafe-setup" 2>/dev/null)" = "$(fingerprint)" ] && say "$VENV is up to date"
}

# An empty environment in the place of what there was: create_environment DEBIAN-PACKAGE
create_environment() {
  say "Creating $VENV with $("$python" --version)"
  rm -rf "$VENV"
  "$python" -m venv "$VENV" || fail "$VENV could not be created: on Debian and Ubuntu, apt-get install $1"
}

# The last step: from now on the environment is up to date.
finish() {
  fingerprint > "$VENV/.tensafe-setup"
  say "Ready: $VENV"
}
