"""What a local run asks the master over loopback: the progress of the job.

Blocking and brief; the runner calls it in a thread. Not here: what follows from the answers (plan).
"""

import http.client
import logging

from disttrain.api.runtime import Progress
from disttrain.local.addresses import LOOPBACK

_SECONDS = 2.0

log = logging.getLogger(__name__)


def progress(port: int) -> Progress | None:
    """The master's report, None when it does not answer."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_SECONDS)
    try:
        connection.request("GET", "/progress")
        response = connection.getresponse()
        body = response.read()
        return Progress.decode(body) if response.status == http.client.OK else None
    except (OSError, http.client.HTTPException):
        return None
    except ValueError as error:
        log.debug("the master's progress cannot be read: %s", error)
        return None
    finally:
        connection.close()
