"""Answers as text: stop strings over several tokens, and streaming that never takes back what it showed."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.evaluation.answers import Answerer, GrowingText
from qlora_jax.evaluation.generation import generate
from qlora_jax.models.loading import load_model


def byte_level():
    """One token for each byte: most characters are cut."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


def byte_fallback():
    """As LLaMA 2's: pieces with a mark for spaces, bytes for the rest, the first space taken away."""
    from tokenizers import Tokenizer, decoders, models

    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [f"▁{c}" for c in "abcd"] + list("abcd.▁你")
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(tokenizer)


def word_pieces():
    """As BERT's, with punctuation joined to the word before it."""
    from tokenizers import Tokenizer, decoders, models

    words = ["[UNK]", "a", "bc", "##d", "##ef", ".", ",", "!", "?", "'", "n't", "s", "'s", "'m", "'re", "'ve", "do"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return _fast(tokenizer, clean_up_tokenization_spaces=True)


def _fast(tokenizer, **settings):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback, word_pieces)}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_shown_is_never_taken_back(name, data):
    """The pieces add up to the final text, up to a stop string, whatever the tokens and the looks at them."""
    tokenizer = TOKENIZERS[name]
    some = st.integers(0, len(tokenizer) - 1)
    if name != "word_pieces" and data.draw(st.booleans(), "text"):
        text = data.draw(st.text(alphabet="abcd. \n你é🙂�", max_size=12))
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        tokens = data.draw(st.lists(some, max_size=16))
    whole = tokenizer.decode(tokens)
    stops = data.draw(
        st.lists(st.text(min_size=1, max_size=3) | st.sampled_from(["a ", "\n\n", "bc", "."]), max_size=2)
    )
    growing = GrowingText(tokenizer, stops)
    shown, at = "", 0
    while at < len(tokens):
        at = min(len(tokens), at + data.draw(st.integers(1, 4)))
        shown += growing.settle(tokens[:at])
        assert growing.whole(tokens).startswith(shown)
    shown += growing.finish(tokens)
    assert shown == growing.whole(tokens)
    end = min((whole.find(stop) for stop in stops if stop in whole), default=None)
    assert shown == whole[:end].strip()
    assert growing.is_stopped(tokens) == (end is not None)


def test_words_are_shown_as_they_come():
    tokenizer, tokens = TOKENIZERS["byte_level"], []
    growing, pieces = GrowingText(tokenizer, ["END"]), []
    for token in tokenizer("Hi 你 E END x")["input_ids"]:
        tokens.append(token)
        pieces.append(growing.settle(tokens))
    assert pieces == ["H", "i", "", "", "", " 你", "", "", " E", "", "", "", "", ""]
    assert "".join(pieces) == growing.whole(tokens) == "Hi 你 E"


@pytest.mark.parametrize("words", [["a", "'", "s"], ["do", "n't", "."], ["a", "'", "'re", "a"]])
def test_punctuation_is_joined_before_it_is_shown(words):
    tokenizer = TOKENIZERS["word_pieces"]
    tokens, growing = tokenizer.convert_tokens_to_ids(words), GrowingText(tokenizer)
    pieces = [growing.settle(tokens[:end]) for end in range(1, len(words) + 1)]
    assert "".join([*pieces, growing.finish(tokens)]) == tokenizer.decode(tokens)


@pytest.fixture(scope="module")
def model(golden_dir: Path):
    return load_model(golden_dir / "interop" / "tiny_llama_bf16", dtype=jnp.float32)


def test_a_stop_string_ends_an_answer_wherever_tokens_are_cut(model):
    tokenizer = TOKENIZERS["byte_level"]
    prompts = [[5, 9, 200, 31, 7], [17], [70, 71, 72]]
    free = Answerer(model, tokenizer, stop_ids=(), max_new_tokens=40).answer(prompts)
    assert [answer.finish for answer in free] == ["length"] * 3
    assert [answer.tokens for answer in free] == [40] * 3
    stop = free[0].text[5:8]
    looks: list[str] = []
    stopped = Answerer(model, tokenizer, stop_ids=(), stop_strings=["never", stop], max_new_tokens=40)
    answers = stopped.answer(prompts, show=looks.append)
    for answer, before in zip(answers, free, strict=True):
        assert answer.text == before.text.partition(stop)[0].strip()
        assert answer.finish == ("stop" if stop in before.text else "length")
    assert answers[0].tokens < 40
    assert "".join(looks) == answers[0].text
    assert stopped.answer(prompts[:1]) == answers[:1]


def test_the_text_of_a_special_token_stands_for_it(model, golden_dir):
    tokenizer = byte_level()
    [answer] = generate(model, [[17]], max_new_tokens=12)
    name = tokenizer.convert_ids_to_tokens(answer[4])
    tokenizer.add_special_tokens({"additional_special_tokens": [name]})
    answerer = Answerer(model, tokenizer, stop_ids=(), stop_strings=[name], max_new_tokens=12)
    assert answerer.stop_ids == {answer[4]}
    assert answerer.answer([[17]])[0].tokens == answer.index(answer[4])


def test_an_interrupted_answer_is_what_there_is(model):
    answerer = Answerer(model, TOKENIZERS["byte_level"], stop_ids=(), max_new_tokens=100)
    asked = iter([False, True])
    [answer] = answerer.answer([[17]], is_interrupted=lambda: next(asked))
    assert answer.finish == "interrupted"
    assert 1 < answer.tokens < 100


def test_answers_end_with_the_models_positions(model):
    answerer = Answerer(model, TOKENIZERS["byte_level"], stop_ids=(), max_new_tokens=100)
    assert [answer.tokens for answer in answerer.answer([[17] * 124, [18]])] == [4, 4]


def test_generation_config(golden_dir, tmp_path):
    from qlora_jax.checkpoints.generation_config import read_generation_config
    from qlora_jax.checkpoints.source import open_checkpoint
    from qlora_jax.errors import UserError

    folder = Path(shutil.copytree(golden_dir / "interop" / "tiny_llama_bf16", tmp_path / "model"))

    def read(config):
        (folder / "generation_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return read_generation_config(open_checkpoint(folder))

    assert read({"eos_token_id": [7, 9], "do_sample": False, "temperature": 0.6}) == ((7, 9), {})
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    assert read({"eos_token_id": 7} | sampled).sampling == {k: v for k, v in sampled.items() if k != "do_sample"} | {
        "top_k": 50
    }
    assert read({"do_sample": True}) == ((2,), {"temperature": 1.0, "top_k": 50})  # eos from config.json
    assert read({"repetition_penalty": 1.05}).sampling == {"repetition_penalty": 1.05}
    (folder / "generation_config.json").unlink()
    assert read_generation_config(open_checkpoint(folder)) == ((2,), {})
    for broken in ({"eos_token_id": "x"}, {"do_sample": True, "top_p": "high"}, "{"):
        with pytest.raises(UserError, match="generation_config"):
            read(broken)
