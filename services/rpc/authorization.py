"""Who may call what: one table for every RPC of every service. What is not in it is refused.

A tenant's own names are checked after this, one by one, by the servicers with `authorize` (AIP-211).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from engine.errors import PermissionDeniedError
from services.resource_names import Collection, ResourceName


class Role(StrEnum):
    """What a caller proved to be: services and the operator by the common name of their certificate, tenants by an API
    key or an identity provider's token. MESH is the shared secret of services that run without certificates."""

    ANYONE = "anyone"
    VIEWER = "viewer"  # of a tenant: reads
    TENANT = "tenant"  # of a tenant: everything
    OPERATOR = "operator"
    ADMISSION = "admission"
    SCHEDULING = "scheduling"
    ALIGNMENT = "alignment"
    EXECUTION = "execution"
    MESH = "mesh"


@dataclass(frozen=True)
class Principal:
    """`tenant`: "tenants/{tenant}", or None for who acts for no tenant. `subject`: who it is, for the audit log.
    `executor`: "executors/{executor}" where it is one."""

    tenant: str | None
    role: Role = Role.MESH
    subject: str = "mesh secret"
    executor: str = ""


@dataclass(frozen=True)
class Rule:
    """`is_audited`: a call leaves a line in the audit log, whatever came of it; refusals always do."""

    roles: frozenset[Role]
    is_audited: bool = False


def _may(*roles: Role) -> Rule:
    return Rule(frozenset(roles))


def _changes(*roles: Role) -> Rule:
    return Rule(frozenset(roles), is_audited=True)


_READS, _WRITES = _may(Role.TENANT, Role.VIEWER), _changes(Role.TENANT)
_OPEN, _LEDGER = _may(Role.ANYONE), _may(Role.SCHEDULING)
_RULES: Mapping[str, Mapping[str, Rule]] = {
    "muxtune.v1.AdmissionService": {
        "CreateTask": _WRITES,
        "EstimateTask": _READS,
        "GetTask": _READS,
        "ListTasks": _READS,
        "WatchTask": _READS,
        "CancelTask": _WRITES,
        "UploadDataset": _WRITES,
        "GetDataset": _READS,
        "ListDatasets": _READS,
        "PreflightDataset": _READS,
        "DeleteDataset": _WRITES,
        "UploadAdapter": _WRITES,
        "DownloadAdapter": _READS,
        "ListAdapters": _READS,
        "DeleteAdapter": _WRITES,
        "ListBackbones": _READS,
    },
    "muxtune.v1.KeyService": {
        "CreateApiKey": _changes(Role.OPERATOR),
        "ListApiKeys": _may(Role.OPERATOR),
        "RevokeApiKey": _changes(Role.OPERATOR),
    },
    "muxtune.v1.OperatorService": {
        "SetQuota": _changes(Role.OPERATOR),
        "GetQuota": _may(Role.OPERATOR),
        "ListUsage": _may(Role.OPERATOR),
        "ListAuditEvents": _may(Role.OPERATOR),
    },
    "muxtune.v1.LedgerService": {
        "WatchChanges": _LEDGER,
        "GetSnapshot": _LEDGER,
        "LeadScheduling": _LEDGER,
        "CommitPlan": _LEDGER,
        "CommitResults": _LEDGER,
        "RevokeAttempts": _LEDGER,
        "PutLease": _LEDGER,
        "EndLease": _LEDGER,
        "RecordAuditEvent": _LEDGER,
    },
    "muxtune.v1.AlignmentService": {
        "StoreDataset": _may(Role.ADMISSION),
        "InspectDataset": _may(Role.ADMISSION),
        "RemoveDataset": _may(Role.ADMISSION),
        "StreamMicrobatches": _may(Role.EXECUTION),
    },
    "muxtune.v1.SchedulingService": {
        "RegisterExecutor": _may(Role.EXECUTION),
        "KeepLease": _may(Role.EXECUTION),
        "EndLease": _may(Role.EXECUTION),
        "DrainExecutor": _changes(Role.OPERATOR),
        "GetPlan": _may(Role.OPERATOR),  # names of all tenants' tasks: never for one of them
        "ExplainPlan": _may(Role.OPERATOR),
        "SimulatePlan": _may(Role.OPERATOR),
        "GetProfile": _may(Role.OPERATOR),
    },
    "muxtune.v1.ExecutionService": {
        "RunPlan": _may(Role.SCHEDULING),
        # Nothing here is the operator's but to read: its audit log is admission's, which executors do not reach.
        "ExportAdapter": _may(Role.SCHEDULING),
        "Drain": _may(Role.SCHEDULING),
        "DescribeExecutor": _may(Role.SCHEDULING, Role.OPERATOR),
    },
    "grpc.health.v1.Health": {"Check": _OPEN, "Watch": _OPEN, "List": _OPEN},
    # Served only where MUXTUNE_REFLECTION says so.
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": _OPEN},
}
TABLE: Mapping[str, Rule] = {
    f"/{service}/{method}": rule for service, methods in _RULES.items() for method, rule in methods.items()
}
_NOBODY = _changes()


def rule_for(method: str) -> Rule:
    """Of "/package.Service/Method"; nobody may call what is not in the table."""
    return TABLE.get(method, _NOBODY)


def check_access(method: str, role: Role) -> None:
    """Raises PermissionDeniedError unless the table lets the role call the method."""
    rule = rule_for(method)
    if role not in rule.roles and not (role is Role.MESH and rule.roles):
        raise PermissionDeniedError(f"a caller who is {role.value} may not call {method}", method=method)


def authorize(principal: Principal, name: str, collection: Collection) -> str:
    """Return `name`. Raises PermissionDeniedError unless it is in the collection of the caller's own tenant.

    The error is the same for another tenant's name, one that does not exist and one that is malformed (AIP-211).
    """
    parsed = ResourceName.parse(name)
    if parsed is None or (parsed.tenant, parsed.collection) != (principal.tenant, collection):
        raise denied(name)
    return name


def authorize_parent(principal: Principal, parent: str) -> str:
    """Return the tenant to act for: `parent`, or the caller's own if empty. Raises PermissionDeniedError."""
    if principal.tenant is None or (parent and parent != principal.tenant):
        raise denied(parent)
    return principal.tenant


def denied(name: str) -> PermissionDeniedError:
    return PermissionDeniedError(f'"{name}" does not exist, or this key may not see it', subject=name)
