# SPDX-License-Identifier: MIT
"""All that loads a tracker runs here: `python -m ablab.track VERB PLACE ..`, in the environment of run/mirror.py.

`follow CAMPAIGN TRACKER..` is the mirror, `sync` one that ends by itself, `work` its worker, `fresh` forgets what was
delivered; `ready CONFIG TRACKER..`, `test TRACKER`, `import RESULTS ADDRESS NAME`, `read CAMPAIGN TRACKER`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ablab.rundir import Campaign
from ablab.track import _feed, _import, _mirror, _probe, _readback


def main(arguments: Sequence[str], module: str = "ablab.track") -> int:
    """The exit code; `module` is what a worker runs."""
    verb, place, *names = arguments
    if verb == "ready":
        return _mirror.ready(names, Path(place).read_text())
    if verb == "test":
        return _probe.main(place, module)
    if verb == "import":
        return _import.main(Path(place), *names)
    campaign = Campaign.open(Path(place))
    if verb == "work":
        return _mirror.work(campaign, names[0])
    if verb == "read":
        return _readback.main(campaign, names[0])
    if verb == "fresh":
        for name in names:
            _feed.Cursor(_mirror.files_of(campaign, name)).fresh()
        return 0
    return _mirror.supervise(campaign, names, module, once=verb == "sync")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
