"""What a local run asks the master over loopback: the progress of the job.

Blocking and brief; the runner calls it in a thread. Not here: what follows from the answers (plan).
"""

import http.client
import logging
import secrets

from disttrain import certificates
from disttrain.api.runtime import Progress
from disttrain.local.addresses import LOOPBACK

_SECONDS = 2.0

log = logging.getLogger(__name__)


def progress(port: int, public_key: str | None) -> Progress | None:
    """The master's report, None when it does not answer. public_key: that of the attempt's certificate, where there is one: it must
    have signed the report. "": the certificate is gone, and no report is believed."""
    if public_key == "":
        return None
    nonce = secrets.token_hex(16)
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_SECONDS)
    try:
        connection.request("GET", "/progress" if public_key is None else f"/progress/{nonce}")
        response = connection.getresponse()
        body = response.read()
        if response.status != http.client.OK:
            return None
        if public_key is None:
            return Progress.decode(body)
        return certificates.read_progress(body, nonce=nonce, public_key=public_key)
    except (OSError, http.client.HTTPException):
        return None
    except ValueError as error:
        log.debug("the master's progress cannot be read: %s", error)
        return None
    finally:
        connection.close()
