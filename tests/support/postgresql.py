"""A PostgreSQL server of the test's own, where its programs are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def postgresql_programs() -> Path | None:
    """Folder of initdb and pg_ctl, None where there is none."""
    found = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    return None if found is None else Path(found).resolve().parent


@contextmanager
def running_postgresql(programs: Path) -> Iterator[str]:
    """URL of an empty database on a Unix socket. The server does not run as root, so root runs it as another user."""
    user = 65534 if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="tensafe-pg-") as folder:
        if user is not None:
            os.chown(folder, user, user)
        data = Path(folder) / "data"
        options: dict[str, object] = {"user": user, "group": user, "extra_groups": []} if user is not None else {}

        def call(*command: str) -> None:
            subprocess.run(command, check=True, capture_output=True, cwd=folder, env={"PATH": "/usr/bin"}, **options)  # type: ignore[call-overload]

        call(str(programs / "initdb"), "-D", str(data), "-U", "tensafe", "-A", "trust", "-E", "UTF8", "--no-sync")
        settings = f"-c fsync=off -c listen_addresses= -c unix_socket_directories={folder}"
        call(str(programs / "pg_ctl"), "-D", str(data), "-o", settings, "-l", f"{folder}/log", "-w", "start")
        try:
            yield f"postgresql://tensafe@/postgres?host={folder}"
        finally:
            call(str(programs / "pg_ctl"), "-D", str(data), "-m", "fast", "-w", "stop")


def new_database(server: str) -> str:
    """URL of an empty database of its own on the server."""
    import sqlalchemy  # not at the top: every test's configuration imports this module

    name = f"test_{uuid.uuid4().hex}"
    engine = sqlalchemy.create_engine(
        server.replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return server.replace("/postgres?", f"/{name}?")
