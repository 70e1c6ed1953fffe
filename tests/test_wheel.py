"""The built wheel in an empty environment: what a user installs, not the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import yaml

import mmbivit
from mmbivit.deploy.header import FORMAT_VERSION

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (".cpp", ".css", ".h", ".html", ".inl", ".js", ".py", ".sh", ".typed")

SCRIPT = """
import mmbivit, torch, sys
from pathlib import Path
assert Path(mmbivit.__file__).is_relative_to(sys.argv[1]), mmbivit.__file__
from mmengine.registry import MODELS, DefaultScope
from mmdet.structures import DetDataSample
cfg = mmbivit.get_config("mask_rcnn_sibivit_swin_t").model
cfg.backbone.arch = dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2])
cfg.neck.in_channels = [16, 32, 64, 128]
with DefaultScope.overwrite_default_scope("mmdet"):
    model = MODELS.build(cfg).eval()
sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1, 1), pad_shape=(64, 64)))
with torch.no_grad():
    result = model(torch.randn(1, 3, 64, 64), [sample], mode="predict")[0].pred_instances
from mmbivit.report.page import Page, render
assert "<h1>title</h1>" in render(Page("title", "", [], ""))  # from the template in the wheel
print(len(result.scores), "detections", model.backbone.stage)
"""


@pytest.mark.slow
def test_the_wheel_runs_a_config_without_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip"]
    # The kernels without optimisation, which takes the compiler most of a minute.
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    environment = os.environ | dict(CC=str(compiler), CXX=str(compiler))
    wheel_options = ["--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path / "dist")]
    subprocess.run([*pip, "wheel", str(ROOT), *wheel_options], check=True, cwd=tmp_path, env=environment)
    (wheel,) = (tmp_path / "dist").glob("mmbivit-*.whl")
    assert wheel.name.startswith(f"mmbivit-{mmbivit.__version__}-py3-none-")  # for every version of Python
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True)
    (info,) = site.glob("mmbivit-*.dist-info")
    metadata = (info / "METADATA").read_text().splitlines()
    assert {"License-Expression: Apache-2.0", "Classifier: Typing :: Typed", "Provides-Extra: hub"} <= set(metadata)
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (site / "mmbivit" / "py.typed").is_file()
    kernels = [path.name for path in (site / "mmbivit" / "packed").glob("_kernels*")]
    assert kernels == ["_kernels.so"] or shutil.which("c++") is None
    shipped = {
        path.relative_to(site / "mmbivit" / ".mim").as_posix() for path in (site / "mmbivit" / ".mim").rglob("*.py")
    }
    files = {
        path.relative_to(ROOT).as_posix() for folder in ("configs", "tools") for path in (ROOT / folder).rglob("*.py")
    }
    assert shipped == {file for file in files if not file.startswith("tools/benchmarks/")}

    # A bare environment, without a compiler. PYTHONPATH does not read .pth files, so that an editable install of the
    # checkout is not seen.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    path = f"{site}:{sysconfig.get_paths()['purelib']}"
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(*arguments):
        command = [str(tmp_path / "venv" / "bin" / "python"), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=empty, env=dict(PYTHONPATH=path, PATH=str(empty))
        )

    result = run("-c", SCRIPT, str(site))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-2:] == ["detections", "2"]
    if kernels:
        result = run(str(ROOT / ".github" / "check_wheel.py"))
        assert result.returncode == 0 and "portable: " in result.stdout, result.stdout + result.stderr
    doctor = run("-m", "mmbivit.doctor")
    assert doctor.returncode == 0 and "everything fits together" in doctor.stdout, doctor.stdout + doctor.stderr


def test_a_source_distribution_has_all_that_a_wheel_is_made_of(tmp_path):
    options = ["sdist", "--quiet", "--formats=tar", f"--dist-dir={tmp_path}"]
    command = [sys.executable, "setup.py", "egg_info", f"--egg-base={tmp_path}", *options]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    (archive,) = tmp_path.glob("*.tar")
    with tarfile.open(archive) as opened:
        files = {name.partition("/")[2] for name in opened.getnames()}
    folders = (ROOT / name for name in ("configs", "mmbivit", "tools"))
    needed = {path for folder in folders for path in folder.rglob("*") if path.suffix in NEEDED}
    needed |= {ROOT / name for name in ("LICENSE", "README.md", "model-index.yml", "pyproject.toml", "setup.py")}
    assert {path.relative_to(ROOT).as_posix() for path in needed} <= files
    assert not [name for name in files if name.endswith((".so", ".pyd", ".pyc"))]  # of this machine


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (mmbivit.__version__, "Apache-2.0")
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    assert index["Collections"][0]["Code"]["Version"] == f"v{mmbivit.__version__}"
    assert f"this version reads 1 to {FORMAT_VERSION}," in (ROOT / "docs" / "versions.md").read_text()
    (paper,) = citation["references"]
    readme = (ROOT / "README.md").read_text()
    assert paper["doi"] in readme and paper["collection-title"] in readme
    assert paper["title"] in readme.replace("{", "").replace("}", "")
