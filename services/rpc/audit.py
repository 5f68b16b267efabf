"""Audit entries: which caller called which method on which resource, and the status it got."""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass

from google.protobuf.message import Message

from services.rpc.authorization import Principal

_NAME_FIELDS = ("name", "id", "tenant", "parent", "task", "executor")
_MAX_NAME_CHARACTERS = 200


@dataclass(frozen=True)
class AuditEntry:
    """One line of the audit log. `status_code` is gRPC's name; `resource` is "" if the call names none."""

    principal: Principal
    method: str
    resource: str
    status_code: str


Audit = Callable[[AuditEntry], Awaitable[None]]


@dataclass
class AuditedCall:
    """The audit entry of the RPC being served.

    `recorded_code`: the status code that the servicer recorded already, in one transaction with its change; else "".
    """

    principal: Principal
    method: str
    recorded_code: str = ""

    def entry(self, resource: str, status_code: str) -> AuditEntry:
        return AuditEntry(self.principal, self.method, resource, status_code)


_call: ContextVar[AuditedCall] = ContextVar("audited_call")


def current_call() -> AuditedCall:
    """Return the audit entry of the RPC being served."""
    return _call.get()


def set_call(call: AuditedCall) -> None:
    """Set the audit entry of the RPC being served; called by the interceptor."""
    _call.set(call)


def resource_name_in(*messages: Message) -> str:
    """Return the first resource name in the messages or in messages directly inside them; never any other text."""
    for message in messages:
        inner = (value for field, value in message.ListFields() if isinstance(value, Message))
        for part in (message, *inner):
            for field in _NAME_FIELDS:
                value = getattr(part, field, "")
                if isinstance(value, str) and value:
                    return value[:_MAX_NAME_CHARACTERS]
    return ""
