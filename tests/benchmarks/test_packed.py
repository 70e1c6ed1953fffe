import copy
import ctypes
import io
import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from mmbivit.binary import BinaryLinear
from mmbivit.packed import kernels
from mmbivit_benchmarks.packed import make_report, memory, run, timing
from mmbivit_benchmarks.packed.kernels import breakdown, gemm_layers, measure_gemm
from mmbivit_benchmarks.packed.networks import make_networks
from mmbivit_benchmarks.packed.report import GOALS, Goal, fastest_float, verdict
from mmbivit_benchmarks.packed.runtimes import RUNTIMES, Network, Runtime, Unavailable

ROOT = Path(__file__).parents[2]
TINY = dict(embed_dims=16, depths=(1, 2), num_heads=(1, 2))
SHAPE = (1, 60, 64)


@pytest.fixture(scope="module")
def networks():
    return make_networks(arch=TINY)


@pytest.fixture
def fake_runtime(monkeypatch):
    """Add a runtime to the table: ``fake_runtime(name, outputs=..., **changes)``."""

    def add(name: str, outputs=None, **changes) -> None:
        def export(network, images, folder):
            (folder / name).write_bytes(b"1234")
            return folder / name

        defaults = dict(title=name, kind="float32", export=export, start=lambda *_: lambda: outputs)
        monkeypatch.setitem(RUNTIMES, name, Runtime(**{**defaults, **changes}))

    return add


@torch.no_grad()
def features(network: Network) -> list[torch.Tensor]:
    """What a network makes of the benchmark's images of ``SHAPE``, in float64 with no bit flipped by rounding."""
    images = torch.randn(1, 3, 60, 64, generator=torch.Generator().manual_seed(1))
    return [tensor.float() for tensor in copy.deepcopy(network.model).double()(images.double())]


def text_of(tables) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=132, markup=False).print(tables)
    return file.getvalue().splitlines()


def cells(lines: list[str], start: str) -> list[str]:
    """The cells of the first table row that starts so."""
    row = next(line for line in lines if line.lstrip("| ").startswith(start) and "|" in line)
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_networks_are_the_compared_ones(networks):
    floats, binary = networks[False].model, networks[True].model
    assert not any(isinstance(module, BinaryLinear) for module in floats.modules())
    assert floats.stages[0].blocks[0].mlp.fc1.out_features == 4 * 16
    assert binary.stages[0].blocks[0].mlp.fc1.out_features == 3 * 16
    assert binary.stages[0].blocks[0].mlp.si.fc1.out_features == 49
    assert not floats.training and not binary.training
    # Nothing that a fresh network has at 0 or 1 stays there.
    state = binary.state_dict()
    for suffix in ("alpha", "gamma", "zeta", "fc1.bias", "running_mean", "norm.weight", "norm.bias"):
        found = [value for key, value in state.items() if key.endswith(suffix)]
        assert found and all(value.unique().numel() > 1 for value in found), suffix
    again = make_networks(arch=TINY)[True].model.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in state.items())


def test_interleave_takes_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.interleave(runs, rounds=2, seconds=0, pause=0)
    assert calls == list("aabbaabb")  # each visit: one call that does not count, one that does
    assert {name: len(values) for name, values in times.items()} == dict(a=2, b=2)


def test_interleave_measures_milliseconds(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(timing, "time", clock)
    slow = timing.interleave(dict(slow=lambda: clock.sleep(0.02)), rounds=1, seconds=0.05, pause=0)["slow"]
    assert slow == pytest.approx([20, 20, 20])


def test_geometric_mean():
    assert timing.geometric_mean([2, 8]) == pytest.approx(4)
    assert timing.geometric_mean([1, 10, 100]) == pytest.approx(10)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), timing.use_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before


def signal_stack() -> bytes:
    """What Linux knows of this thread's signal stack."""
    content = ctypes.create_string_buffer(24)
    if sys.platform == "linux":
        assert ctypes.CDLL(None).sigaltstack(None, content) == 0
    return content.raw


