"""`python -m producer.health`: does a dispatcher look after this lab? Exit code 0 where one does.

At every look a dispatcher asks Redis for the number it gave it, twice a second or more; Redis knows how long ago that
was. Where several dispatchers run, one that lives is enough.
"""

from __future__ import annotations

import sys

from netassay.errors import UserError
from netassay.settings import Settings, settings
from netassay.store.database import Outage
from netassay.store.dispatching import key_prefix
from producer import lab

#: A look that finds much to do takes seconds.
QUIET_SECONDS = 30


def quiet(config: Settings) -> float:
    """Seconds since a dispatcher looked, in whole ones; infinite where none has since Redis was wiped.

    Raises LabError, StoreError, an Outage, redis.RedisError.
    """
    with lab.records_of(config) as database:
        prefix = key_prefix(database)
    client = lab.reach_broker(config.broker)
    try:
        seconds = client.object("idletime", f"{prefix}incarnation")
    finally:
        client.close()
    return float("inf") if seconds is None else float(seconds)


def main() -> int:
    import redis

    try:
        seconds = quiet(settings())
        if seconds <= QUIET_SECONDS:
            return 0
        print(f"no dispatcher has looked for {seconds:.0f} s; start one: netassay dispatch", file=sys.stderr)
    except UserError as error:
        print(error, file=sys.stderr)
    except Outage as error:
        print(f"the store does not answer: {error.orig}; check NETASSAY_STORE", file=sys.stderr)
    except redis.RedisError as error:  # it answered before
        print(f"the broker does not answer: {error}; check NETASSAY_BROKER", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
