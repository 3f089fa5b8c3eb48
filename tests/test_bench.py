"""The timing door runs and reports; how fast anything is, no test says."""

import importlib
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from qlora_jax import bench
from qlora_jax.benchmarks import kernels, programs, shapes, tables
from qlora_jax.benchmarks.shapes import Size
from qlora_jax.nf4.kernels import MATMUL_DX_TARGET, MATMUL_TARGET

TINY = ["kernels", "--device", "cpu", "--quick", "--shapes", "64x32", "--rows", "1", "3"]


def check_spread(values):
    assert 0 < values["low"] <= values["median"] <= values["high"] < math.inf


def check_description(report):
    assert {"qlora_jax", "python", "jax", "jaxlib"} == report["versions"].keys()
    assert report["cpu"]
    assert report["cores"] >= 1
    assert report["device"] == report["platform"] == "cpu"
    assert report["dispatch"]["asked"] == "auto"
    assert report["instruction_set"] in ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def test_kernels_as_json(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert bench.main([*TINY, "--json", "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == report
    assert list(tmp_path.iterdir()) == [out]
    check_description(report)
    assert report["left_out"] == 0
    cases = [(r["op"], r["in"], r["out"], r["rows"], r["dtype"]) for r in report["results"]]
    assert cases == [(op, 64, 32, m, "bfloat16") for m in (1, 3) for op in ("forward", "dx")]
    for result in report["results"]:
        assert result["route"] == "ffi"
        assert result["errors"] == {}
        assert result["seconds"].keys() == {"ffi", "xla", "dense"}
        assert result["ratio"].keys() == {"xla", "dense"}
        assert result["distance"].keys() == {"ffi", "xla"}
        assert max(result["distance"].values()) < 1e-2
        flops, own = 2 * result["rows"] * 64 * 32, result["seconds"]["ffi"]["median"]
        assert result["flops_per_second"]["ffi"] == pytest.approx(flops / own)
        moved = 64 * 32 * (0.5 + 1 / 64 + 1 / 4096) + 2 * result["rows"] * (64 + 32)
        assert result["bytes_per_second"] == pytest.approx(moved / own)
        for spread in (*result["seconds"].values(), *result["ratio"].values()):
            check_spread(spread)
    assert report["copy"]["bytes_per_second"] > 0
    assert [(case["in"], case["out"]) for case in report["dequantize"]] == [(64, 32)]
    assert report["dequantize"][0]["of_copy"] > 0
    assert len(report["bars"]) == 10
    assert {bar["holds"] for bar in report["bars"]} == {None}  # they are about an H100


def test_kernels_as_tables(capsys):
    assert bench.main(TINY) == 0
    printed = capsys.readouterr().out
    for text in ("64 x 32", "dx", "ffi", "/ dense", "of a copy", "75 % of the published bandwidth", "not judged"):
        assert text in printed


def test_the_peers_are_other_programs_with_the_same_result():
    size = Size(64, 32, 3)
    weights = programs.make_weights(size.shape, "float32", copies=2)
    for op, target in (("forward", MATMUL_TARGET), ("dx", MATMUL_DX_TARGET)):
        xs = programs.make_activations(size, "float32", copies=2)[op]
        sources = {name: programs.packed_product(op, xs, weights, name) for name in ("ffi", "xla")}
        sources["dense"] = programs.dense_product(op, xs, weights)
        compiled = {name: source.compile() for name, source in sources.items()}
        texts = {name: program.compiled.as_text() for name, program in compiled.items()}
        # One call for each copy of the weight, none of them merged.
        assert {name: text.count(f'"{target}"') for name, text in texts.items()} == {"ffi": 2, "xla": 0, "dense": 0}
        # The forward product inside the gradient is left out.
        assert op == "forward" or f'"{MATMUL_TARGET}"' not in texts["ffi"]
        for program in compiled.values():
            before = [result.unsafe_buffer_pointer() for result in program.results]
            program.run(3)
            assert [result.unsafe_buffer_pointer() for result in program.results] == before
        ours = compiled["ffi"].last_result()
        assert ours.shape == ((3, 32) if op == "forward" else (3, 64))
        for peer in ("xla", "dense"):
            assert np.abs(ours - compiled[peer].last_result()).max() < 1e-4


def test_a_wrong_result_is_an_error_of_its_case(monkeypatch):
    honest = programs.packed_product

    def wrong(op, xs, weights, name):
        return honest(op, [x * 1.05 for x in xs] if name == "xla" else xs, weights, name)

    monkeypatch.setattr(kernels, "packed_product", wrong)
    settings = kernels.Settings(((64, 32),), (2,), ("bfloat16",), repeats=2, copy_bytes=1024)
    for case in kernels.run_sweep(settings).results:
        assert case["errors"].keys() == {"xla"}
        assert "away from the dense product's" in case["errors"]["xla"]


def test_a_program_that_fails_leaves_its_error_and_the_others_go_on(monkeypatch):
    def fail(op, xs, weights):
        raise RuntimeError("no memory")

    monkeypatch.setattr(kernels, "dense_product", fail)
    monkeypatch.setattr(kernels, "dequantized", lambda weights, name: fail("", None, weights))
    settings = kernels.Settings(((64, 32),), (2,), ("bfloat16",), repeats=2, copy_bytes=1024)
    sweep = kernels.run_sweep(settings)
    for case in sweep.results:
        assert case["errors"] == {"dense": "RuntimeError: no memory"}
        assert case["seconds"].keys() == {"ffi", "xla"}
    assert sweep.dequantize[0]["errors"] == {"ours": "RuntimeError: no memory"}
    _shown(tables.kernels_table(sweep.results))
    _shown(tables.memory_table({"copy": sweep.copy, "dequantize": sweep.dequantize}))


def test_our_own_failure_is_shown(monkeypatch):
    monkeypatch.setattr(kernels, "packed_product", lambda *_: 1 / 0)
    settings = kernels.Settings(((64, 32),), (2,), ("bfloat16",), repeats=2, copy_bytes=1024)
    results = kernels.run_sweep(settings).results
    assert results[0]["errors"]["ffi"].startswith("ZeroDivisionError")
    assert "failed" in _shown(tables.kernels_table(results))


def test_when_time_is_up_what_is_left_out_is_counted_and_the_rest_written(tmp_path):
    out = tmp_path / "bench.json"
    assert bench.main([*TINY, "--minutes", "0", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["left_out"] == 4
    assert report["results"] == []
    assert len(report["dequantize"]) == 1


def test_every_case_is_written_at_once(monkeypatch, tmp_path):
    out = tmp_path / "bench.json"
    honest = kernels.measure

    def interrupted(size, *args):
        if size.rows == 3:
            raise KeyboardInterrupt
        return honest(size, *args)

    monkeypatch.setattr(kernels, "measure", interrupted)
    assert bench.main([*TINY, "--out", str(out)]) == 130
    assert [case["rows"] for case in json.loads(out.read_text())["results"]] == [1, 1]


def test_the_cpu_without_peers_as_tables(capsys):
    assert bench.main(["cpu", "--quick", "--shapes", "64x32", "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    for text in ("64 x 32", "/ XLA bf16", "quantize: GB", "the speed of torch's dense bf16 linear", "not judged"):
        assert text in printed
    assert "/ torch bf16" not in printed


def test_datatypes_as_json_and_as_a_table(monkeypatch, tmp_path, capsys):
    from qlora_jax.benchmarks import datatypes

    losses = np.linspace(2.0, 3.0, 8)
    types = (datatypes.BASELINE, datatypes.Datatype("nf4", double_quant=True))
    lines = [datatypes._line(own, losses + rise, losses) for own, rise in zip(types, (0, 0.25), strict=True)]
    study = {
        "model": "tiny",
        "text": {"windows": 8, "context": 64, "source": "docstrings"},
        "results": [line | {"relative_squared_error": 0.01, "seconds": 1.0} for line in lines],
    }

    def run_study(types, *, windows, after_each):
        assert (types, windows) == (datatypes.DATATYPES, 8)
        after_each(study)

    monkeypatch.setattr(datatypes, "run_study", run_study)
    out = tmp_path / "datatypes.json"
    assert bench.main(["datatypes", "--windows", "8", "--out", str(out)]) == 0
    printed, report = capsys.readouterr().out, json.loads(out.read_text())
    check_description(report)
    assert report["results"] == study["results"]
    for text in ("nf4+dq/64", "+0.2500", "15.64", "8 windows of 64 tokens"):
        assert text in printed


def test_mistakes_are_told_before_anything_is_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "run_sweep", lambda *_: pytest.fail("timed"))
    (tmp_path / "file").touch()
    (tmp_path / "libbitsandbytes_cuda130.so").write_text("no library")
    library = str(tmp_path / "libbitsandbytes_cuda130.so")
    for arguments, problem in (
        (["--out", str(tmp_path)], "is a folder"),
        (["--out", str(tmp_path / "file" / "x.json")], "is no folder"),
        (["--shapes", "4096*4096"], "'4096*4096' is no shape"),
        (["--rows", "0"], "'0' is no whole number"),
        (["--minutes", "-1"], "'-1' is no number of minutes"),
        (["--bitsandbytes", str(tmp_path / "none.so")], "none.so is no file"),
        (["--bitsandbytes", library], "CUDA"),
        (["--device", "gpu"], "--device gpu, but JAX runs on cpu"),
        (["--devise", "gpu"], "did you mean --device?"),
    ):
        assert bench.main(arguments) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert "fix:" in error


def test_missing_kernels_are_a_mistake_that_can_be_mended(monkeypatch, capsys):
    loaded = importlib.import_module("qlora_jax.nf4.kernels")
    monkeypatch.setitem(loaded._REPORT, "cpu", "not loaded: No module named '_cpu'")
    assert bench.main(["--quick"]) == 2
    error = capsys.readouterr().err
    assert "No module named '_cpu'" in error
    assert "qlora_jax.doctor" in error


def test_on_a_gpu_other_routes_are_timed_around_the_one_that_is_taken(monkeypatch):
    weights = programs.make_weights((128, 64), "bfloat16", copies=2)
    fragments = weights.rows.to_layout("fragments")
    monkeypatch.setattr(kernels, "_on_gpu", lambda: True)
    monkeypatch.setitem(importlib.import_module("qlora_jax.nf4.kernels")._REPORT, "cuda", "loaded")
    taken = {rows: kernels.route("forward", rows, fragments, "bfloat16") for rows in (1, 64, 65, 4096)}
    assert taken == {1: "skinny", 64: "skinny", 65: "tile", 4096: "dequantize"}
    timed = {rows: kernels.routes(rows, taken[rows], fragments, "bfloat16") for rows in taken}
    assert timed[1] == ["skinny"]
    assert timed[64] == ["skinny", "tile", "dequantize"]
    assert timed[4096] == ["dequantize", "tile"]
    assert kernels.routes(1, kernels.route("dx", 1, weights.rows, "bfloat16"), weights.rows, "bfloat16") == [
        "dequantize"
    ]


def test_the_sweep_of_a_gpu_has_every_shape_and_begins_with_what_tells_most():
    gpu = shapes.gpu_shapes()
    assert len(gpu) == len(set(gpu)) == 15
    every = shapes.sizes(gpu, shapes.GPU_ROWS)
    assert len(set(every)) == 15 * 12
    assert {size.models[0] for size in every[:36]} == {"7B"}
    assert [size.rows for size in every[:6]] == [16] * 3 + [2048] * 3
    assert sorted(shapes.GPU_ROWS) == [1, 8, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    assert Size(8192, 8192, 1).models == ["65B", "70B"]


def _shown(table) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()
