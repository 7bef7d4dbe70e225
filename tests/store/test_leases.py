"""Budgets are never overspent, by whatever processes share the database."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tensorguard.evidence.release import Release
from tensorguard.store.database import Database
from tensorguard.store.leases import tokens_granted

BUDGET = 1000
SPENDER = """
import sys
from pathlib import Path
from tensorguard.errors import BudgetExhaustedError
from tensorguard.evidence.release import Release
from tensorguard.store.database import Database
from tensorguard.store.leases import Limits, open_lease

url, name = sys.argv[1:]
database, got = Database.open(url, Path(".")), 0
release, limits = Release("t", "p", 1, bytes(32)), Limits(300, 7, 1000, 2**40)
for number in range(10_000):
    try:
        with database.writing() as connection:
            got += open_lease(
                connection, release, token_id=f"{name}-{number}", holder=name, tokens_wanted=7, limits=limits, now=1
            ).tokens_granted
    except BudgetExhaustedError:
        break
print(got)
"""


def test_processes_together_spend_the_budget_exactly(database: Database, database_url: str, tmp_path: Path) -> None:
    spenders = [
        subprocess.Popen([sys.executable, "-c", SPENDER, database_url, name], stdout=subprocess.PIPE, text=True)
        for name in ("a", "b", "c")
    ]
    spent = [int(spender.communicate(timeout=120)[0]) for spender in spenders]
    assert sum(spent) == BUDGET
    with database.reading() as connection:
        assert tokens_granted(connection, Release("t", "p", 1, bytes(32))) == BUDGET


@pytest.mark.parametrize("sequence", [1, 2])
def test_nothing_is_granted_at_first(database: Database, sequence: int) -> None:
    with database.reading() as connection:
        assert tokens_granted(connection, Release("t", "p", sequence, bytes(32))) == 0
