"""The timing door runs and reports; how fast anything is, no test says."""

import io
import json
import math
import shutil
import string

import pytest
from rich.console import Console

from qlora_jax import bench
from qlora_jax.nf4.kernels import MATMUL_DX_TARGET, MATMUL_TARGET


def check_spread(values):
    assert 0 < values["low"] <= values["median"] <= values["high"] < math.inf


def check_description(report):
    assert {"qlora_jax", "python", "jax", "jaxlib"} == report["versions"].keys()
    assert report["cpu"]
    assert report["cores"] >= 1
    assert report["instruction_set"] in ("portable", "avx2", "avx512", "avx512_bf16")


@pytest.fixture
def tiny_llama(tmp_path, golden_dir):
    """A two-layer model with a tokenizer of single characters, and a file of rows."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    model = tmp_path / "model"
    shutil.copytree(golden_dir / "interop" / "tiny_llama_bf16", model)
    characters = ["<unk>", "</s>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.save(str(model / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(names))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"{n}+1", "output": f"{n + 1}"}) + "\n" for n in range(40)))
    return model, rows


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "QUICK_SHAPES", ((64, 32),))
    monkeypatch.setattr(bench, "QUICK_ROWS", (1, 3))


def test_kernels_as_json(tiny, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert bench.main(["kernels", "--quick", "--json", "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == report
    check_description(report)
    cases = [(r["op"], r["in"], r["out"], r["rows"], r["dtype"]) for r in report["results"]]
    assert cases == [(op, 64, 32, m, "bfloat16") for m in (1, 3) for op in ("forward", "dx")]
    for result in report["results"]:
        assert result["seconds"].keys() == {"ffi", "xla", "dense"}
        assert result["ratio"].keys() == {"xla", "dense"}
        assert result["gflops"] == pytest.approx(
            2e-9 * result["rows"] * result["in"] * result["out"] / result["seconds"]["ffi"]["median"]
        )
        for spread in (*result["seconds"].values(), *result["ratio"].values()):
            check_spread(spread)


def test_kernels_as_a_table(tiny, capsys):
    assert bench.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "64 x 32" in printed
    assert "dx" in printed


def test_the_peers_are_other_programs_with_the_same_result():
    programs = bench.kernel_programs(bench.kernel_weights(64, 32, "float32"), 3)
    texts = {op: {name: call.args[0].as_text() for name, call in calls.items()} for op, calls in programs.items()}
    for op, target in (("forward", MATMUL_TARGET), ("dx", MATMUL_DX_TARGET)):
        assert {name for name, text in texts[op].items() if f'"{target}"' in text} == {"ffi"}
        ours, xla, dense = (call() for call in programs[op].values())
        assert ours.shape == ((3, 32) if op == "forward" else (3, 64))
        for peer in (xla, dense):
            assert abs(ours - peer).max() < 1e-4
    # The forward product inside the gradient is left out.
    assert f'"{MATMUL_TARGET}"' not in texts["dx"]["ffi"]


def test_calls_are_timed_in_turns():
    order = []
    seconds = bench.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * 4


def test_a_step_of_the_demo_as_json(monkeypatch, tiny_llama, capsys):
    from qlora_jax.training import demo

    model, rows = tiny_llama
    monkeypatch.setattr(demo, "fetch_demo_model", lambda say: model)
    monkeypatch.setattr(demo, "write_demo_rows", lambda folder: (rows, rows))
    assert bench.main(["demo", "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    check_description(report)
    (run,) = report["results"]
    assert run["name"] == "ffi"
    assert run["steps"] == 3
    assert run["ratio"] == 1
    check_spread(run["seconds"])
    assert "QLoRA, compiled kernels" in _shown(bench.demo_table(report["results"]))


def test_mistakes_are_told_before_anything_is_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "time_kernels", lambda **_: pytest.fail("timed"))
    (tmp_path / "file").touch()
    for out, problem in ((tmp_path, "is a folder"), (tmp_path / "file" / "x.json", "is no folder")):
        assert bench.main(["--out", str(out)]) == 2
        assert problem in capsys.readouterr().err


def test_missing_kernels_are_a_mistake_that_can_be_mended(monkeypatch, capsys):
    from qlora_jax.nf4 import kernels

    monkeypatch.setitem(kernels._REPORT, "cpu", "not loaded: No module named '_cpu'")
    assert bench.main(["--quick"]) == 2
    error = capsys.readouterr().err
    assert "No module named '_cpu'" in error
    assert "pip install" in error


def _shown(table) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()