def test_runtimes_agree(networks, tmp_path):
    """Each float runtime computes what torch does; those that are not installed say so."""
    names = [name for name in RUNTIMES if name != "compile"]
    before = signal_stack()
    rows = timing.measure_size(networks, SHAPE, names, rounds=1, threads=1, folder=tmp_path)
    # OpenVINO's own would be freed with its network, and the thread die at its next signal.
    assert signal_stack() == before
    assert list(rows) == names
    for name, row in rows.items():
        if "problem" in row:
            assert "pip install 'mmbivit[benchmark]'" in row["problem"] or "bfloat16" in row["problem"], row
            continue
        assert row["bytes"] > 0 and min(row["ms"]) > 0
        bound = dict(float32=1e-5, bfloat16=0.05, int8=0.5).get(row["kind"], 0.5)
        assert row["deviation"] <= bound, name
    assert rows["torch"]["deviation"] == 0
    assert rows["packed"]["deviation"] == 0  # of the network in exact arithmetic; float32 may flip bits
    assert rows["packed"]["bytes"] < rows["simulated"]["bytes"] / 3


def test_rows_say_why_there_is_no_time(networks, tmp_path, fake_runtime):
    def crash(*args):
        raise RuntimeError("no such operator\nstack")

    expected = features(networks[False])
    fake_runtime("same", expected)
    fake_runtime("wrong", [tensor * 1.01 for tensor in expected])
    fake_runtime("nan", [tensor * math.nan for tensor in expected])
    fake_runtime("fewer", expected[:1])
    fake_runtime("missing", packages=("json", "no_such_package"))
    fake_runtime("crashing", start=crash)
    fake_runtime("int8", [tensor * 1.01 for tensor in expected], kind="int8")
    names = ["same", "wrong", "nan", "fewer", "missing", "crashing", "int8"]
    rows = timing.measure_size(networks, SHAPE, names, rounds=1, threads=1, folder=tmp_path)
    problems = {name: row["problem"] for name, row in rows.items() if "problem" in row}
    assert set(problems) == {"wrong", "nan", "fewer", "missing", "crashing"}
    assert problems["missing"] == "no_such_package not installed: pip install 'mmbivit[benchmark]'"
    assert problems["crashing"] == "failed: RuntimeError: no such operator"
    assert problems["wrong"] == "its outputs differ from torch's by 1.0e-02 of the largest value: not timed"
    assert problems["fewer"] == "its outputs have the shapes [(1, 16, 15, 16)]"
    assert rows["same"]["bytes"] == 4
    assert rows["int8"]["deviation"] == pytest.approx(0.01, rel=1e-3)


def test_packed_is_compared_by_share(networks, tmp_path, fake_runtime):
    expected = features(networks[True])
    outputs = [tensor.clone() for tensor in expected]
    outputs[0].flatten()[:3] += expected[0].abs().max()
    outputs[1].flatten()[:5] += 1e-5 * expected[1].abs().max()
    fake_runtime("flipped", outputs, kind="1 bit", binary=True)
    rows = timing.measure_size(networks, SHAPE, ["flipped"], rounds=1, threads=1, folder=tmp_path)
    assert rows["flipped"]["deviation"] == 3 / sum(tensor.numel() for tensor in expected)


def allocate(megabytes: int, file, images, threads):
    """Take that much for the network, and twice that for inference."""
    network = torch.ones(megabytes * 250_000)
    return lambda: network.repeat(2)


class Allocating:
    """Picklable ``start`` of a runtime."""

    def __init__(self, megabytes: int):
        self.megabytes = megabytes

    def __call__(self, *args):
        return allocate(self.megabytes, *args)


def touch(network, images, folder):
    (folder / "file").touch()
    return folder / "file"


def test_memory_of_a_known_allocation(networks, tmp_path):
    runtime = Runtime("allocating", "float32", touch, Allocating(40))
    cases = [(networks[False], SHAPE, tmp_path / name) for name in ("warm_up", "case")]
    row = memory.measure_memory(runtime, cases, threads=1)
    assert 39e6 <= row["loaded"] - row["before"] < 46e6
    assert 79e6 <= row["peak"] - row["loaded"] < 90e6


def test_peak_forgets_what_was_before():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system cannot reset the peak")
    block = torch.ones(25_000_000)
    del block
    memory.reset_peak()
    assert memory.peak_bytes() - memory.resident_bytes() < 20e6


