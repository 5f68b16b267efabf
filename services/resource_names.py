"""Resource names (Google AIP-122): the only place that makes and parses them.

    tenants/{tenant}
    tenants/{tenant}/tasks/{id}
    tenants/{tenant}/datasets/{id}
    tenants/{tenant}/adapters/{id}    an adapter that a task leaves has the task's id
    executors/{executor}              the executor's certificate names the host {executor}.execution

Backbones and API keys have plain ids, not resource names.
"""

import re
import secrets
from dataclasses import dataclass
from typing import Literal, cast

from engine.errors import InvalidInputError

Collection = Literal["tasks", "datasets", "adapters"]

_ID = r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
_TENANT = re.compile(rf"tenants/{_ID}")
_RESOURCE = re.compile(rf"(tenants/{_ID})/(tasks|datasets|adapters)/({_ID})")
_TENANT_PREFIX, _EXECUTOR_PREFIX, _EXECUTOR_HOST_SUFFIX = "tenants/", "executors/", ".execution"


@dataclass(frozen=True)
class ResourceName:
    """Name of a tenant's task, dataset or adapter. `tenant` is the tenant's full name; str() gives the whole name."""

    tenant: str
    collection: Collection
    id: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.collection}/{self.id}"

    @classmethod
    def parse(cls, text: str) -> "ResourceName | None":
        """Return the name in `text`, or None if it is not a resource name."""
        if (match := _RESOURCE.fullmatch(text)) is None:
            return None
        return cls(match[1], cast(Collection, match[2]), match[3])


def is_tenant(name: str) -> bool:
    return _TENANT.fullmatch(name) is not None


def is_task(name: str) -> bool:
    parsed = ResourceName.parse(name)
    return parsed is not None and parsed.collection == "tasks"


def adapter_of_task(task: str) -> str:
    """Return the name of the adapter that the task leaves: "tenants/a/adapters/t" for "tenants/a/tasks/t"."""
    return _same_id(task, "tasks", "adapters")


def task_of_adapter(adapter: str) -> str:
    """Return the name of the task that would leave this adapter: "tenants/a/tasks/t" for "tenants/a/adapters/t"."""
    return _same_id(adapter, "adapters", "tasks")


def tenant_of(name: str) -> str:
    """Return the tenant that the name begins with, or "".

    Ids are not checked: a hypothetical task of `muxtune plan whatif` may have any.
    """
    tenant, *rest = name.rsplit("/", 2)
    return tenant if len(rest) == 2 and rest[0] in ("tasks", "datasets", "adapters") else ""


def tenant_name(tenant: str) -> str:
    """Return "tenants/a" for "a" as for "tenants/a"."""
    return tenant if tenant.startswith(_TENANT_PREFIX) else f"{_TENANT_PREFIX}{tenant}"


def check_tenant(tenant: str) -> str:
    """Return `tenant`. Raises InvalidInputError unless it is "tenants/{id}"."""
    if not is_tenant(tenant):
        raise InvalidInputError.of_field("tenant", f'"{tenant}" is not a tenant: write "tenants/{{id}}"')
    return tenant


def new_name(tenant: str, collection: Collection, requested_id: str, field: str) -> str:
    """Return the name with the requested id, or with a random one if that is empty.

    Raises InvalidInputError, naming the `field`, for an id that breaks the rules.
    """
    if requested_id and not re.fullmatch(_ID, requested_id):
        raise InvalidInputError.of_field(
            field, f'"{requested_id}" is not an id: use 1 to 63 lower-case letters, digits, hyphens, a letter first'
        )
    return str(ResourceName(tenant, collection, requested_id or f"{collection[0]}-{secrets.token_hex(6)}"))


def executor_name(executor_id: str) -> str:
    return f"{_EXECUTOR_PREFIX}{executor_id}"


def executor_host(executor: str) -> str:
    """Return the host in the certificate of "executors/NAME": "NAME.execution"."""
    return f"{executor.removeprefix(_EXECUTOR_PREFIX)}{_EXECUTOR_HOST_SUFFIX}"


def executor_of_host(host: str) -> str | None:
    """Return the executor that a certificate's host names, or None if it is not an executor's."""
    if not host.endswith(_EXECUTOR_HOST_SUFFIX):
        return None
    return executor_name(host.removesuffix(_EXECUTOR_HOST_SUFFIX))


def _same_id(name: str, collection: Collection, target: Collection) -> str:
    parsed = ResourceName.parse(name)
    if parsed is None or parsed.collection != collection:
        raise ValueError(f'"{name}" is not the name of one of a tenant\'s {collection}')
    return str(ResourceName(parsed.tenant, target, parsed.id))
