"""Datasets and adapters in the database: their rows, and which tasks still need them. Synchronous, no gRPC."""

import json
import secrets
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from engine.errors import AlreadyExistsError, ResourceInUseError
from muxtune.v1 import artifact_pb2, dataset_pb2
from services.admission.store.clock import now, to_timestamp
from services.admission.store.pages import Page, read_page
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import adapters, datasets
from services.admission.store.tables import tasks as tasks_table
from services.admission.store.tasks import UNFINISHED
from services.resource_names import task_of_adapter, tenant_of
from services.rpc.authorization import denied
from services.storage.artifact_layout import UploadedAdapterFolder, folder_of_manifest

_DATASET = PreparedStatement(sa.select(datasets).where(datasets.c.name == sa.bindparam("name")))


def get_dataset_row(connection: sa.Connection, name: str) -> Any:
    """Return the dataset's row. Raises PermissionDeniedError if the dataset does not exist (AIP-211)."""
    row = _DATASET.fetch_first(connection, name=name)
    if row is None:
        raise denied(name)
    return row


def find_same_dataset(connection: sa.Connection, name: str, sha256: str) -> Any | None:
    """Return the row of the dataset of that name, or None if the name is free. Raises AlreadyExistsError if the
    dataset holds other bytes."""
    row = _DATASET.fetch_first(connection, name=name)
    if row is not None and row.sha256 != sha256:
        raise AlreadyExistsError(
            f"{name} exists already with other bytes: choose another id, or delete it first", subject=name
        )
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
    """Delete the dataset's row. Raises ResourceInUseError while an unfinished task reads the dataset."""
    get_dataset_row(connection, name)
    users = sa.select(tasks_table.c.name).where(tasks_table.c.dataset == name, tasks_table.c.state.in_(UNFINISHED))
    if user := connection.execute(users).scalars().first():
        raise ResourceInUseError(f"{name} is read by {user}: cancel it or wait for its end", subject=name)
    connection.execute(sa.delete(datasets).where(datasets.c.name == name))


def is_referenced(connection: sa.Connection, tenant: str, sha256: str) -> bool:
    """Return whether a dataset of the tenant holds these bytes."""
    return connection.execute(sa.select(datasets).filter_by(tenant=tenant, sha256=sha256)).first() is not None


def list_referenced(connection: sa.Connection) -> set[tuple[str, str]]:
    """Return the (tenant, SHA-256) of all datasets."""
    return {(tenant, sha256) for tenant, sha256 in connection.execute(sa.select(datasets.c.tenant, datasets.c.sha256))}


def list_page(
    connection: sa.Connection, table: sa.Table, tenant: str, before: tuple[int, str] | None, size: int
) -> Page:
    """Return the tenant's datasets or adapters, newest first. `before`: (created, name) of the last one of the page
    before."""
    columns = table.c
    query = sa.select(table).where(columns.tenant == tenant)
    query = query.order_by(columns.created.desc(), columns.name.desc())
    if before:
        query = query.where(sa.tuple_(columns.created, columns.name) < sa.tuple_(*map(sa.literal, before)))
    return read_page(connection, query, size)


def dataset_to_proto(row: Any) -> dataset_pb2.Dataset:
    return dataset_pb2.Dataset(
        name=row.name,
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        num_rows=row.num_rows,
        num_rows_by_shape=json.loads(row.shapes),
        create_time=to_timestamp(row.created),
    )


def get_adapter_row(connection: sa.Connection, name: str) -> Any:
    """Return the adapter's row. Raises PermissionDeniedError if the adapter does not exist (AIP-211)."""
    row = connection.execute(sa.select(adapters).where(adapters.c.name == name)).one_or_none()
    if row is None:
        raise denied(name)
    return row


def is_recorded(connection: sa.Connection, manifest_key: str) -> bool:
    """Return whether the manifest is an adapter's."""
    return connection.execute(sa.select(adapters.c.name).filter_by(manifest_key=manifest_key)).first() is not None


def has_adapter(connection: sa.Connection, name: str) -> bool:
    return connection.execute(sa.select(adapters.c.name).where(adapters.c.name == name)).first() is not None


def find_same_adapter(connection: sa.Connection, name: str, digest: str) -> Any | None:
    """Return the row of the adapter of that name, or None if the name is free. Raises AlreadyExistsError if the adapter
    has other contents, or if the name belongs to the adapter that a task leaves."""
    row = connection.execute(sa.select(adapters).where(adapters.c.name == name)).one_or_none()
    task = task_of_adapter(name)
    is_task = connection.execute(sa.select(tasks_table.c.name).where(tasks_table.c.name == task)).first()
    if is_task or (row is not None and not _is_upload_of(row, digest)):
        raise AlreadyExistsError(
            f"{name} exists already, or a task of that id will leave it: choose another id", subject=name
        )
    return row


def new_upload(name: str, digest: str) -> str:
    """Return the key of a new folder for this upload alone, so that deleting its row may delete its files. The key
    holds the current time: the garbage collector spares young folders, whose row may not exist yet."""
    return UploadedAdapterFolder(name, digest[:16], now(), secrets.token_hex(4)).key


def _is_upload_of(row: Any, digest: str) -> bool:
    upload = UploadedAdapterFolder.parse(row.manifest_key)
    return upload is not None and upload.digest == digest[:16]


def delete_adapter(connection: sa.Connection, name: str) -> str:
    """Delete the adapter's row and return the folder of its files. Raises ResourceInUseError while an unfinished task
    starts from the adapter."""
    row = get_adapter_row(connection, name)
    users = sa.select(tasks_table.c.name).where(
        tasks_table.c.tenant == row.tenant,
        tasks_table.c.initial_adapter_key == row.manifest_key,
        tasks_table.c.state.in_(UNFINISHED),
    )
    if user := connection.execute(users).scalars().first():
        raise ResourceInUseError(f"{user} starts from {name}: cancel it or wait for its end", subject=name)
    is_its_task = tasks_table.c.name == task_of_adapter(name)
    connection.execute(sa.update(tasks_table).where(is_its_task).values(adapter=""))
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
    return artifact_pb2.Adapter(name=row.name, size_bytes=row.size_bytes, create_time=to_timestamp(row.created))
