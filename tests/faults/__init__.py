"""The fault harness: a lab under work, accidents every few seconds, and an oracle that looks at what is left.

    python -m tests.faults --lab embedded --kills 40 --lost-after 3 --seed 1

`workload` says what is submitted, `harness` what happens to the lab, `accidents` how; `site` is the lab with all that
surrounds it, `witness` watches the processes and the side log, `oracle` judges, `page` writes docs/faults.md.
"""

import sys
from pathlib import Path

# `labs` and `services` are modules beside this folder: under pytest they are found anyway.
if (_here := str(Path(__file__).parents[1])) not in sys.path:
    sys.path.insert(0, _here)
