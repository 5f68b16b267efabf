"""Datasets and adapters as the store knows them: rows, names, who still needs them. Synchronous, no gRPC."""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from engine.errors import AlreadyExistsError, ResourceInUseError
from muxtune.v1 import artifact_pb2, dataset_pb2
from services.admission.store.clock import now, timestamp
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import adapters, datasets
from services.admission.store.tables import tasks as tasks_table
from services.admission.store.tasks import UNFINISHED
from services.resource_names import task_of_adapter, tenant_of
from services.rpc.authorization import denied
from services.storage.artifact_layout import UploadedAdapterFolder, folder_of_manifest

_DATASET = PreparedStatement(sa.select(datasets).where(datasets.c.name == sa.bindparam("name")))


def dataset_row(connection: sa.Connection, name: str) -> Any:
    """Raises PermissionDeniedError where there is none (AIP-211)."""
    row = _DATASET.fetch_first(connection, name=name)
    if row is None:
        raise denied(name)
    return row


def existing_dataset(connection: sa.Connection, name: str, sha256: str) -> Any | None:
    """The dataset of that name if it holds these bytes, None if the name is free. Raises AlreadyExistsError."""
    row = _DATASET.fetch_first(connection, name=name)
    if row is not None and row.sha256 != sha256:
        raise AlreadyExistsError(f"{name} holds other bytes: choose another id, or delete it first", subject=name)
    return row


def insert_dataset(
    connection: sa.Connection, name: str, sha256: str, size_bytes: int, num_rows: int, shapes: Mapping[str, int]
) -> None:
    connection.execute(
        sa.insert(datasets).values(
            name=name,
            tenant=tenant_of(name),
            sha256=sha256,
            size_bytes=size_bytes,
            num_rows=num_rows,
            shapes=json.dumps(dict(shapes), sort_keys=True),
            created=now(),
        )
    )


def delete_dataset(connection: sa.Connection, name: str) -> None:
    """Raises ResourceInUseError."""
    dataset_row(connection, name)
    users = sa.select(tasks_table.c.name).where(tasks_table.c.dataset == name, tasks_table.c.state.in_(UNFINISHED))
    if user := connection.execute(users).scalars().first():
        raise ResourceInUseError(f"{name} is read by {user}: cancel it or wait for its end", subject=name)
    connection.execute(sa.delete(datasets).where(datasets.c.name == name))


def is_referenced(connection: sa.Connection, tenant: str, sha256: str) -> bool:
    return connection.execute(sa.select(datasets).filter_by(tenant=tenant, sha256=sha256)).first() is not None


def page(
    connection: sa.Connection, table: sa.Table, tenant: str, before: tuple[int, str] | None, limit: int
) -> Sequence[Any]:
    """Of the tenant's datasets or adapters, newest first, after the (created, name) of the page before."""
    columns = table.c
    query = sa.select(table).where(columns.tenant == tenant)
    query = query.order_by(columns.created.desc(), columns.name.desc())
    if before:
        query = query.where(sa.tuple_(columns.created, columns.name) < sa.tuple_(*map(sa.literal, before)))
    return connection.execute(query.limit(limit)).all()


def dataset_to_proto(row: Any) -> dataset_pb2.Dataset:
    return dataset_pb2.Dataset(
        name=row.name,
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        num_rows=row.num_rows,
        num_rows_by_shape=json.loads(row.shapes),
        create_time=timestamp(row.created),
    )


def adapter_row(connection: sa.Connection, name: str) -> Any:
    """Raises PermissionDeniedError where there is none (AIP-211)."""
    row = connection.execute(sa.select(adapters).where(adapters.c.name == name)).one_or_none()
    if row is None:
        raise denied(name)
    return row


def has_adapter(connection: sa.Connection, name: str) -> bool:
    return connection.execute(sa.select(adapters.c.name).where(adapters.c.name == name)).first() is not None


def existing_adapter(connection: sa.Connection, name: str, digest: str) -> Any | None:
    """The adapter of that name if it was uploaded with these contents, None if the name is free. Raises
    AlreadyExistsError if another adapter, or a task that will leave one, has it."""
    row = connection.execute(sa.select(adapters).where(adapters.c.name == name)).one_or_none()
    task = task_of_adapter(name)
    is_task = connection.execute(sa.select(tasks_table.c.name).where(tasks_table.c.name == task)).first()
    if is_task or (row is not None and not _is_upload_of(row, digest)):
        raise AlreadyExistsError(f"{name} is taken: choose another id", subject=name)
    return row


def new_upload(name: str, digest: str) -> str:
    """A folder for this upload alone, so that its files go with its row and with no other. It says when it was made: a
    sweep leaves alone what may not have its row yet."""
    return UploadedAdapterFolder(name, digest[:16], now(), secrets.token_hex(4)).key


def _is_upload_of(row: Any, digest: str) -> bool:
    upload = UploadedAdapterFolder.parse(row.manifest_key)
    return upload is not None and upload.digest == digest[:16]


def delete_adapter(connection: sa.Connection, name: str) -> str:
    """The folder that its files are in. Its task, if one left it, has none from then on. Raises ResourceInUseError."""
    row = adapter_row(connection, name)
    users = sa.select(tasks_table.c.name).where(
        tasks_table.c.tenant == row.tenant,
        tasks_table.c.initial_adapter_key == row.manifest_key,
        tasks_table.c.state.in_(UNFINISHED),
    )
    if user := connection.execute(users).scalars().first():
        raise ResourceInUseError(f"{user} starts from {name}: cancel it or wait for its end", subject=name)
    left_by = tasks_table.c.name == task_of_adapter(name)
    connection.execute(sa.update(tasks_table).where(left_by).values(adapter=""))
    connection.execute(sa.delete(adapters).where(adapters.c.name == name))
    return folder_of_manifest(row.manifest_key)


def insert_adapter(connection: sa.Connection, name: str, manifest_key: str, size_bytes: int) -> None:
    connection.execute(
        sa.insert(adapters).values(
            name=name,
            tenant=tenant_of(name),
            manifest_key=manifest_key,
            size_bytes=size_bytes,
            created=now(),
        )
    )


def adapter_to_proto(row: Any) -> artifact_pb2.Adapter:
    return artifact_pb2.Adapter(name=row.name, size_bytes=row.size_bytes, create_time=timestamp(row.created))
