"""How the operator logs: to standard error, as text or as one JSON object a line, and with the libraries' chatter left out."""

import json
import logging
from datetime import UTC, datetime

from disttrain.controller.settings import LogFormat, Settings


def log_to_stderr(settings: Settings) -> None:
    """Sets the logging of the whole process."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        _JsonFormatter()
        if settings.log_format is LogFormat.JSON
        else logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    )
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    if settings.log_level != "debug":
        logging.getLogger("kopf").setLevel(logging.WARNING)  # it says of every event that it was handled
        logging.getLogger("kubernetes").setLevel(logging.ERROR)  # it warns of what the operator logs as an error


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
