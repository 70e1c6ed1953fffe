"""A kill at any step of saving a checkpoint, or a full disk, leaves one to go on from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_saves.py")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")


def run(*command: str) -> list:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_kill_at_any_step_of_a_save_leaves_a_checkpoint_that_loads(tmp_path):
    report = run(sys.executable, str(SCRIPT), str(tmp_path))
    names = [row["name"] for row in report]
    # At least: temporary file, rename, folder, the pointer's three, removal of the outdated checkpoint.
    assert len(names) >= 10 and "step 10" in names and "50000 bytes" in names
    for row in report:
        left = row["left"]
        assert left["iteration"] in (3, 4), row
        assert f"iter_{left['iteration']}.pth" in left["files"]
        # The run that goes on removes what is too many, and the temporary files.
        assert row["after_resume"] == dict(iteration=4, files=["iter_4.pth"])
    reached = [row["left"]["iteration"] for row in report if row["name"].startswith("step")]
    assert reached == sorted(reached) and set(reached) == {3, 4}
    assert any(name.endswith(".part") for row in report for name in row["left"]["files"])


def test_a_full_disk_is_an_error_that_leaves_the_last_checkpoint(tmp_path):
    mount = f"mount -t tmpfs -o size=1m tmpfs '{tmp_path}'"
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    error, left = run(*inside, f"{mount} && exec '{sys.executable}' '{SCRIPT}' '{tmp_path}' --full-disk")
    assert error == "No space left on device"
    assert left["iteration"] == len(left["files"]) >= 1
    assert left["files"] == [f"iter_{i + 1}.pth" for i in range(left["iteration"])]  # and no temporary file


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from mmbivit.files import atomic_writer\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with atomic_writer(sys.argv[1]) as file: file.write(b'x' * 2000)"
    )
    path = tmp_path / "file"
    path.write_text("before")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "before"
