"""Installation. The tools and configs travel inside the wheel as ``mmbivit/.mim``, where MM tools look for them."""

import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "mmbivit" / "__init__.py").read_text(), re.MULTILINE)[1]
SHIPPED = ("configs", "tools", "model-index.yml")
KERNELS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "mmbivit" / "packed" / "csrc").iterdir())


class BuildWithConfigs(build_py):
    """Copies configs, tools and the model index into the wheel."""

    def run(self) -> None:
        """Build the package, then add what it ships."""
        if self.editable_mode:
            super().run()
            return
        # setuptools reuses this folder: files deleted from the checkout would stay in the wheel
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        target = Path(self.build_lib) / "mmbivit" / ".mim"
        for name in SHIPPED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "benchmarks")  # which are for a checkout
                shutil.copytree(ROOT / name, target / name, ignore=ignored, dirs_exist_ok=True)
            else:
                shutil.copy2(ROOT / name, target / name)

    def get_source_files(self) -> list[str]:
        """List what a source distribution needs, so that a wheel can be built from it."""
        shipped = [path for name in SHIPPED for path in (ROOT / name, *(ROOT / name).rglob("*"))]
        files = [str(path.relative_to(ROOT)) for path in shipped if path.is_file() and "__pycache__" not in path.parts]
        return [*super().get_source_files(), *files, *KERNELS]


class BuildKernels(build_ext):
    """Compiles the kernels of packed networks: plain C++, no headers of Python or torch."""

    def run(self) -> None:
        """Compile; beside the sources, nothing stays of an earlier version, which would be loaded in its place."""
        if self.inplace or self.editable_mode:
            for suffix in (".so", ".pyd"):
                for built in (ROOT / "mmbivit" / "packed").glob(f"_kernels*{suffix}"):
                    built.unlink()
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        """Leave the version of Python out of the name of the library, which ctypes loads."""
        return str(Path(*fullname.split("."))) + (".pyd" if sys.platform == "win32" else ".so")

    def build_extension(self, extension: Extension) -> None:
        """Compile with OpenMP, or on one thread where the compiler has none (Apple's clang)."""
        msvc = self.compiler.compiler_type == "msvc"
        # Words of bits are also written by halves, hence no strict aliasing. Products and sums that are not fused by
        # name are not fused, so that positions on maps are those of torchvision.
        unix = ["-std=c++17", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wno-psabi", "-ffp-contract=off"]
        unix += ["-O1", "-g"] if self.debug else ["-O3", "-g0"]  # for sanitizers, with which -O3 compiles twice as long
        flags = ["/std:c++17", "/O2"] if msvc else unix
        threads = ["/openmp"] if msvc else ["-fopenmp"]
        try:
            extension.extra_compile_args = [*flags, *threads]
            extension.extra_link_args = [] if msvc else threads
            super().build_extension(extension)
        except (CompileError, LinkError):
            extension.extra_compile_args, extension.extra_link_args = flags, []
            super().build_extension(extension)

    def get_export_symbols(self, extension: Extension) -> list[str]:
        """Export what the sources say; the library is no Python module."""
        return extension.export_symbols


class PlatformWheel(bdist_wheel):
    """Tags a wheel by the platform alone: the kernels know nothing of Python, so one wheel serves all versions."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag, such as ``py3-none-linux_x86_64``."""
        return "py3", "none", super().get_tag()[2]


setup(
    name="mmbivit",
    version=VERSION,
    description="Detectors with 1-bit Vision Transformer backbones for MMDetection (SI-BiViT)",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["binary neural network", "vision transformer", "object detection", "quantization", "mmdetection"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["mmbivit", "mmbivit.*"]),
    package_data={
        "mmbivit": ["py.typed"],
        "mmbivit.report": ["templates/*.html"],
        "mmbivit.serve": ["static/*", "templates/*.html"],
    },
    cmdclass={"bdist_wheel": PlatformWheel, "build_ext": BuildKernels, "build_py": BuildWithConfigs},
    ext_modules=[
        Extension(
            "mmbivit.packed._kernels",
            sources=[path for path in KERNELS if path.endswith(".cpp")],
            depends=KERNELS,
            language="c++",
            optional=True,  # without a compiler, packed networks run on a slow torch reference
        )
    ],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",  # torch.load(weights_only=True) is not safe before
        "torchvision",
        "timm>=1.0",
        "numpy",
        "pycocotools",
        "safetensors",
        "rich",
        "matplotlib",
        "jinja2",
    ],
    extras_require={
        # Two families that own the same folders: install one of them. None declares all that it imports.
        "onedl": ["onedl-mmdetection>=3.5,<4", "onedl-mmengine>=0.10.12", "onedl-mmcv>=2.3"],
        # mmcv-lite is mmcv without compiled ops, as a wheel; mmcv 2.1.0 itself does not build with today's setuptools.
        # Its mmengine imports pkg_resources, which setuptools 81 and later do not promise any more.
        "openmmlab": ["mmdet==3.3.0", "mmcv-lite==2.1.0", "mmengine>=0.10.7,<1", "setuptools<81"],
        # Other runtimes, for ONNX export and tools/benchmarks/packed_inference.py; psutil for tools/benchmarks/soak.py
        "benchmark": ["onnx", "onnxruntime", "onnxscript", "openvino", "psutil"],
        "hub": ["huggingface_hub>=0.30"],
        "demo": ["scikit-learn", "scikit-image"],
        "serve": ["flask>=3", "waitress>=3"],
        "docs": ["sphinx>=8", "myst-parser>=4", "furo"],
        # playwright looks at pages in a Chromium or Chrome of the machine, where there is one
        "dev": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "check-jsonschema",
            "setuptools>=77",
            "wheel",
            "tensorboard",
            "playwright",
        ],
    },
)
