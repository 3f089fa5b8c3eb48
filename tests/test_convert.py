"""The quantizing door: what it prints, and what mistakes are told."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax import convert as door
from qlora_jax.training.options import size_in_bytes


def run(capfd, *arguments: str) -> tuple[int, str, str]:
    code = door.main(list(map(str, arguments)))
    return code, *capfd.readouterr()


def test_a_folder_is_quantized_and_the_next_command_works(tiny_llama, tmp_path, capfd):
    from qlora_jax import generate

    folder, _ = tiny_llama
    code, out, err = run(capfd, folder, tmp_path / "out", "--shard-size", "100KB")
    assert code == 0
    assert "note:" not in err
    assert "0.3 MB in 3 files, 4.13 bits per weight" in out
    assert f"qlora_jax.train model.path={tmp_path / 'out'} data.path=rows.jsonl" in out
    answers = []
    for model in (folder, tmp_path / "out"):
        assert generate.main(["--model", str(model), "--prompt", "1+1", "--max-new-tokens=8"]) == 0
        answers.append(capfd.readouterr().out)
    assert answers[0] == answers[1]


def test_the_demos_model_by_its_name(tiny_llama, tmp_path, capfd, monkeypatch):
    from qlora_jax.training import demo

    monkeypatch.setattr(demo, "fetch_demo_model", lambda say: tiny_llama[0])
    assert run(capfd, "smollm2-demo", tmp_path / "out")[0] == 0


def test_what_is_missing_is_told(golden_dir, tmp_path, capfd):
    code, _, err = run(capfd, golden_dir / "interop" / "tiny_llama_bf16", tmp_path / "out", "quant_type=fp4")
    assert code == 0
    assert "has no tokenizer" in err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "fp4"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["required: MODEL, OUT", "fix: python -m qlora_jax.convert MODEL OUT\n"]),
        (["MODEL"], ["required: OUT"]),
        (["MODEL", "OUT", "more"], ["unexpected argument 'more'"]),
        (["MODEL", "OUT", "--blocksize", "64"], ["unknown option --blocksize", "did you mean --block-size?"]),
        (["MODEL", "OUT", "--block-size", "48"], ["invalid choice: 48", "64"]),
        (["MODEL", "OUT", "--quant-type", "nf5"], ["invalid choice: 'nf5'", "nf4"]),
        (["MODEL", "OUT", "--shard-size", "5 pages"], ["'5 pages' is no size such as 5GB"]),
        (["MODEL", "OUT", "--shard-size"], ["--shard-size is given no value"]),
        (["/nowhere", "OUT"], ["no such folder or file: /nowhere"]),
        (["BNB4", "OUT"], ["is in 4 bits already", "model.path="]),
        (["MODEL", "USED"], ["is not empty", "USED-2"]),
        (["MODEL", "FILE/out"], ["lies under", "which is a file"]),
    ],
)
def test_mistakes(golden_dir, tmp_path, capfd, arguments, words):
    (tmp_path / "USED" / "x").mkdir(parents=True)
    (tmp_path / "FILE").write_text("")
    before = sorted(tmp_path.rglob("*"))
    interop = golden_dir / "interop"
    places = {"MODEL": interop / "tiny_llama_bf16", "BNB4": interop / "tiny_llama_bnb4", "OUT": tmp_path / "OUT"}
    places |= {"USED": tmp_path / "USED", "FILE/out": tmp_path / "FILE" / "out"}
    code, out, err = run(capfd, *(str(places.get(argument, argument)) for argument in arguments))
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5mb", 1_500_000), ("77", 77), ("2kb", 2000)])
def test_sizes(text, size):
    assert size_in_bytes(text) == size


def test_ctrl_c_leaves_nothing(golden_dir: Path, tmp_path):
    """Sent while weights are being written, which a patched `progress` makes last."""
    code = (
        # Where tests run in the background, the shell has SIGINT ignored, and children inherit that.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys, time, qlora_jax.training.meter as m\n"
        "def show(self, done, total):\n    print('writing', flush=True); time.sleep(60)\n"
        "m.Meter.show = show\n"
        "from qlora_jax.convert import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, golden_dir / "interop" / "tiny_llama_bf16", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted; nothing is kept\n"
    assert not list(tmp_path.iterdir())