def test_memory_says_why_there_is_none(networks, tmp_path):
    def fail(*args):
        raise Unavailable("no bits here")

    cases = [(networks[False], SHAPE, tmp_path)]
    missing = Runtime("missing", "float32", touch, fail, packages=("no_such_package",))
    assert "no_such_package not installed" in memory.measure_memory(missing, cases, 1)["problem"]
    failing = Runtime("failing", "float32", fail, fail)
    assert memory.measure_memory(failing, cases, 1) == dict(problem="no bits here")


def test_gemm_layers_of_swin():
    """The shapes of Swin-T with spatial interaction, from the architecture alone."""
    config = dict(arch=dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)))
    network = Network.build(recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0), **config)
    found = {
        name: (rows, layer.in_features, layer.out_features) for name, rows, layer in gemm_layers(network, (1, 224, 224))
    }
    expected = {}
    for stage, (side, channels) in enumerate(((56, 96), (28, 192), (14, 384), (7, 768)), start=1):
        tokens = side * side
        expected[f"stage {stage} qkv, fc1"] = (tokens, channels, 3 * channels)
        expected[f"stage {stage} proj"] = (tokens, channels, channels)
        expected[f"stage {stage} fc2"] = (tokens, 3 * channels, channels)
        expected[f"stage {stage} si.fc1, si.fc2"] = (tokens // 49 * channels, 49, 49)
        if stage < 4:
            expected[f"stage {stage} merging"] = (tokens // 4, 4 * channels, 2 * channels)
    assert found == expected


def test_gemm_and_breakdown(networks):
    rows = measure_gemm(networks[True], (1, 56, 56), rounds=1, threads=1)
    assert {(row["k"], row["n"]) for row in rows} >= {(16, 48), (16, 16), (48, 16), (64, 32), (49, 49)}
    assert all(row["float_ms"] > 0 and row["packed_ms"] > 0 for row in rows)
    phases = breakdown(networks[True], SHAPE, runs=2, threads=1)
    if kernels.active_path() == "reference":
        assert phases == "the kernels' path 'reference' does not measure its phases"
    else:
        assert {"qkv", "fc1", "fc2", "rest: Python, waiting threads"} < set(phases)
        assert sum(phases.values()) > 0
    with kernels.use_path("reference"):
        assert "'reference'" in breakdown(networks[True], SHAPE, runs=1, threads=1)


def test_breakdown_says_what_is_wrong(networks):
    assert "BinarySwinTransformer" in breakdown(Network({}, nn.Linear(1, 1)), SHAPE, runs=1, threads=1)


@pytest.mark.parametrize(
    ("more", "value", "expected"),
    [
        (True, 5.0, "aim"),
        (True, 4.99, "must"),
        (True, 2.0, "must"),
        (True, 1.99, "missed"),
        (True, None, "not measured"),
    ],
)
def test_verdict_of_more(more, value, expected):
    assert Goal("", 2, 5, "x", lambda results: None, more=more).verdict(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.3, "aim"), (0.31, "must"), (0.5, "must"), (0.51, "missed")])
def test_verdict_of_less(value, expected):
    assert Goal("", 0.5, 0.3, "x", lambda results: None, more=False).verdict(value) == expected


def results() -> dict:
    """Results as the benchmark returns them, with round numbers."""

    def sizes(scale: float) -> dict:
        times = {"torch": 80, "openvino": 30, "openvino-bf16": 20, "openvino-int8": 15, "packed": 10}
        rows = {
            name: dict(
                title=RUNTIMES[name].title,
                kind=RUNTIMES[name].kind,
                ms=[scale * (ms - 1), scale * ms, scale * (ms + 9)],
                deviation=0.012,
                bytes=4_000_000 if name == "packed" else 100_000_000,
            )
            for name, ms in times.items()
        }
        rows["onnxruntime"] = dict(title="ONNX Runtime", kind="float32", problem="failed: [red] herring")
        return rows

    return dict(
        machine=dict(CPU="Abacus 5", threads="2"),
        sizes={"1 x 224 x 224": sizes(1), "1 x 800 x 1344": sizes(0.5)},
        breakdown={"1 x 224 x 224": dict(qkv=3.0, rest=1.0), "1 x 800 x 1344": "no phases"},
        gemm=[
            dict(layer="stage 1 qkv, fc1", m=3136, k=96, n=288, float_ms=8.0, packed_ms=1.0),
            dict(layer="stage 1 proj", m=3136, k=96, n=96, float_ms=2.0, packed_ms=1.0),
            dict(layer="stage 1 si.fc1, si.fc2", m=6144, k=49, n=49, float_ms=100.0, packed_ms=1.0),
        ],
        memory={
            "torch": dict(title="torch eager", before=100e6, loaded=200e6, peak=500e6),
            "packed": dict(title="packed", before=100e6, loaded=105e6, peak=200e6),
            "compile": dict(title="torch.compile", problem="not measured"),
        },
        memory_size="1 x 800 x 1344",
    )


