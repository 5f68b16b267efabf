"""Resource names in the client: short forms completed, and the tenant of a name. The mesh makes all other names."""

_TENANT, _EXECUTOR = "tenants/", "executors/"


def tenant_name(tenant: str) -> str:
    """Return "tenants/a" for "a" as for "tenants/a", and "" for ""."""
    return tenant if not tenant or tenant.startswith(_TENANT) else f"{_TENANT}{tenant}"


def executor_name(executor: str) -> str:
    """Return "executors/a" for "a" as for "executors/a"."""
    return executor if executor.startswith(_EXECUTOR) else f"{_EXECUTOR}{executor}"


def executor_host(executor_id: str) -> str:
    """Return the host that the certificate of an executor names."""
    return f"{executor_id}.execution"


def task_name(tenant: str, task_id: str) -> str:
    return f"{tenant}/tasks/{task_id}"


def tenant_of(name: str) -> str:
    """Return the tenant of "tenants/{tenant}/{tasks, datasets or adapters}/{id}", or "" for any other text."""
    tenant, *rest = name.rsplit("/", 2)
    return tenant if len(rest) == 2 and rest[0] in ("tasks", "datasets", "adapters") else ""
