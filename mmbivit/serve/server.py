"""The page's server: bounded uploads, one request at a time, nothing from elsewhere and nothing to elsewhere."""

import errno
import logging
import socket
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from mmbivit.apis.errors import error_message, is_user_error
from mmbivit.apis.images import MAX_PIXELS
from mmbivit.checks import UserError, check_integer
from mmbivit.compat import DependencyError

from .detection import Network, detect_picture, load_networks

try:
    import waitress
    from flask import Flask, Response, abort, render_template, request
    from werkzeug.exceptions import HTTPException
except ImportError as error:
    raise DependencyError(f"mmbivit.serve needs flask and waitress ({error}): pip install flask waitress") from error

__all__ = ["HOST", "MAX_BYTES", "PORT", "make_app", "make_server", "serve"]

HOST, PORT = "127.0.0.1", 7860
MAX_BYTES = 32_000_000
CONNECTIONS = 32  # open at once; each may hold an upload in memory
# The page runs its own script and shows the pictures that it is sent; nothing else loads, whatever a file's names say.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def make_app(networks: list[Network], *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Flask:
    """Make the page as a WSGI application, for a server that keeps longer uploads away.

    Args:
        networks: of the page's columns.
        max_bytes: of an upload; the page does not send more.
        max_pixels: a picture of more pixels is not decoded.
    """
    app = Flask(__name__)

    @app.get("/")
    def page() -> str:
        threads = torch.get_num_threads()
        return render_template("page.html", networks=networks, max_bytes=max_bytes, threads=threads)

    @app.post("/detect")
    def detect() -> Any:
        # A page of another site cannot send this type without asking first.
        if request.mimetype != "application/octet-stream":
            abort(415, "Send the bytes of a picture as application/octet-stream.")
        try:
            return detect_picture(networks, request.get_data(), max_pixels)
        except Exception as error:
            if not is_user_error(error):
                raise
            return dict(problem=error_message(error)), 422

    @app.errorhandler(HTTPException)
    def refuse(error: HTTPException) -> Any:
        # Of an error in the code, Flask has written the traceback to the terminal.
        defect = "The server failed with this picture; its terminal says why."
        return dict(problem=defect if error.code == 500 else error.description), error.code

    @app.after_request
    def protect(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    return app


def make_server(app: Flask, listening: socket.socket, max_bytes: int = MAX_BYTES) -> Any:
    """Make waitress' server of an application; ``run()`` serves until it is interrupted.

    Args:
        app: of :func:`make_app`.
        listening: the socket.
        max_bytes: a longer upload is refused before it is read.
    """
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns of each request that waits, as all do here
    return waitress.create_server(
        app,
        sockets=[listening],
        threads=1,  # one request at a time
        connection_limit=CONNECTIONS,
        max_request_body_size=max_bytes + 1,  # the first size that is refused
        inbuf_overflow=2**62,  # waitress would put the rest into files of its own
        outbuf_overflow=2**62,
        ident=None,
    )


def listen(host: str, port: int) -> socket.socket:
    """Open the socket; raises a ValueError that names the option if it cannot be."""
    check_integer("--port", port, 0, 65535)
    try:
        return socket.create_server((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port} of {host} is in use; give another, or 0 for any that is free") from error
        reason = (error.strerror or str(error)).partition(" (")[0]  # Python puts host and port behind it
        raise UserError(
            f"--host {host} --port {port} cannot be listened on ({reason}); a host is an address of this machine, such "
            "as 127.0.0.1, and ports below 1024 are often for its administrator alone"
        ) from error


def serve(
    file: str | Path,
    *,
    float_detector: tuple[str, str] | None = None,
    binary_detector: tuple[str, str] | None = None,
    host: str = HOST,
    port: int = PORT,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Serve a page that shows what detectors find in a picture, until it is interrupted.

    Args:
        file: a packed detector.
        float_detector: config and checkpoint of the float detector to compare it with.
        binary_detector: config and checkpoint of the detector whose bits are simulated.
        host: where to listen; ``127.0.0.1`` is this machine alone.
        port: where to listen; 0 for any that is free.
        max_bytes: a longer upload is refused before it is read.
        max_pixels: a picture of more pixels is refused before it is decoded.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a port cannot be listened on, a file cannot be used, or an option has no sense.
    """
    check_integer("--max-bytes", max_bytes, 1)
    check_integer("--max-pixels", max_pixels, 1)
    with listen(host, port) as listening:  # before anything is loaded, which takes long
        networks = load_networks(file, float_detector, binary_detector)
        _warm_up(networks)
        server = make_server(make_app(networks, max_bytes=max_bytes, max_pixels=max_pixels), listening, max_bytes)
        name, number = listening.getsockname()[:2]
        print(f"Open http://{name}:{number} in a browser; Ctrl-C ends it.", flush=True)
        server.run()


def _warm_up(networks: list[Network]) -> None:
    """Run all networks once, so that the first picture's times are like those of others."""
    _, content = cv2.imencode(".png", np.zeros((64, 64, 3), np.uint8))
    detect_picture(networks, content.tobytes())