def test_report():
    lines = text_of(make_report(results()))
    assert cells(lines, "CPU") == ["CPU", "Abacus 5"]
    assert cells(lines, "OpenVINO  ") == ["OpenVINO", "float32", "30.00", "29.00 to 39.00", "3.00x", "1.00x", "1.2e-02"]
    assert cells(lines, "ONNX Runtime") == ["ONNX Runtime", "float32", "", "", "", "", "failed: [red] herring"]
    assert cells(lines, "packed")[2:] == ["10.00", "9.00 to 19.00", "1.00x", "3.00x", "1.20% differ"]
    assert cells(lines, "geometric mean ")[-1] == "4.00x"
    assert cells(lines, "geometric mean of spatial")[-1] == "100.00x"
    assert cells(lines, "qkv") == ["qkv", "3.000", "75.0"]
    assert cells(lines, "all") == ["all", "4.000", "100.0"]
    assert any("no phases" in line for line in lines)
    memory_lines = lines[next(i for i, line in enumerate(lines) if line.startswith("Peak memory")) :]
    assert cells(memory_lines, "torch eager") == ["torch eager", "400.0", "1.00x", "300.0", "1.00x", ""]
    assert cells(memory_lines, "packed") == ["packed", "100.0", "0.25x", "95.0", "0.32x", ""]
    assert cells(memory_lines, "torch.compile")[-1] == "not measured"
    assert max(map(len, lines)) <= 132


def test_verdict():
    lines = text_of(verdict(results()))
    assert cells(lines, "products") == [GOALS[0].text, "4x", "6x", "4.00x", "must", ""]
    speed = ["2.28x", "5x", "3.00x", "must", "OpenVINO; bfloat16: 2.00x"]
    assert cells(lines, "224 x 224") == [GOALS[1].text, *speed]
    assert cells(lines, "800 x 1344")[1:] == ["2.5x", *speed[1:]]
    assert cells(lines, "packed file")[1:] == ["4.2 MB", "3.8 MB", "4.00 MB", "must", ""]
    assert cells(lines, "peak memory")[1:] == ["0.5x", "0.3x", "0.25x", "aim", "without the network 0.32x"]


def test_verdict_without_measurements():
    nothing = dict(sizes={}, gemm="failed: no kernels", memory={}, memory_size=None, machine={}, breakdown={})
    lines = text_of(verdict(nothing))
    assert [cells(lines, goal.text)[3:] for goal in GOALS] == [["", "not measured", ""]] * len(GOALS)
    text_of(make_report(nothing))


def test_fastest_float():
    rows = results()["sizes"]["1 x 224 x 224"]
    assert fastest_float(rows) == "openvino"
    assert fastest_float(rows, ("float32", "bfloat16")) == "openvino-bf16"
    assert fastest_float({}) is None


