"""What the gate tells an audit log: who called what, on which resource, and what came of it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from google.protobuf.message import Message

from services.auth import Principal

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


def resource_of(*messages: Message) -> str:
    """The first name that one of them gives, itself or a message directly in it; never any other text of theirs."""
    for message in messages:
        inner = (value for field, value in message.ListFields() if isinstance(value, Message))
        for part in (message, *inner):
            for field in _NAMING:
                value = getattr(part, field, "")
                if isinstance(value, str) and value:
                    return value[:_MAX_NAME_CHARACTERS]
    return ""
