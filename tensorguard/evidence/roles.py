"""Roles between the library's enum and the protobuf one."""

from __future__ import annotations

from tensorguard.errors import InvalidInputError
from tensorguard.evidence.claims import Role
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2

_TO_PROTO = {
    Role.INFERENCE: attestor_pb2.ROLE_INFERENCE,
    Role.COPROCESSOR: attestor_pb2.ROLE_COPROCESSOR,
}
_FROM_PROTO = {number: role for role, number in _TO_PROTO.items()}


def role_to_proto(role: Role) -> attestor_pb2.Role.ValueType:
    """The protobuf value of a role."""
    return _TO_PROTO[role]


def role_from_proto(value: int) -> Role:
    """Raises InvalidInputError for an unspecified or unknown role."""
    role = _FROM_PROTO.get(attestor_pb2.Role.ValueType(value))
    if role is None:
        raise InvalidInputError("the role must be inference or coprocessor")
    return role
