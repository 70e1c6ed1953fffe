"""The page to try a detector: what it shows, in a real browser too, and what it refuses."""

import json
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from mmbivit.apis import options, predict
from mmbivit.serve import detect_picture, load_networks, make_app, make_server, serve
from mmbivit.serve.detection import outline
from mmbivit.serve.server import listen
from tests.apis.damaged_images import DAMAGED, USABLE, write_images
from tests.browser import headless_browser

TITLES = ["float", "binary, simulated", "packed"]
MAX_BYTES = 700_000  # more than waitress would keep in memory by itself
TOOL = Path(__file__).parents[2] / "tools" / "serve.py"


@pytest.fixture(scope="module")
def networks(configs, float_checkpoint, detector, detector_file):
    pairs = (configs["float"], float_checkpoint), (configs["binary"], detector[1])
    return load_networks(detector_file, *(tuple(map(str, pair)) for pair in pairs))


@pytest.fixture(scope="module")
def address(networks):
    """The address of a server in this process."""
    listening = listen("127.0.0.1", 0)
    server = make_server(make_app(networks, max_bytes=MAX_BYTES), listening, MAX_BYTES)
    threading.Thread(target=server.run, daemon=True).start()
    return "http://{}:{}".format(*listening.getsockname())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures of all kinds, many of which cannot be used."""
    return write_images(tmp_path_factory.mktemp("pictures") / "images")


def send(address: str, content: bytes, kind: str = "application/octet-stream") -> tuple[int, str]:
    """Send a picture as curl would; returns status and answer."""
    request = urllib.request.Request(f"{address}/detect", content, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def predicted(configs, float_checkpoint, detector, detector_file, image: Path, folder: Path) -> list[dict]:
    """What mmbivit.apis.predict writes for an image, by column."""
    sources = [(configs["float"], float_checkpoint), (configs["binary"], detector[1]), (None, detector_file)]
    found = [predict(*source, [image], folder / str(i), device="cpu") for i, source in enumerate(sources)]
    return [json.loads(results[0]["json_file"].read_text()) for results in found]


def filled(polygons: list[list[int]], shape: tuple[int, int]) -> np.ndarray:
    """The mask that has these outlines."""
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.reshape(polygon, (-1, 1, 2)) for polygon in polygons], 1)
    return mask


def test_columns_have_what_predict_finds(
    networks, configs, float_checkpoint, detector, detector_file, images, tmp_path
):
    answer = detect_picture(networks, images[0].read_bytes())
    expected = predicted(configs, float_checkpoint, detector, detector_file, images[0], tmp_path)
    assert (answer["width"], answer["height"]) == (64, 64)
    assert [network.title for network in networks] == TITLES
    for column, known in zip(answer["columns"], expected, strict=True):
        detections = column["detections"]
        assert column["milliseconds"] > 0 and len(detections) >= 3
        assert {detection["label"] for detection in detections} == {"person"}
        assert [detection["score"] for detection in detections] == known["scores"]
        assert [detection["box"] for detection in detections] == known["bboxes"]
        for detection, mask in zip(detections, known["masks"], strict=True):
            assert np.array_equal(filled(detection["outline"], (64, 64)), rle.decode(mask))
    assert answer["columns"][0]["detections"] != answer["columns"][2]["detections"]
    assert json.loads(json.dumps(answer)) == answer


def test_outlines_are_those_of_holes_too():
    mask = np.zeros((40, 50), bool)
    mask[3:30, 5:45], mask[8:25, 10:40], mask[12:18, 20:30], mask[35, 2] = True, False, True, True
    assert len(outline(torch.from_numpy(mask))) == 4  # a ring's two borders, what is in it, and one pixel
    assert np.array_equal(filled(outline(mask), mask.shape), mask)
    assert outline(None) == outline(np.zeros((4, 4), bool)) == []


def test_sizes_are_those_of_the_files(networks, detector, detector_file):
    state = detector[0].state_dict()
    floats = 4 * sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    assert networks[1].size == f"{floats / 1e6:.2f} MB as float32"
    assert networks[2].size == f"{detector_file.stat().st_size / 1e6:.2f} MB, the packed file"


def test_pictures_are_used_or_get_a_sentence(networks, pictures):
    for name in USABLE:
        answer = detect_picture(networks[-1:], (pictures / name).read_bytes())
        assert (answer["width"], answer["height"]) == ((1, 1) if "pixel" in name else (64, 48))
        assert answer["picture"].startswith("data:image/jpeg;base64,")
    for name in DAMAGED.keys() - {"i_gone.png"}:
        with pytest.raises(ValueError, match="^The picture (has|is) ") as caught:
            detect_picture(networks[-1:], (pictures / name).read_bytes())
        assert tempfile.gettempdir() not in str(caught.value) and "\n" not in str(caught.value)


def test_a_large_picture_is_shown_small(networks):
    _, content = cv2.imencode(".png", np.full((40, 4000, 3), 90, np.uint8))
    answer = detect_picture(networks[-1:], content.tobytes())
    shown = np.frombuffer(urllib.request.urlopen(answer["picture"]).read(), np.uint8)
    assert cv2.imdecode(shown, cv2.IMREAD_COLOR).shape == (16, 1600, 3)
    assert (answer["width"], answer["height"]) == (4000, 40)


def test_pipelines_that_load_floats_show_the_same_picture(networks, images, monkeypatch, capfd):
    before = detect_picture(networks[-1:], images[0].read_bytes())["picture"]
    monkeypatch.setattr(networks[-1].transform.transforms[0], "to_float32", True)
    assert detect_picture(networks[-1:], images[0].read_bytes())["picture"] == before
    assert capfd.readouterr().err == ""  # OpenCV would warn


def test_uploads_are_bounded(address, pictures):
    status, text = send(address, (pictures / "h_bomb.png").read_bytes())
    assert status == 422
    assert json.loads(text)["problem"].startswith("The picture has 20000 x 20000 pixels, more than --max-pixels ")
    picture = (pictures / USABLE[0]).read_bytes()  # a PNG file may have anything behind its end
    assert send(address, picture.ljust(MAX_BYTES, b"\0"))[0] == 200
    status, text = send(address, picture.ljust(MAX_BYTES + 1, b"\0"))
    assert status == 413 and "Request Entity Too Large" in text
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # what a page of another site can send
        assert send(address, picture, kind)[0] == 415


def test_nothing_is_written_outside_a_folder_that_is_gone(address, images, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    opened, watching = [], True

    def watch(event, args):
        if watching and event == "open" and isinstance(args[0], (str, bytes)):
            path, mode, flags = args
            if (mode and set(mode) & set("wax+")) or (flags or 0) & 3:  # O_WRONLY, O_RDWR
                opened.append(str(path))

    sys.addaudithook(watch)  # which stays, and does nothing any more
    assert send(address, images[0].read_bytes().ljust(MAX_BYTES, b"\0"))[0] == 200
    watching = False
    (path,) = opened
    assert Path(path).parent.parent == tmp_path and Path(path).parent.name.startswith("mmbivit-serve-")
    assert list(tmp_path.iterdir()) == []


def test_a_defect_is_a_sentence_in_the_page_and_a_traceback_in_the_terminal(networks, images, monkeypatch, caplog):
    monkeypatch.setattr(networks[-1].model, "test_step", lambda data: 1 / 0)
    client = make_app(networks[-1:]).test_client()
    answer = client.post("/detect", data=images[0].read_bytes(), content_type="application/octet-stream")
    assert (answer.status_code, answer.json) == (
        500,
        dict(problem="The server failed with this picture; its terminal says why."),
    )
    assert "ZeroDivisionError" in caplog.text


def test_one_request_at_a_time(address, networks, images, monkeypatch):
    step, running, most = networks[0].model.test_step, [], []

    def count(data):
        running.append(1)
        most.append(len(running))
        result = step(data)
        running.pop()
        return result

    monkeypatch.setattr(networks[0].model, "test_step", count)
    content = images[0].read_bytes()
    threads = [threading.Thread(target=send, args=(address, content)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_bad_options_are_named(configs, classifier_configs, classifier_file, float_checkpoint, detector, detector_file):
    def refuse(message, *args, **options):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            serve(*args, port=options.pop("port", 0), **options)
        assert "\n" not in str(caught.value)

    simulated, full = (str(configs["binary"]), str(detector[1])), (str(configs["float"]), str(float_checkpoint))
    refuse("packed file no.safetensors does not exist", "no.safetensors")
    refuse("is of a classifier; the page shows what detectors find", classifier_file)
    refuse("--float: the detector of .* is binary; give it with --binary", detector_file, float_detector=simulated)
    refuse("--binary: the detector of .* is float; give it with --float", detector_file, binary_detector=full)
    refuse("is a packed file", detector_file, binary_detector=(simulated[0], str(detector_file)))
    refuse("--max-bytes=0; allowed", detector_file, max_bytes=0)
    refuse("--max-pixels=0; allowed", detector_file, max_pixels=0)
    refuse("--port=65536; allowed: an integer from 0 to 65535", detector_file, port=65536)
    refuse(
        r"--host no.such.invalid --port 0 cannot be listened on \(.*\); a host is",
        detector_file,
        host="no.such.invalid",
    )


def test_the_checkpoints_of_the_command_line_alone_can_be_trusted(monkeypatch):
    files = []
    monkeypatch.setattr(options, "trust_checkpoints", lambda *found: files.extend(found))
    args = dict(float=["float.py", "float.pth"], binary=["binary.py", "binary.pth"])
    options.trusted(Namespace(trust_checkpoint=True, **args))
    assert files == ["float.pth", "binary.pth"]
    options.trusted(Namespace(trust_checkpoint=True, float=None, binary=args["binary"]))
    assert files[2:] == ["binary.pth"]


def test_a_port_in_use_is_one_line_before_anything_is_loaded(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["serve.py", "no.safetensors", "--port", str(port)])
        monkeypatch.delenv("MMBIVIT_DEBUG", raising=False)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOL), run_name="__main__")
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --port {port} of 127.0.0.1 is in use; give another, or 0 for any that is free"


def test_the_tool_serves_until_it_is_interrupted(detector_file):
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # Tests that run in the background of a shell ignore Ctrl-C, and so would what they start.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([sys.executable, TOOL, detector_file, "--port", "0"], **options) as process:
        try:
            line = process.stdout.readline()
            address = re.fullmatch(r"Open (http://127\.0\.0\.1:\d+) in a browser; Ctrl-C ends it\.\n", line)
            with urllib.request.urlopen(address[1]) as answer:
                assert "<h2>packed</h2>" in answer.read().decode() and "default-src 'none'" in str(answer.headers)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20) == ("", "")
        finally:
            process.kill()
        assert process.returncode == 0


@pytest.fixture(scope="module")
def browser():
    with headless_browser() as started:
        yield started


@pytest.mark.parametrize("width", [320, 1280])
def test_a_browser_shows_what_predict_finds(
    browser, address, networks, configs, float_checkpoint, detector, detector_file, images, pictures, tmp_path, width
):
    expected = predicted(configs, float_checkpoint, detector, detector_file, images[0], tmp_path)
    tab = browser.new_page(viewport=dict(width=width, height=800))
    problems, requests = [], []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(address)
    assert tab.locator("h2").all_text_contents() == TITLES
    tab.set_input_files("#file", images[0])
    tab.get_by_text("64 x 64 pixels").wait_for()

    def texts(name: str) -> list[str]:
        return tab.locator(name).all_text_contents()

    def move(score: float) -> None:
        tab.locator("#score").fill(str(score))
        for i, known in enumerate(expected):
            shown = [score_ for score_ in known["scores"] if score_ >= score]
            assert texts(".count")[i] == f"{len(shown)} of {len(known['scores'])} detections"
            column = f"section:nth-of-type({i + 1})"
            assert texts(f"{column} svg text") == [f"person {score_:.2f}" for score_ in reversed(shown)]
            assert tab.locator(f"{column} svg rect").count() == len(shown)

    middle = expected[-1]["scores"][2]  # of five
    for score in (0.0, round(middle, 2), 1.0, 0.0):
        move(score)
    x1, y1, x2, y2 = expected[2]["bboxes"][0]
    last = tab.locator("section:nth-of-type(3) svg rect").last  # the best is drawn above the others
    for name, value in dict(x=x1, y=y1, width=x2 - x1, height=y2 - y1).items():
        assert float(last.get_attribute(name)) == pytest.approx(value)
    assert tab.locator("section svg path").count() >= 3
    assert all(float(text) > 0 for text in texts(".milliseconds"))
    assert all(network.size in text for network, text in zip(networks, texts("section p"), strict=True))
    assert tab.evaluate("document.documentElement.scrollWidth") <= width

    for name, words in (("e_text.jpg", "The picture is no image"), ("h_bomb.png", "has 20000 x 20000 pixels")):
        tab.set_input_files("#file", pictures / name)
        tab.get_by_text(words).wait_for()
    assert all("422" in problem for problem in problems) and len(problems) == 2  # Chromium reports the statuses
    (tmp_path / "long.png").write_bytes(bytes(MAX_BYTES + 1))
    tab.set_input_files("#file", tmp_path / "long.png")
    tab.get_by_text(f"has {MAX_BYTES + 1} bytes, more than the {MAX_BYTES}").wait_for()
    assert len([url for url in requests if url.endswith("/detect")]) == 3
    assert all(url.startswith((address, "data:")) for url in requests)
    tab.close()


def test_a_dropped_picture_is_detected_and_names_are_only_text(browser, networks, images, monkeypatch):
    nasty = "<img src=x onerror=alert(1)>"
    monkeypatch.setattr(networks[-1].model, "dataset_meta", dict(classes=(nasty,)))
    listening = listen("127.0.0.1", 0)
    server = make_server(make_app(networks[-1:]), listening)
    threading.Thread(target=server.run, daemon=True).start()
    tab = browser.new_page()
    problems = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.goto("http://{}:{}".format(*listening.getsockname()))
    assert tab.locator("section").count() == 1  # columns that were not given are left out
    drop = """bytes => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    tab.evaluate(drop, list(images[0].read_bytes()))
    tab.get_by_text("dropped.png, 64 x 64 pixels").wait_for()
    tab.locator("#score").fill("0")
    assert tab.locator("svg text").last.text_content().startswith(f"{nasty} ")
    assert tab.locator("img").count() == 0 and problems == []
    tab.close()
