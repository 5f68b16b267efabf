"""Downloads a small file to standard output: `python -m services.admission.api.download URL SECONDS MAX_BYTES`.

It is a process, because only a process can be ended wherever it waits: urllib's timeout is one for each read, so that a
server could hold it with a byte now and then, and the resolution of names has none.
"""

import signal
import sys
import urllib.request
from http.client import HTTPMessage
from typing import IO
from urllib.error import HTTPError


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows no redirection from https to http, whose answer anyone in the network could write."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if not newurl.startswith(f"{req.type}:"):
            raise HTTPError(newurl, code, f"{req.full_url} redirects to another scheme", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def main(url: str, seconds: str, max_bytes: str) -> None:
    signal.setitimer(signal.ITIMER_REAL, float(seconds))  # SIGALRM ends the process
    with urllib.request.build_opener(_SameScheme).open(url) as answer:
        sys.stdout.buffer.write(answer.read(int(max_bytes)))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"{type(error).__name__}: {error}")
