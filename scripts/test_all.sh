#!/usr/bin/env bash
# Every test there is, and a dated report of it in reports/test-all.txt (run by `make test-all`).
set -uo pipefail
cd "$(dirname "$0")/.."
LOG=.cache/test-all.log
REPORT=reports/test-all.txt
mkdir -p .cache reports

.venv/bin/python -m pytest -rs --durations=15 "$@" 2>&1 | tee "$LOG"
code=${PIPESTATUS[0]}
{
  echo "make test-all, $(date -u '+%Y-%m-%d %H:%M UTC')"
  echo "commit $(git rev-parse --short HEAD)$(git diff --quiet HEAD || echo ' with local changes')"
  echo "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(nproc) processors, $(.venv/bin/python --version)"
  echo "exit code $code"
  echo
  echo "tests by folder (passed, skipped, failed):"
  grep -oE '^tests/[^ ]+\.py [.sFExX]+' "$LOG" | awk '{ split($1, p, "/"); f = p[2] ~ /\.py$/ ? "(top)" : p[2]
      passed[f] += gsub(/\./, "", $2); skipped[f] += gsub(/s/, "", $2); failed[f] += length($2); seen[f] = 1 }
    END { for (f in seen) printf "  %-16s %5d %5d %5d\n", f, passed[f], skipped[f], failed[f] }' | sort
  echo
  sed -n '/slowest 15 durations/,$p' "$LOG"
} >"$REPORT"
echo "report: $REPORT"
exit "$code"
