"""`python -S peak.py COMMAND...`: run it; as the last line on standard error, [seconds, bytes resident at its peak]."""

import json
import os
import sys
import time

began = time.monotonic()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(json.dumps([time.monotonic() - began, usage.ru_maxrss * 1024]), file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
