"""Real counterparts of sources, started by the tests on free ports: an MQTT broker, an RTSP server, an HTTP server."""

import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
from pymodbus.client import ModbusTcpClient

from ports import free_port
from required import absent

SYSTEM_PYTHON = "/usr/bin/python3"
"""Has the bindings of GStreamer, which no index for pip carries."""
RTSP_SERVER = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
if len(sys.argv) > 1:
    server, factory = GstRtspServer.RTSPServer(), GstRtspServer.RTSPMediaFactory()
    server.set_address("127.0.0.1")
    server.set_service(sys.argv[1])
    factory.set_launch(
        "( videotestsrc is-live=true pattern=ball ! video/x-raw,format=I420,width=96,height=64,framerate=20/1 ! jpegenc"
        " ! rtpjpegpay name=pay0 )"
    )
    factory.set_shared(True)
    server.get_mount_points().add_factory("/line", factory)
    server.attach(None)
    print("ready", flush=True)
    GLib.MainLoop().run()
"""


def until(holds, seconds=20.0):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


class Program:
    """A program on a port of its own that can be stopped and started again."""

    def __init__(self):
        self.port = free_port()
        self._process = None

    def stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()


class Mosquitto(Program):
    def __init__(self, folder):
        self._program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        if self._program is None:
            absent("mosquitto", "mosquitto was not found: apt-get install mosquitto")
        super().__init__()
        self._settings = folder / "mosquitto.conf"
        self._settings.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\n")

    def start(self):
        self._process = subprocess.Popen([self._program, "-c", self._settings], stderr=subprocess.DEVNULL)

        def answers():
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", self.port)) == 0

        until(answers)


MODBUS_SERVER = """
import asyncio, sys
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

async def main():
    registers = [SimData(0, count=16, values=0, datatype=DataType.REGISTERS)]
    device = SimDevice(1, simdata=registers, use_bit_addressing=True)
    await ModbusTcpServer(device, address=("127.0.0.1", int(sys.argv[1]))).serve_forever()

asyncio.run(main())
"""


class Plc(Program):
    """A Modbus server of pymodbus with 16 registers, whose bits are coils and discrete inputs too."""

    def start(self):
        self._process = subprocess.Popen([sys.executable, "-c", MODBUS_SERVER, str(self.port)])
        self._client = ModbusTcpClient("127.0.0.1", port=self.port)
        until(self._client.connect)

    def stop(self):
        self._client.close()
        super().stop()

    def write(self, signal, value):
        """Write coil 8 or register 8."""
        write = self._client.write_register if signal.endswith("register") else self._client.write_coil
        assert not write(8, value).isError()

    def pulse(self, signal, value):
        """Let a bit be high, and then low, for some polls."""
        for one in (0, value, 0):
            self.write(signal, one)
            time.sleep(0.08)


class RtspServer(Program):
    """GStreamer's RTSP server with a moving ball, 96 x 64 pixels, 20 frames a second."""

    def __init__(self):
        probe = (
            subprocess.run([SYSTEM_PYTHON, "-c", RTSP_SERVER], capture_output=True)
            if shutil.which(SYSTEM_PYTHON)
            else None
        )
        if probe is None or probe.returncode:
            absent("gstreamer", "GStreamer's RTSP server was not found: apt-get install gir1.2-gst-rtsp-server-1.0")
        super().__init__()
        self.url = f"rtsp://127.0.0.1:{self.port}/line"

    def start(self):
        command = [SYSTEM_PYTHON, "-c", RTSP_SERVER, str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout.readline() == "ready\n"
        self._process.stdout.close()


class Snapshots:
    """An HTTP server that answers with `content`, slowly if `pause` is set, or with a redirect.

    Attributes:
        requests: the headers of each request.
    """

    def __init__(self):
        self.content, self.etag, self.pause, self.redirect, self.status = b"", None, 0.0, None, 200
        self.requests = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/snapshot.jpg"
        self._server = None

    def start(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(dict(self.headers))
                if outer.redirect:
                    self.send_response(302)
                    self.send_header("Location", outer.redirect)
                    self.end_headers()
                    return
                same = outer.etag is not None and self.headers.get("If-None-Match") == outer.etag
                self.send_response(304 if same else outer.status)
                if outer.etag:
                    self.send_header("ETag", outer.etag)
                self.end_headers()
                if same:
                    return
                try:
                    for start in range(0, len(outer.content), 1000):
                        self.wfile.write(outer.content[start : start + 1000])
                        time.sleep(outer.pause)
                except OSError:
                    pass  # the client has given up

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()


def write_video(path, frames, *, rate=10):
    """Write frames, (H, W, 3) uint8 each, as a lossless video file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "bgr0"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
