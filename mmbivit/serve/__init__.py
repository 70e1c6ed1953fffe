"""A page to try a detector in a browser: drop a picture, and see float, binary and packed detections side by side."""

from .detection import Network, detect_picture, load_networks
from .server import make_app, make_server, serve

__all__ = ["Network", "detect_picture", "load_networks", "make_app", "make_server", "serve"]
