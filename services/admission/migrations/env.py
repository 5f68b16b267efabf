"""Alembic's entry: the connection comes from services.admission.database."""

from alembic import context

from services.admission.tables import metadata

if context.config.attributes.get("connection") is None:
    raise SystemExit("run migrations through services.admission.database")
context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
