"""What a worker takes from Redis: chunks to run, and a few questions from Flower. All else is dropped, and logged.

Whoever may write to Redis may write anything there, and Celery is open-hearted: a message may name any task, be packed
so that a kilobyte becomes gigabytes, ask for further tasks at its end, wait in memory until the year 9999, or be no
JSON at all, which ends the process. So a message of the queue is read here first, and what Celery gets to see is a
message made anew of the three things that matter: a chunk's id, its label, and the message's own id.
"""

from __future__ import annotations

import base64
import binascii
import json
from queue import Empty
from typing import Any

import structlog
from celery.worker.control import Panel
from kombu import transport
from kombu.transport import redis

from netassay.store.dispatching import QUEUE, TASK

log = structlog.get_logger("netassay.worker")

#: Characters of a message's body; a real one has some 200 and its label.
LONGEST_BODY = 64 << 10
#: Ids are whole numbers of 64 bits in both databases.
LARGEST_ID = 2**63 - 1
#: Celery's remote control as far as it only asks, and events on, which Flower sends. The rest stops workers, makes them
#: take other queues, load modules, or forget what they were told: `netassay` has its own verbs for what people need.
CONTROLS = frozenset(
    {"active", "active_queues", "clock", "conf", "enable_events", "heartbeat", "ping", "query_task",
     "registered", "report", "reserved", "revoked", "scheduled", "stats"}
)  # fmt: skip


class Refused(ValueError):
    """A message that no dispatcher sent."""


def chunk_of(message: Any) -> tuple[int, str, str]:
    """(chunk's id, label, message's id) of a message of the queue. Raises Refused, which says what is wrong with it."""
    if not isinstance(message, dict) or not isinstance(headers := message.get("headers"), dict):
        raise Refused("it has no headers")
    if message.get("content-type") != "application/json" or message.get("content-encoding") != "utf-8":
        raise Refused(f"its content is {message.get('content-type')!r:.60}, not JSON in UTF-8")
    if headers.get("compression"):
        raise Refused(f"it is packed ({headers['compression']!r:.60})")
    if headers.get("task") != TASK:
        raise Refused(f"it asks for the task {headers.get('task')!r:.60}")
    if any(headers.get(name) for name in ("eta", "expires", "group", "retries", "stamps")):
        raise Refused("it is to run at another time, again, or as part of a group")
    number, body, properties = headers.get("id"), message.get("body"), message.get("properties")
    if not isinstance(number, str) or len(number) > 100 or not isinstance(body, str) or len(body) > LONGEST_BODY:
        raise Refused("its id or its body is no text, or too long")
    if not isinstance(properties, dict) or properties.get("body_encoding") != "base64":
        raise Refused("its body is not in base64")
    try:
        arguments, named, embedded = json.loads(base64.b64decode(body, validate=True))
        chunk_id, label = arguments
    except (ValueError, TypeError, binascii.Error, RecursionError):
        raise Refused("its body is not that of a chunk") from None
    if named or not isinstance(embedded, dict) or any(embedded.values()):
        raise Refused("it asks for other tasks before or behind it")
    if type(chunk_id) is not int or not 0 < chunk_id <= LARGEST_ID or not isinstance(label, str):
        raise Refused("it names no chunk")
    return chunk_id, label, number


def made_anew(message: Any) -> dict[str, Any]:
    """The message of the queue that Celery gets to see. Raises Refused."""
    chunk_id, label, number = chunk_of(message)
    tag = message["properties"].get("delivery_tag")
    if not isinstance(tag, str) or not 0 < len(tag) <= 100:
        raise Refused("it has no tag")
    arguments = [chunk_id, label]
    body = base64.b64encode(json.dumps([arguments, {}, {}]).encode()).decode()
    headers = {"lang": "py", "task": TASK, "id": number, "root_id": number, "parent_id": None, "group": None,
               "retries": 0, "timelimit": [None, None], "eta": None, "expires": None, "shadow": None,
               "argsrepr": repr(arguments), "kwargsrepr": "{}", "origin": "", "ignore_result": True}  # fmt: skip
    properties = {"correlation_id": number, "reply_to": "", "delivery_mode": 2, "priority": 0, "delivery_tag": tag,
                  "body_encoding": "base64", "delivery_info": {"exchange": "", "routing_key": QUEUE}}  # fmt: skip
    return {"body": body, "content-encoding": "utf-8", "content-type": "application/json", "headers": headers,
            "properties": properties}  # fmt: skip


class Channel(redis.Channel):
    """Redis as kombu reads it; what cannot be read is dropped, where kombu would let the process end."""

    def _brpop_read(self, **options: Any) -> Any:
        return self._careful(super()._brpop_read, **options)

    def _receive_one(self, c: Any) -> Any:
        return self._careful(super()._receive_one, c)

    def _careful(self, read: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return read(*arguments, **options)
        except (Empty, *self.connection_errors, *self.connection.channel_errors):
            raise
        except Exception as error:
            log.warning("message_refused", why=f"{type(error).__name__}: {error}"[:200])
            raise Empty from None


class Transport(redis.Transport):
    Channel = Channel

    def _deliver(self, message: Any, queue: str) -> None:
        if queue == QUEUE:
            message = made_anew(message)
        elif isinstance(message, dict):  # remote control
            headers = message.get("headers")
            if message.get("content-type") != "application/json" or (headers or {}).get("compression"):
                raise Refused("it is no JSON, or packed")
        super()._deliver(message, queue)


def be_careful() -> None:
    """Have every connection of this process read by the rules above, and only those controls that ask."""
    for name in ("redis", "rediss"):
        transport.TRANSPORT_ALIASES[name] = f"{__name__}:Transport"
        transport._transport_cache.pop(name, None)
    for name in set(Panel.data) - CONTROLS:
        Panel.data.pop(name)
