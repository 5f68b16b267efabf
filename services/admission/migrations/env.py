"""Alembic's entry: the connection comes from services.admission.store.database."""

from alembic import context

from services.admission.store.tables import metadata

if context.config.attributes.get("connection") is None:
    raise SystemExit("run migrations through services.admission.store.database")
context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
