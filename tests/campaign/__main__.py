"""``python -m tests.campaign``: see `tests.campaign.run`."""

from __future__ import annotations

import sys

from tests.campaign.run import main

if __name__ == "__main__":
    sys.exit(main())
