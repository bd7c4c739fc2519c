"""The messages of a chat request, as the model's chat template takes them: a role and a text each."""

from typing import Any

from client.gateway.errors import refused
from client.gateway.fields import UNSUPPORTED, Fields, text

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_NEUTRAL = {"tool_calls": ([],), "refusal": ("",), "annotations": ([],)}  # of answers, as front ends send them back


def messages(values: list[Any]) -> list[dict[str, str]]:
    """All of them, checked. Raises ApiError, which names the message and the field."""
    return [_message(Fields(value, f"messages[{index}]")) for index, value in enumerate(values)]


def _message(fields: Fields) -> dict[str, str]:
    role = fields.need("role", text)
    if role not in ROLES:
        roles = ", ".join(ROLES)
        raise refused(fields.name("role"), f"must be one of {roles}", UNSUPPORTED)
    path = fields.name("content")

    def content(value: Any) -> str:
        return (
            "\n".join(_part(Fields(one, f"{path}[{index}]")) for index, one in enumerate(value))
            if isinstance(value, list)
            else text(value)
        )

    said = fields.take("content", content, "") if role == "assistant" else fields.need("content", content)
    fields.finish(_NEUTRAL)
    return {"role": ROLES[role], "content": said}


def _part(fields: Fields) -> str:
    """A part of a content that comes in parts: text is the only kind."""
    kind = fields.need("type", text)
    if kind != "text":
        raise refused(fields.name("type"), f"{kind!r} is not supported: text is the only kind", UNSUPPORTED)
    said = fields.need("text", text)
    fields.finish({})
    return said
