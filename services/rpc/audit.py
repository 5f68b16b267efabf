"""What the gate tells an audit log: who called what, on which resource, and what came of it."""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass

from google.protobuf.message import Message

from services.rpc.authorization import Principal

_NAMING = ("name", "id", "tenant", "parent", "task", "executor")
_MAX_NAME_CHARACTERS = 200


@dataclass(frozen=True)
class AuditEntry:
    """`status_code` as gRPC spells it; `resource` is "" where the call names none."""

    principal: Principal
    method: str
    resource: str
    status_code: str


Audit = Callable[[AuditEntry], Awaitable[None]]


@dataclass
class AuditedCall:
    """The RPC being served. `told`: the status code that the log has of it already, with what it did."""

    principal: Principal
    method: str
    told: str = ""

    def entry(self, resource: str, status_code: str) -> AuditEntry:
        return AuditEntry(self.principal, self.method, resource, status_code)


_call: ContextVar[AuditedCall] = ContextVar("audited_call")


def current_call() -> AuditedCall:
    return _call.get()


def set_call(call: AuditedCall) -> None:
    """For the interceptor."""
    _call.set(call)


def resource_name_in(*messages: Message) -> str:
    """The first name that one of them gives, itself or a message directly in it; never any other text of theirs."""
    for message in messages:
        inner = (value for field, value in message.ListFields() if isinstance(value, Message))
        for part in (message, *inner):
            for field in _NAMING:
                value = getattr(part, field, "")
                if isinstance(value, str) and value:
                    return value[:_MAX_NAME_CHARACTERS]
    return ""
