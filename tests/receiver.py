"""An HTTP server to which events are sent."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer


class Receiver:
    """A real HTTP server, which answers with the given statuses and then with 204."""

    def __init__(self, *statuses):
        self.statuses, self.got, self.headers = list(statuses), [], []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                owner.headers.append(dict(self.headers))
                owner.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status = owner.statuses.pop(0) if owner.statuses else 204
                self.send_response(status)
                if status == 307:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/drift"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
