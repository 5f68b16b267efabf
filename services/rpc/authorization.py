"""Authorization: one table of the roles that may call each RPC of each service. A method that is not in it is refused.

After this the servicers check each name that a tenant sends with `authorize` (AIP-211).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from engine.errors import PermissionDeniedError
from services.resource_names import Collection, ResourceName


class Role(StrEnum):
    """Role of an authenticated caller.

    Services and the operator have the common name of their certificate; tenants have the role of their API key or of
    their identity provider's token. MESH is the shared secret of services that run without certificates.
    """

    ANYONE = "anyone"
    VIEWER = "viewer"  # reads a tenant's resources
    TENANT = "tenant"  # reads and changes a tenant's resources
    OPERATOR = "operator"
    ADMISSION = "admission"
    SCHEDULING = "scheduling"
    ALIGNMENT = "alignment"
    EXECUTION = "execution"
    MESH = "mesh"


@dataclass(frozen=True)
class Principal:
    """The authenticated caller of an RPC. `tenant`: "tenants/{tenant}", or None for services and operators.

    `subject` names the caller in the audit log. `executor`: "executors/{executor}" for an executor, else "".
    """

    tenant: str | None
    role: Role = Role.MESH
    subject: str = "mesh secret"
    executor: str = ""


@dataclass(frozen=True)
class Rule:
    """Roles that may call a method. `is_audited`: every call is recorded, not only calls that are denied."""

    roles: frozenset[Role]
    is_audited: bool = False


def _allow(*roles: Role) -> Rule:
    return Rule(frozenset(roles))


def _allow_audited(*roles: Role) -> Rule:
    return Rule(frozenset(roles), is_audited=True)


_READS, _WRITES = _allow(Role.TENANT, Role.VIEWER), _allow_audited(Role.TENANT)
_PUBLIC, _LEDGER = _allow(Role.ANYONE), _allow(Role.SCHEDULING)
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
        "CreateApiKey": _allow_audited(Role.OPERATOR),
        "ListApiKeys": _allow(Role.OPERATOR),
        "RevokeApiKey": _allow_audited(Role.OPERATOR),
    },
    "muxtune.v1.OperatorService": {
        "SetQuota": _allow_audited(Role.OPERATOR),
        "GetQuota": _allow(Role.OPERATOR),
        "ListUsage": _allow(Role.OPERATOR),
        "ListAuditEvents": _allow(Role.OPERATOR),
    },
    "muxtune.v1.LedgerService": {
        "WatchChanges": _LEDGER,
        "GetSnapshot": _LEDGER,
        "BatchGetTaskSpecs": _LEDGER,
        "LeadScheduling": _LEDGER,
        "CommitPlan": _LEDGER,
        "CommitResults": _LEDGER,
        "RevokeAttempts": _LEDGER,
        "PutLease": _LEDGER,
        "EndLease": _LEDGER,
        "RecordAuditEvent": _LEDGER,
    },
    "muxtune.v1.AlignmentService": {
        "StoreDataset": _allow(Role.ADMISSION),
        "InspectDataset": _allow(Role.ADMISSION),
        "RemoveDataset": _allow(Role.ADMISSION),
        "StreamMicrobatches": _allow(Role.EXECUTION),
    },
    "muxtune.v1.SchedulingService": {
        "RegisterExecutor": _allow(Role.EXECUTION),
        "KeepLease": _allow(Role.EXECUTION),
        "EndLease": _allow(Role.EXECUTION),
        "DrainExecutor": _allow_audited(Role.OPERATOR),
        "GetPlan": _allow(Role.OPERATOR),  # shows task names of all tenants: never allow a tenant
        "ExplainPlan": _allow(Role.OPERATOR),
        "SimulatePlan": _allow(Role.OPERATOR),
        "GetProfile": _allow(Role.OPERATOR),
    },
    "muxtune.v1.ExecutionService": {
        "RunPlan": _allow(Role.SCHEDULING),
        # The operator may only read here: executors cannot reach admission's audit log to record a change.
        "ExportAdapter": _allow(Role.SCHEDULING),
        "Drain": _allow(Role.SCHEDULING),
        "DescribeExecutor": _allow(Role.SCHEDULING, Role.OPERATOR),
    },
    "grpc.health.v1.Health": {"Check": _PUBLIC, "Watch": _PUBLIC, "List": _PUBLIC},
    # Served only if MUXTUNE_REFLECTION is set.
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": _PUBLIC},
}
TABLE: Mapping[str, Rule] = {
    f"/{service}/{method}": rule for service, methods in _RULES.items() for method, rule in methods.items()
}
_NO_ROLE = _allow_audited()


def rule_for(method: str) -> Rule:
    """Return the rule of "/package.Service/Method"; for a method that is not in the table, one that allows no role."""
    return TABLE.get(method, _NO_ROLE)


def check_access(method: str, role: Role) -> None:
    """Raise PermissionDeniedError unless the table allows the role to call the method."""
    rule = rule_for(method)
    if role not in rule.roles and not (role is Role.MESH and rule.roles):
        raise PermissionDeniedError(f"The role {role.value} may not call {method}.", method=method)


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
    return PermissionDeniedError(f'"{name}" does not exist, or this key may not see it.', subject=name)
