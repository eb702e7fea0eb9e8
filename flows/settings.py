"""Prefect's settings for this project; settings in the user's environment take precedence.

Prefect reads the environment when it is imported, so import this module before prefect.
"""

import os

DEFAULTS = {
    # The first start migrates a database: 15 to 25 s on two idle cores, minutes on busy ones; Prefect's limit is 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}

for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)