def test_run_benchmark(monkeypatch):
    shape = (1, 64, 64)
    monkeypatch.setattr(run, "measure_memory", lambda *args: dict(before=1, loaded=2, peak=3))
    found = run.run_benchmark(
        [shape], ["torch", "packed"], 1, 1, memory_shape=shape, arch=TINY, left_out=dict(compile="too long")
    )
    assert json.loads(json.dumps(found)) == found
    assert set(found["sizes"]) == set(found["breakdown"]) == {"1 x 64 x 64"}
    rows = found["sizes"]["1 x 64 x 64"]
    assert list(rows) == ["torch", "packed", "compile"]
    assert rows["compile"]["problem"] == "too long"
    assert len(rows["torch"]["ms"]) >= 1
    assert found["machine"]["threads"] == "1" and found["machine"]["torch"] == torch.__version__.split("+")[0]
    assert found["memory_size"] == "1 x 64 x 64"
    assert found["memory"]["packed"] == dict(title="packed", before=1, loaded=2, peak=3)
    assert text_of(make_report(found))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(runtimes=["tensorflow"]), "unknown runtimes tensorflow; allowed: torch, "),
        (dict(repeats=0), "repeats=0; allowed"),
        (dict(threads=0), "threads=0; allowed"),
        (dict(shapes=[(1, 16, 224)]), "size 1 x 16 x 224; expected batch x height x width, 32 pixels or more"),
    ],
)
def test_refuses_what_makes_no_sense(options, message):
    defaults = dict(shapes=[SHAPE], runtimes=["torch"], repeats=1, threads=1)
    with pytest.raises(ValueError, match=message):
        run.run_benchmark(**{**defaults, **options})


def call_tool(monkeypatch, *options: object) -> dict:
    """Run the tool with a benchmark that only notes its arguments."""
    seen = {}

    def record(*args, **kwargs):
        seen.update(args=args, **kwargs)
        return results()

    monkeypatch.setattr("mmbivit_benchmarks.packed.run_benchmark", record)
    monkeypatch.setattr(sys, "argv", ["packed_inference.py", *map(str, options)])
    runpy.run_path(str(ROOT / "tools" / "benchmarks" / "packed_inference.py"), run_name="__main__")
    return seen


def test_tool(monkeypatch, capsys, tmp_path):
    seen = call_tool(monkeypatch, "--json", tmp_path / "r.json", "--out", tmp_path / "r.txt")
    assert seen["args"] == ([(1, 224, 224), (8, 224, 224), (1, 800, 1344)], list(RUNTIMES), 20, torch.get_num_threads())
    assert seen["memory_shape"] == (1, 800, 1344) and not seen["left_out"]
    assert json.loads((tmp_path / "r.json").read_text()) == results()
    printed = capsys.readouterr().out
    assert (tmp_path / "r.txt").read_text() == printed
    assert "What packed inference must reach" in printed


def test_tool_quick(monkeypatch):
    seen = call_tool(monkeypatch, "--quick")
    assert seen["args"][0] == [(1, 224, 224)] and "compile" not in seen["args"][1] and seen["args"][2] == 5
    assert seen["memory_shape"] is None and set(seen["left_out"]) == {"compile"}
    options = "--quick --sizes 2x64x96 --runtimes torch compile --repeats 3 --threads 1"
    seen = call_tool(monkeypatch, *options.split())
    assert seen["args"] == ([(2, 64, 96)], ["torch", "compile"], 3, 1)
    assert not seen["left_out"]


def test_tool_refuses_a_size(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call_tool(monkeypatch, "--sizes", "224")
    assert "expected batch x height x width, such as 1x224x224, got '224'" in capsys.readouterr().err


def test_deit_is_measured_against_goals_of_its_own():
    arch = dict(embed_dims=16, depths=(2,), num_heads=(2,))
    results = run.run_benchmark([(1, 64, 64)], ["torch", "packed"], 1, 1, network="deit_s", arch=arch)
    rows = results["sizes"]["1 x 64 x 64"]
    assert rows["packed"]["deviation"] < 0.01 and rows["torch"]["deviation"] < 1e-5
    assert [row["layer"] for row in results["gemm"]][:2] == ["stage 1 qkv, fc1", "stage 1 proj"]
    text = "\n".join(text_of(make_report(results)))
    assert "DeiT-S, 1 x 64 x 64" in text and "224 x 224, batch 1, against the fastest float32" in text
    assert "packed file" not in text
    with pytest.raises(ValueError, match="allowed: one, as token mixing of DeiT-S is of one size"):
        run.run_benchmark([(1, 64, 64), (1, 96, 96)], ["torch"], 1, 1, network="deit_s")
