"""The timing door with `--peers`: what is measured in turns with another Python, and what goes wrong there."""

import io
import json
import math

import pytest
from rich.console import Console

from qlora_jax import bench
from qlora_jax.benchmarks import tables


def check_spread(values):
    assert 0 < values["low"] <= values["median"] <= values["high"] < math.inf


def check_peer(report, names):
    assert report["peers"].keys() == names
    for versions in report["peers"].values():
        assert versions == {"python": "fake", "threads": str(report["threads"])}


def test_the_cpu_beside_a_peer_as_json(fake_python, tmp_path, capsys):
    out = tmp_path / "cpu.json"
    tiny = ["cpu", "--quick", "--shapes", "64x32", "--rows", "1", "128", "--peers", str(fake_python)]
    assert bench.main([*tiny, "--json", "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == report
    check_peer(report, {"peers"})
    assert report["eval_kernel"] == "bitsandbytes"
    cases = [(r["op"], r["in"], r["out"], r["rows"], r["copies"]) for r in report["results"]]
    assert cases == [(op, 64, 32, m, copies) for m, copies in ((1, 2), (128, 1)) for op in ("forward", "dx")]
    for result in report["results"]:
        modes = ["bnb_train", "bnb_eval"] if result["op"] == "forward" else ["bnb_train"]
        assert result["errors"] == {}
        assert list(result["ratio"]) == ["dense", "torch", *modes]
        assert 0 <= result["other_load"] <= 1
        assert result["distance"].keys() == set(modes)
        assert max(result["distance"].values()) < 1e-2
        assert result["bitsandbytes"] == "bnb_train"  # which is faster at this peer
        # The peer's own clock: a millisecond for each run, which is as many products as there are copies.
        assert result["seconds"]["torch"]["median"] == pytest.approx(1e-3 / result["copies"])
        ours, torch = result["seconds"]["ours"]["median"], result["seconds"]["torch"]["median"]
        assert result["ratio"]["torch"]["median"] == pytest.approx(ours / torch)
        assert ("of_float32" in result) == (result["op"] == "forward" and result["rows"] == 128)
        for spread in (*result["seconds"].values(), *result["ratio"].values()):
            check_spread(spread)
    (quantized,) = report["quantize"]
    rate = 2 * 64 * 32 / quantized["seconds"]["ours"]["median"] / report["threads"]
    assert quantized["bytes_per_second_and_core"]["ours"] == pytest.approx(rate)
    assert len(report["bars"]) == 15


def test_a_call_that_fails_at_the_peer_is_a_users_error(fake_python, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_PEER", "fails")
    assert bench.main(["cpu", "--quick", "--shapes", "64x32", "--rows", "1", "--peers", str(fake_python)]) == 2
    error = capsys.readouterr().err
    assert "a peer cannot do what is to be measured\n  why: RuntimeError: no such product" in error
    assert "Traceback" not in error


def test_a_wrong_result_is_no_peer_to_be_faster_than(fake_python, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FAKE_PEER", "wrong")
    out = tmp_path / "cpu.json"
    tiny = ["cpu", "--quick", "--shapes", "64x32", "--rows", "1", "--peers", str(fake_python)]
    assert bench.main([*tiny, "--out", str(out)]) == 0
    forward = json.loads(out.read_text())["results"][0]
    assert "away from ours" in forward["errors"]["bnb_eval"]
    assert "bnb_eval" not in forward["ratio"]
    assert forward["bitsandbytes"] == "bnb_train"
    assert "wrong" in capsys.readouterr().out


def test_a_step_beside_peers_as_json(fake_python, capsys):
    assert bench.main(["step", "--quick", "--peers", str(fake_python), "--qwix", str(fake_python), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    check_peer(report, {"peers", "qwix"})
    assert [run["name"] for run in report["results"]] == ["ours", "peft", "qwix"]
    assert report["trained"] == {"ours": 34816, "peft": 34816, "qwix": 34816}
    assert report["losses"]["ours"] == pytest.approx(math.log(256), abs=0.5)
    for run in report["results"]:
        check_spread(run["seconds"])
        check_spread(run["ratio"])
        assert run["tokens_per_second"] == pytest.approx(2 * 16 / run["seconds"]["median"])
    assert [bar["cases"] for bar in report["bars"]] == [1, 1]
    assert "Qwix" in shown(report)


def test_a_step_of_the_demo_beside_a_peer_as_json(monkeypatch, tiny_llama, fake_python, capsys):
    from qlora_jax.training import demo

    model, rows = tiny_llama
    monkeypatch.setattr(demo, "fetch_demo_model", lambda say: model)
    monkeypatch.setattr(demo, "write_demo_rows", lambda folder: (rows, rows))
    assert bench.main(["demo", "--quick", "--json", "--peers", str(fake_python)]) == 0
    report = json.loads(capsys.readouterr().out)
    check_peer(report, {"peers"})
    assert [run["name"] for run in report["results"]] == ["ffi", "peft", "peft_answers"]
    for run in report["results"]:
        assert run["steps"] == 3
        check_spread(run["seconds"])
    ours, peft, _ = report["results"]
    assert ours["ratio"] == {"median": 1}
    assert peft["seconds"]["median"] == pytest.approx(1e-3)
    assert peft["ratio"]["median"] == pytest.approx(ours["seconds"]["median"] / 1e-3)
    assert "QLoRA, compiled kernels" in shown(report)


def shown(report) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(tables.runs_table("a step", report["results"]))
    return console.file.getvalue()
