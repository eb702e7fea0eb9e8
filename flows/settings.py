"""Prefect's settings for this project; what the user has set in the environment stands.

Prefect reads the environment when it is imported, so import this module before prefect.
"""

import os
from pathlib import Path

DEFAULTS = {
    "PREFECT_HOME": str(Path.cwd() / ".prefect"),
    # The first start migrates a database: 15 to 25 s on two cores, minutes where they are busy; Prefect gives it 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}

for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)
