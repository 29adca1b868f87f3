"""HTTP servers of tests, each served by a thread of its own."""

import threading
from socketserver import BaseServer


class InBackground:
    """Serves while it is entered."""

    def __init__(self, server: BaseServer):
        self._server = server

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
