"""The asking door: what goes to stdout, how options are read, and what mistakes are told."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qlora_jax import generate as door
from qlora_jax.errors import UserError
from qlora_jax.evaluation.answers import Answer


@pytest.fixture(scope="module")
def run_folder(golden_dir: Path, tmp_path_factory) -> Path:
    """A run on the tiny LLaMA with a tokenizer of one token per byte and PEFT's adapter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("door")
    model = Path(shutil.copytree(golden_dir / "interop" / "tiny_llama_bf16", folder / "model"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet[:255])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    fast.save_pretrained(model)
    run = folder / "runs" / "first"
    run.mkdir(parents=True)
    shutil.copytree(golden_dir / "interop" / "adapter_all_linear", run / "adapter")
    config = {"output_dir": str(run), "model": {"path": str(model), "dtype": "float32"}, "data": {"path": "gone.jsonl"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def ask(capfd, *arguments: str) -> tuple[int, str, str]:
    code = door.main(list(arguments))
    return code, *capfd.readouterr()


def test_the_answer_alone_is_on_stdout(run_folder: Path, capfd) -> None:
    """And it is what the library answers with the run's adapter, through the chat template."""
    from qlora_jax.checkpoints.peft import load_adapter
    from qlora_jax.checkpoints.source import open_checkpoint
    from qlora_jax.evaluation.generation import generate
    from qlora_jax.models.loading import load_model

    code, out, err = ask(capfd, "--run", str(run_folder), "prompt=Hello", "--max-new-tokens=12")
    assert code == 0
    checkpoint = open_checkpoint(run_folder.parent.parent / "model")
    tokenizer = checkpoint.tokenizer()
    model = load_adapter(load_model(checkpoint, dtype="float32"), run_folder / "adapter")
    ids = tokenizer("u:Hello</s>a:", add_special_tokens=False)["input_ids"]
    tokens = generate(model, [ids], max_new_tokens=12, eos_ids=[0, 2])[0]  # 2: of config.json
    assert out == tokenizer.decode(tokens, skip_special_tokens=True).strip() + "\n"
    assert out.strip()
    assert "loading" in err
    assert "cut at --max-new-tokens 12" in err
    _, base, _ = ask(capfd, "--run", str(run_folder), "prompt=Hello", "--max-new-tokens=12", "--base")
    assert base != out
    _, steered, _ = ask(capfd, "--run", str(run_folder), "prompt=Hello", "--max-new-tokens=12", "--system", "Be brief.")
    assert steered != out


class Scripted:
    """An asker that notes what it is asked, and replies a letter at a time."""

    def __init__(self, replies=None, on_letter=lambda letter: None) -> None:
        self.seen, self.replies, self.on_letter = [], replies, on_letter

    def ask(self, turns, *, show, is_interrupted=lambda: False) -> Answer:
        self.seen.append(turns)
        reply = f"reply {len(self.seen)}" if self.replies is None else self.replies[len(self.seen) - 1]
        shown = ""
        for letter in reply:
            if is_interrupted():
                return Answer(shown, len(shown), "interrupted")
            show(letter)
            shown += letter
            self.on_letter(letter)
        return Answer(reply, len(reply), "stop")


def converse(monkeypatch, asker: Scripted, *typed: str) -> None:
    lines = iter(typed)

    def next_line() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", next_line)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(door, "_load", lambda source, options: asker)


def test_a_conversation_remembers_its_turns(run_folder: Path, capfd, monkeypatch) -> None:
    asker = Scripted()
    converse(monkeypatch, asker, "Hello", "", "And then?", "/new", "Again")
    code, out, err = ask(capfd, "--run", str(run_folder), "system=Be brief.")
    assert code == 0
    assert out == "reply 1\nreply 2\nreply 3\n"
    start = ("system", "Be brief.")
    assert asker.seen[1] == [start, ("user", "Hello"), ("assistant", "reply 1"), ("user", "And then?")]
    assert asker.seen[2] == [start, ("user", "Again")]
    assert "Ctrl-D" in err


def test_chat_begins_with_the_prompt_and_needs_no_terminal(run_folder: Path, capfd, monkeypatch) -> None:
    import io

    asker = Scripted()
    monkeypatch.setattr(door, "_load", lambda source, options: asker)
    monkeypatch.setattr(sys, "stdin", io.StringIO("And then?\n"))
    assert ask(capfd, "--run", str(run_folder), "--chat", "--prompt", "Hello")[:2] == (0, "reply 1\nreply 2\n")
    assert asker.seen[1] == [("user", "Hello"), ("assistant", "reply 1"), ("user", "And then?")]


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(run_folder: Path, capfd, monkeypatch) -> None:
    def interrupt(letter: str) -> None:
        if letter == "!":
            os.kill(os.getpid(), signal.SIGINT)

    asker = Scripted(["!", "half! an answer", "done"], on_letter=interrupt)
    converse(monkeypatch, asker, "One", "Two", "Three")
    # Nothing of the first reply is left but "!"; the second is cut in its middle.
    code, out, err = ask(capfd, "--run", str(run_folder))
    assert (code, out) == (0, "!\nhalf!\ndone\n")
    assert asker.seen[2] == [
        ("user", "One"),
        ("assistant", "!"),
        ("user", "Two"),
        ("assistant", "half!"),
        ("user", "Three"),
    ]
    assert "stopping the answer" in err


def test_ctrl_c_twice_leaves(run_folder: Path, capfd, monkeypatch) -> None:
    def interrupt(letter: str) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    converse(monkeypatch, Scripted(on_letter=interrupt), "One", "Two")
    code, out, err = ask(capfd, "--run", str(run_folder))
    assert (code, out) == (130, "r")
    assert "interrupted" in err
    assert "Traceback" not in err


def test_a_reader_who_leaves_is_no_fault() -> None:
    program = (
        "import sys; from qlora_jax.training.console import exit_code\n"
        "def act(given):\n  for _ in range(100000): print('an answer', flush=True)\n"
        "sys.exit(exit_code(act, []))"
    )
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == b""
    writer.stderr.close()
    assert writer.wait(timeout=60) == 141


def test_stdin_is_asked_where_it_is_no_terminal(run_folder: Path, capfd, monkeypatch) -> None:
    import io

    asker = Scripted()
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\n"))
    monkeypatch.setattr(door, "_load", lambda source, options: asker)
    assert ask(capfd, "--run", str(run_folder))[:2] == (0, "reply 1\n")
    assert asker.seen == [[("user", "What is this?")]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    code, out, err = ask(capfd, "--run", str(run_folder))
    assert (code, out) == (2, "")
    assert "prompt is empty" in err


def test_a_file_of_prompts(run_folder: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    """In batches by length or alone, with the rows' own answers hidden: each row gets what it would get alone."""
    rows = [
        {"instruction": "Hello", "output": "hidden", "id": 7},
        {"prompt": "x" * 113},  # little room: 118 tokens of 128
        "What is this?",
        {"messages": [{"role": "system", "content": "Hi"}, {"role": "user", "content": "Hello"}]},
    ]
    prompts, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    door_asker, loads = door._load, []
    monkeypatch.setattr(
        door, "_load", lambda *given: loads[0] if loads else loads.append(door_asker(*given)) or loads[0]
    )
    common = ["--run", str(run_folder), "--max-new-tokens=12"]
    code, printed, err = ask(capfd, *common, "--prompts", str(prompts), "--out", str(out), "--batch-size", "2")
    assert (code, printed) == (0, "")
    assert "4 answers in" in err
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(row) - {"answer", "finish"} for row in answers] == [
        {"instruction", "output", "id"},
        {"prompt"},
        {"prompt"},
        {"messages"},
    ]
    assert answers[2]["prompt"] == "What is this?"
    single = [
        ask(capfd, *common, "--prompt", text, *more)[1]
        for text, *more in (["Hello"], ["x" * 113], ["What is this?"], ["Hello", "--system", "Hi"])
    ]
    assert [row["answer"] + "\n" for row in answers] == single
    code, printed, _ = ask(capfd, *common, "--prompts", str(prompts))
    assert (code, printed) == (0, out.read_text())
    code, _, err = ask(capfd, *common, "--prompts", str(prompts), "--out", str(out))
    assert code == 2
    assert "nothing is replaced" in err
    code, _, err = ask(capfd, *common, "--prompts", str(out))
    assert code == 2
    assert err.count('the row has "answer"') == 4
    lines = tmp_path / "lines.txt"
    lines.write_text(f"Hello\n\n{'y' * 200}\n{'z' * 300}\n")
    code, printed, err = ask(capfd, *common, "--prompts", str(lines))
    assert (code, printed) == (2, "")
    assert f"{lines}:3: the prompt takes 205 tokens" in err
    assert f"{lines}:4: the prompt takes 305 tokens" in err
    prompts.write_text('{"prompt": 3}\n{"text": "x"}\n')
    code, _, err = ask(capfd, *common, "--prompts", str(prompts))
    assert code == 2
    assert '"prompt" should be text' in err


def test_sampling_as_the_makers_say(run_folder: Path, tmp_path: Path, capfd) -> None:
    model = Path(shutil.copytree(run_folder.parent.parent / "model", tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9}))
    common = ["--model", str(model), "--prompt", "Hello", "--max-new-tokens=1"]
    code, _, err = ask(capfd, *common, "--model-sampling", "--top-p", "0.5")
    assert code == 0
    assert "sampling: temperature 0.6, top_k 50, top_p 0.5" in err
    code, _, err = ask(capfd, *common)
    assert code == 0
    assert "sampling:" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--run", "r", "--prompt", "-1 + x=2", "--max-new-tokens", "7", "--base"],
        ["run=r", "prompt=-1 + x=2", "max_new_tokens=7", "base=true", "debug=false"],
        ["--run=r", "--prompt=-1 + x=2", "--max_new_tokens=7", "--base"],
    ],
)
def test_three_spellings(arguments: list[str]) -> None:
    options = door.parse(arguments)
    assert (options.run, options.prompt, options.max_new_tokens, options.base) == ("r", "-1 + x=2", 7, True)
    assert (options.temperature, options.seed, options.debug) == (None, 0, False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--run", "r", "--promt", "x"], "did you mean --prompt?"),
        (["--run", "r", "temprature=1"], "did you mean --temperature?"),
        (["--run", "r", "Hello"], "--prompt 'Hello'"),
        (["--run", "r", "--prompt"], "--prompt is given no value"),
        (["--prompt", "x"], "neither --run nor --model"),
        (["--run", "r", "--seed", "x"], "invalid int value: 'x'"),
        (["--run", "r", "--temperature", "-1"], "--temperature -1"),
        (["--run", "r", "--temperature", "nan"], "--temperature nan"),
        (["--run", "r", "--top-k", "5", "--temperature", "0"], "--top-k 5\n  why: at temperature 0"),
        (["--run", "r", "--top-p", "2", "--temperature", "1"], "fix: --top-p 0.9"),
        (["--run", "r", "--repetition-penalty", "0"], "--repetition-penalty 0"),
        (["--run", "r", "--max-new-tokens", "0"], "at least one token"),
        (["--run", "r", "--prompts", "f", "--chat", "--prompt", "x"], "--prompts and --chat are both given"),
        (["--run", "r", "--prompts", "f", "--chat", "--prompt", "x"], "--prompts and --prompt are both given"),
        (["--run", "r", "--out", "f", "--prompt", "x"], "--out without --prompts"),
        (["--run", "r", "--prompts", "f", "--batch-size", "0"], "--batch-size 0"),
        (["--run", "r", "--stop", "", "--prompt", "x"], "--stop is empty"),
        (["--run", "r", "--base", "--adapter", "a"], "without an adapter"),
        (["--run", "r", "base=maybe"], "true or false"),
    ],
)
def test_mistakes_in_options(arguments: list[str], told: str, capfd) -> None:
    code, out, err = ask(capfd, *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err


def test_prompts_that_cannot_be_asked(run_folder: Path, capfd, monkeypatch, tmp_path: Path) -> None:
    """Bytes that are not UTF-8, on the command line and from stdin; more tokens than the model has positions."""
    for given in ("caf\udce9", "caf\udce9 au lait"):
        code, out, err = ask(capfd, "--run", str(run_folder), "--prompt", given)
        assert (code, out) == (2, "")
        assert "the prompt is not UTF-8 text: character 4" in err
        assert "loading" not in err
    code, out, err = ask(capfd, "--run", str(run_folder), "--prompt", "x" * 127)
    assert (code, out) == (2, "")
    assert "the prompt takes 132 tokens" in err
    assert "128 positions" in err
    code, out, err = ask(capfd, "--run", str(run_folder), "--prompt", "x" * 122)
    assert code == 0
    assert "cut at the end of the model's positions" in err or len(out.encode()) <= 2
    code, out, err = ask(capfd, "--model", "model", "--adapter", str(tmp_path), "--prompt", "x")
    assert (code, out) == (2, "")
    assert "no adapter_config.json" in err


def test_mistakes_in_the_run(run_folder: Path, tmp_path: Path, capfd) -> None:
    code, _, err = ask(capfd, "--run", str(run_folder.parent / "frist"), "--prompt", "x")
    assert code == 2
    assert f"did you mean --run {run_folder}?" in err
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    code, _, err = ask(capfd, "--run", str(unfinished), "--prompt", "x")
    assert code == 2
    assert "config.yaml does not exist" in err
    shutil.copy(run_folder / "config.yaml", unfinished)
    code, _, err = ask(capfd, "--run", str(unfinished), "--prompt", "x")
    assert code == 2
    assert "has no adapter yet" in err
    assert f"output_dir={unfinished} resume=true" in err
    (unfinished / "config.yaml").write_text("lora: {rnak: 3}\n")
    code, _, err = ask(capfd, "--run", str(unfinished), "--prompt", "x", "--debug")
    assert code == 2
    assert "is not the configuration of a run" in err
    assert "Traceback" in err


def test_an_adapter_of_another_kind_is_refused(run_folder: Path, tmp_path: Path, capfd) -> None:
    adapter = Path(shutil.copytree(run_folder / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "VERA"}))
    code, out, err = ask(capfd, "--run", str(run_folder), "--adapter", str(adapter), "--prompt", "x")
    assert (code, out) == (2, "")
    assert "VERA" in err


def test_help_names_every_option_and_imports_no_jax() -> None:
    program = (
        "import sys; from qlora_jax import generate\n"
        "try: generate.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'jax', 'flax', 'transformers', 'pydantic'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for option in ("--run", "--prompt", "--max-new-tokens", "--temperature", "--base", "--seed", "--system", "--debug"):
        assert option in done.stdout


def test_the_demos_model_is_fetched_where_its_path_is_gone(monkeypatch, tmp_path: Path) -> None:
    from qlora_jax.training import demo, finished

    monkeypatch.setattr(demo, "fetch_demo_model", lambda say: tmp_path / "fetched.gguf")
    gone = tmp_path / "cache" / Path(demo.MODEL_MEMBER).name
    for path in (None, "smollm2-demo", str(gone)):
        assert finished.base_model(path, print) == str(tmp_path / "fetched.gguf")
    assert finished.base_model(str(tmp_path / "other.gguf"), print) == str(tmp_path / "other.gguf")
    with pytest.raises(UserError):
        door.parse(["--prompt", "x"])
