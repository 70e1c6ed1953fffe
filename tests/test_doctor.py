"""The doctor in environments that are simulated by package metadata."""

import sys
from importlib import metadata

import pytest

from mmbivit import compat, doctor
from mmbivit.compat import mmcv_ops, requirements

GOOD = {
    "torch": "2.9.0",
    "torchvision": "0.24.0",
    "onedl-mmengine": "0.10.12",
    "onedl-mmcv": "2.3.6",
    "onedl-mmdetection": "3.5.1",
    "timm": "1.0.20",
    "numpy": "2.2.0",
    "pycocotools": "2.0.11",
    "safetensors": "0.6.0",
    "rich": "15.0.0",
    "matplotlib": "3.11.0",
}


@pytest.fixture
def environment(monkeypatch):
    """Returns a function that makes pip's metadata say what is installed."""

    def install(distributions):
        def version(name):
            if name not in distributions:
                raise metadata.PackageNotFoundError(name)
            return distributions[name]

        modules = {r.module for r in requirements.REQUIREMENTS if r.distribution in distributions}
        if requirements.version_tuple(distributions.get("setuptools", "81")) < (81,):
            modules.add("pkg_resources")
        monkeypatch.setattr(requirements.metadata, "version", version)
        monkeypatch.setattr(requirements, "is_importable", lambda module: module in modules)

    return install


def test_a_good_environment_has_no_problem(environment, capsys):
    environment(GOOD)
    report = doctor.diagnose()
    assert report.problems == ()
    assert "use_safe_loading()" not in dict(report.facts)["checkpoints"]
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "onedl-mmcv 2.3.6" in printed and "everything fits together" in printed


@pytest.mark.parametrize(
    ("change", "what", "mend"),
    [
        (
            {"torch": "2.4.1"},
            "torch 2.4.1 is too old: 2.6 or newer is needed",
            'pip install -U "torch>=2.6" torchvision',
        ),
        ({"timm": None}, "timm is not installed", 'pip install "timm>=1.0"'),
        (
            {"onedl-mmdetection": "4.0.0"},
            "onedl-mmdetection 4.0.0 is too new",
            'pip install "onedl-mmdetection>=3.5,<4"',
        ),
        ({"mmdet": "3.3.0"}, "two families of MMDetection", "pip uninstall -y mmdet && pip install --force-reinstall"),
    ],
)
def test_each_problem_comes_with_its_mend(environment, capsys, change, what, mend):
    environment({name: version for name, version in (GOOD | change).items() if version})
    problems = doctor.diagnose().problems
    assert len(problems) == 1 and what in problems[0].what and mend in problems[0].mend
    assert doctor.main([]) == 1
    assert what in capsys.readouterr().out.replace("\n", " ")


def test_a_missing_package_is_one_readable_error_on_use(environment):
    environment({name: version for name, version in GOOD.items() if "mmdet" not in name and name != "timm"})
    with pytest.raises(compat.DependencyError) as error:
        compat.check_dependencies()
    assert "mmdet is not installed" in str(error.value) and "timm is not installed" in str(error.value)
    assert "python -m mmbivit.doctor" in str(error.value)


def test_openmmlab_alone_is_fine_too(environment):
    others = {name: version for name, version in GOOD.items() if not name.startswith("onedl")}
    for mmcv in ("mmcv", "mmcv-lite"):
        packages = others | {"mmdet": "3.3.0", mmcv: "2.1.0", "mmengine": "0.10.7"}
        environment(packages | {"setuptools": "80.9.0"})
        report = doctor.diagnose()
        assert report.problems == ()
        assert "use_safe_loading()" in dict(report.facts)["checkpoints"]
        environment(packages | {"setuptools": "84.2.1"})
        (problem,) = doctor.diagnose().problems
        assert "needs pkg_resources" in problem.what and problem.mend == 'pip install "setuptools<81"'


@pytest.mark.parametrize(
    ("module", "error", "mend"),
    [
        ("cv2", ImportError("libGL.so.1: cannot open shared object file"), "opencv-python-headless"),
        ("torchvision", RuntimeError("operator torchvision::nms does not exist"), "torch torchvision"),
        ("pycocotools", ValueError("numpy.dtype size changed"), "pycocotools==2.0.11"),
    ],
)
def test_a_package_that_cannot_be_imported_is_a_problem(environment, monkeypatch, module, error, mend):
    environment(GOOD)
    importable = requirements.is_importable
    monkeypatch.setattr(doctor, "is_importable", lambda name: name == "cv2" or importable(name))

    def import_module(name):
        if name == module:
            raise error

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    (problem,) = doctor.diagnose().problems
    assert module in problem.what and str(error) in problem.what
    assert problem.mend.startswith("pip install --force-reinstall ") and problem.mend.endswith(mend)


def test_compiled_operators_that_cannot_be_imported_are_a_problem(environment, monkeypatch):
    environment(GOOD)
    monkeypatch.setattr(mmcv_ops, "find_compiled", lambda: "site-packages/mmcv/_ext.so")
    monkeypatch.setattr(
        doctor.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError("undefined symbol"))
    )
    problem = doctor.diagnose().problems[-1]
    assert "_ext.so cannot be imported: undefined symbol" in problem.what
    assert "pip uninstall -y onedl-mmcv && pip install --no-deps --no-cache-dir onedl-mmcv==" in problem.mend


def test_the_doctor_works_without_rich(environment, monkeypatch, capsys):
    environment({name: version for name, version in GOOD.items() if name != "rich"})
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "onedl-mmcv 2.3.6" in printed and "PROBLEM rich is not installed\n  pip install rich" in printed


def test_options_are_refused(capsys):
    assert doctor.main(["--help"]) == 0
    assert doctor.main(["--fix"]) == 2
    assert "usage" in capsys.readouterr().out


def test_tells_how_packed_networks_run(monkeypatch):
    from mmbivit.packed import kernels

    facts = dict(doctor.diagnose().facts)
    assert kernels.available_paths()[0] in facts["packed networks"]
    monkeypatch.setattr(kernels.Kernels, "_load", staticmethod(lambda: None))
    monkeypatch.setattr(kernels, "KERNELS", kernels.Kernels())
    assert "no native kernels; install mmbivit again" in dict(doctor.diagnose().facts)["packed networks"]
