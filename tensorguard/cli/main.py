"""Entry point of the `tensafe` command: finds the sub-command and turns errors into exit codes.

A sub-command is a module with a typer `app`, imported only when it is asked for: some import numba, and
`--help` should answer at once.

Exit codes: 0 done; 2 wrong command line, file or option; 3 refused (tampered, not allowed, another key or
model).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from tensorguard.errors import ConfigurationError, InvalidInputError, PolicyError, TenSafeError

EXIT_USAGE = 2
EXIT_REFUSED = 3

COMMANDS = {
    "pack": ("tensorguard.cli.pack", "seal a PEFT adapter into a .tssp package"),
    "inspect": ("tensorguard.cli.inspect", "show what a package says about itself; needs no key"),
    "verify": ("tensorguard.cli.verify", "check a package's signatures, hashes and contract"),
    "rekey": ("tensorguard.cli.rekey", "seal a package's adapter again, under a new content key and sequence"),
    "rotate": ("tensorguard.cli.rotate", "sign a package with a new publisher key"),
    "measure": ("tensorguard.cli.measure", "derive the measurements a policy needs"),
    "plan": ("tensorguard.cli.plan", "explain how a matrix or an adapter is cut into polynomials, and its memory"),
    "keys": ("tensorguard.cli.keys", "make keys that sign packages"),
    "evidence": ("tensorguard.cli.evidence", "appraise evidence without a server"),
    "attest": ("tensorguard.cli.attest", "collect evidence on this machine and show it"),
    "policy": ("tensorguard.cli.policy", "check a policy, and explain what it says about evidence"),
    "revoke": ("tensorguard.cli.revoke", "take back a package, version, key, workload, measurement or chip"),
    "attestor": ("tensorguard.cli.attestor", "look after an attestor's state: backup, restore, rotate-kek"),
    "audit": ("tensorguard.cli.audit", "check an attestor's audit log"),
}
"""Name -> (module, help line)."""


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code. An error is one line on standard error."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0 if arguments else EXIT_USAGE
    if name not in COMMANDS:
        sys.stderr.write(f"tensafe: there is no command {name!r:.60}; one of {', '.join(COMMANDS)}\n")
        return EXIT_USAGE
    app = importlib.import_module(COMMANDS[name][0]).app
    try:
        app(args=list(arguments[1:]), prog_name=f"tensafe {name}")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except TenSafeError as error:
        sys.stderr.write(f"tensafe: {error.message} [{error.reason}]\n")
        usage = isinstance(error, (ConfigurationError, InvalidInputError, PolicyError))
        return EXIT_USAGE if usage else EXIT_REFUSED
    return 0


def main() -> None:
    """Console script."""
    sys.exit(run(sys.argv[1:]))


def _help() -> str:
    lines = [f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tensafe COMMAND ...",
            "",
            "Private LoRA adapters for vLLM, computed under homomorphic encryption.",
            "",
            *lines,
            "",
            "tensafe COMMAND --help tells more. Exit codes: 0 done, 2 wrong usage or files, 3 refused.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
