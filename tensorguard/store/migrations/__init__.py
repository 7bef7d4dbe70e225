"""Alembic migrations of the attestor's database. They are in the wheel and run when the database is opened."""
