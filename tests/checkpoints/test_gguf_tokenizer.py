import io
import json
import warnings

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.errors import UserError

TEXT = [
    "In one sentence, what does the function os.path.join do? Join two or more pathname components.",
    "Return the number of items; 12345 + 67 = 12412. It's what they'd do, I'LL say: naïve café — 東京 🙂🙂.",
    "def f(x):\n    return x ** 2  # squares\n\n\n\tclass A:\n        pass  \n",
    "The quick brown fox jumps over the lazy dog. the the the return returns returned joining joined",
]
PROBES = [*TEXT, "", " ", "  42", "a  b   c", "hello\r\nworld", "unseen žluťoučký kůň", "x<|im_end|>y", "99 1 007"]
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6  # gguf.TokenType
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def trained_bpe(pre_tokenizer):
    """A byte-level BPE trained by the tokenizers library: its vocabulary is what a GGUF file stores."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def store_bpe(tokenizer, pre):
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)

    def store(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([CONTROL if token in SPECIAL else NORMAL for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in state["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)

    return store


def byte_level(use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_byte_level_bpe_equals_the_tokenizer_it_was_stored_from(tiny_gguf, tmp_path, pre):
    digits = pre_tokenizers.Digits(individual_digits=True)
    original = trained_bpe(byte_level() if pre == "gpt-2" else pre_tokenizers.Sequence([digits, byte_level()]))
    tiny_gguf(tokenizer=store_bpe(original, pre)).write(tmp_path / "tiny.gguf")
    rebuilt = open_checkpoint(tmp_path / "tiny.gguf").tokenizer()
    assert len(rebuilt) == original.get_vocab_size()
    for text in PROBES:
        ids = rebuilt(text).input_ids
        assert ids == original.encode(text).ids, text
        assert rebuilt.decode(ids) == text
    assert (rebuilt.bos_token_id, rebuilt.eos_token_id) == (1, 2)
    assert set(SPECIAL) <= set(rebuilt.all_special_tokens) | set(rebuilt.get_added_vocab())
    assert rebuilt.decode(rebuilt("a<|im_end|>").input_ids, skip_special_tokens=True) == "a"
    messages = [{"role": "user", "content": "Return"}, {"role": "assistant", "content": "the"}]
    expected = "<|im_start|>user\nReturn<|im_end|>\n<|im_start|>assistant\nthe<|im_end|>\n"
    assert rebuilt.apply_chat_template(messages, tokenize=False) == expected


def test_digits_are_split_before_words(tiny_gguf, tmp_path):
    digits = pre_tokenizers.Digits(individual_digits=True)
    original = trained_bpe(pre_tokenizers.Sequence([digits, byte_level()]))
    tiny_gguf(tokenizer=store_bpe(original, "smollm")).write(tmp_path / "split.gguf")
    tiny_gguf(tokenizer=store_bpe(original, "gpt-2")).write(tmp_path / "joined.gguf")
    split, joined = (open_checkpoint(tmp_path / name).tokenizer() for name in ("split.gguf", "joined.gguf"))
    assert split("a  42").tokens() != joined("a  42").tokens()


def test_qwen_splits_digits_and_composes_letters(tiny_gguf, tmp_path):
    tiny_gguf(tokenizer=store_bpe(trained_bpe(byte_level()), "qwen2")).write(tmp_path / "tiny.gguf")
    rebuilt = open_checkpoint(tmp_path / "tiny.gguf").tokenizer()
    words = rebuilt.backend_tokenizer.pre_tokenizer.pre_tokenize_str("I'LL pay 123\n\n now")
    assert [word for word, _ in words] == ["I", "'LL", "Ġpay", "Ġ", "1", "2", "3", "ĊĊ", "Ġnow"]
    assert rebuilt("cafe\u0301").input_ids == rebuilt("caf\u00e9").input_ids


def test_llama3_splits_as_its_own_tokenizer_and_starts_with_bos(tiny_gguf, tmp_path):
    original = trained_bpe(byte_level())
    tiny_gguf(tokenizer=store_bpe(original, "llama-bpe")).write(tmp_path / "tiny.gguf")
    rebuilt = open_checkpoint(tmp_path / "tiny.gguf").tokenizer()
    words = [
        word for word, _ in rebuilt.backend_tokenizer.pre_tokenizer.pre_tokenize_str("I'LL pay 12345\n\n  now (ok)")
    ]
    assert words == ["I", "'LL", "Ġpay", "Ġ", "123", "45", "ĊĊ", "Ġ", "Ġnow", "Ġ(", "ok", ")"]
    assert rebuilt("the").input_ids[0] == 1
    assert rebuilt("the", add_special_tokens=False).input_ids == original.encode("the").ids
    assert rebuilt.decode(rebuilt("naïve café").input_ids, skip_special_tokens=True) == "naïve café"


def test_saved_and_read_back_by_transformers(tiny_gguf, tmp_path):
    from transformers import AutoTokenizer

    tiny_gguf(tokenizer=store_bpe(trained_bpe(byte_level()), "gpt-2")).write(tmp_path / "tiny.gguf")
    rebuilt = open_checkpoint(tmp_path / "tiny.gguf").tokenizer()
    rebuilt.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.chat_template == rebuilt.chat_template
    for text in PROBES:
        assert again(text).input_ids == rebuilt(text).input_ids


@pytest.fixture(scope="module")
def sentencepiece_model():
    """A SentencePiece BPE with Llama 2's settings, trained and run by sentencepiece itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "builtin type .* has no __module__ attribute", DeprecationWarning)
        import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.98,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_sentencepiece_bpe_equals_sentencepiece(tiny_gguf, tmp_path, sentencepiece_model):
    pieces = range(sentencepiece_model.get_piece_size())

    def kind(i):
        if sentencepiece_model.is_unknown(i):
            return UNKNOWN
        if sentencepiece_model.is_control(i):
            return CONTROL
        return BYTE if sentencepiece_model.is_byte(i) else NORMAL

    def store(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([sentencepiece_model.id_to_piece(i) for i in pieces])
        writer.add_token_scores([sentencepiece_model.get_score(i) for i in pieces])
        writer.add_token_types([kind(i) for i in pieces])
        writer.add_unk_token_id(sentencepiece_model.unk_id())
        writer.add_bos_token_id(sentencepiece_model.bos_id())
        writer.add_eos_token_id(sentencepiece_model.eos_id())

    tiny_gguf(tokenizer=store).write(tmp_path / "tiny.gguf")
    rebuilt = open_checkpoint(tmp_path / "tiny.gguf").tokenizer()
    for text in PROBES:
        ids = rebuilt(text, add_special_tokens=False).input_ids
        assert ids == sentencepiece_model.encode(text), text
        assert rebuilt.decode(ids) == text
    assert rebuilt("the").input_ids == [sentencepiece_model.bos_id(), *sentencepiece_model.encode("the")]


@pytest.fixture(scope="module")
def unigram_model():
    """A SentencePiece Unigram with T5's settings, trained and run by sentencepiece itself, and its file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "builtin type .* has no __module__ attribute", DeprecationWarning)
        import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT * 3),
        model_writer=model,
        model_type="unigram",
        vocab_size=90,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=0.98,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), charsmap_of(model.getvalue())


def charsmap_of(proto: bytes) -> bytes:
    """ModelProto.normalizer_spec (field 3) .precompiled_charsmap (field 2), by protobuf's own wire format."""

    def fields(data):
        at = 0

        def varint():
            nonlocal at
            value, shift = 0, 0
            while True:
                byte = data[at]
                at += 1
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    return value

        while at < len(data):
            key = varint()
            size = {1: 8, 5: 4}.get(key & 7)
            if key & 7 == 0:
                varint()
                continue
            size = varint() if size is None else size
            yield key >> 3, data[at : at + size]
            at += size

    return dict(fields(dict(fields(proto))[3]))[2]


def store_unigram(model, charsmap, **changes):
    pieces = range(model.get_piece_size())

    def store(writer):
        writer.add_tokenizer_model("t5")
        # Rows that no piece has, as the converter fills them up.
        writer.add_token_list([model.id_to_piece(i) for i in pieces] + ["[PAD90]", "[PAD91]"])
        writer.add_token_scores([model.get_score(i) for i in pieces] + [-10000.0] * 2)
        kinds = [UNKNOWN if model.is_unknown(i) else CONTROL if model.is_control(i) else NORMAL for i in pieces]
        writer.add_token_types([*kinds, UNUSED, UNUSED])
        writer.add_add_space_prefix(True)
        writer.add_remove_extra_whitespaces(changes.get("remove", True))
        writer.add_precompiled_charsmap(charsmap)

    return store


def test_unigram_equals_sentencepiece(tiny_gguf, tmp_path, unigram_model):
    model, charsmap = unigram_model
    tiny_gguf(tokenizer=store_unigram(model, charsmap)).write(tmp_path / "tiny.gguf")
    rebuilt = open_checkpoint(tmp_path / "tiny.gguf").tokenizer()
    # Letters in other forms, and a ligature: what the table of characters is for.
    for text in [*PROBES, "cafe\u0301 \ufb01nd \uff34he", "\u6771\u4eac\u6771 the"]:
        ids = rebuilt(text, add_special_tokens=False).input_ids
        assert ids == model.encode(text), text
    assert rebuilt("the").input_ids == [*model.encode("the"), model.eos_id()]
    assert rebuilt.decode(rebuilt("The quick  return").input_ids, skip_special_tokens=True) == "The quick return"
    assert (rebuilt.pad_token_id, rebuilt.eos_token_id, rebuilt.unk_token_id) == (0, 1, 2)
    tiny_gguf(tokenizer=store_unigram(model, charsmap, remove=False)).write(tmp_path / "tiny.gguf")
    with pytest.raises(UserError, match=r"remove_extra_whitespaces=false"):
        open_checkpoint(tmp_path / "tiny.gguf").tokenizer()


def test_rows_without_a_piece_do_not_change_what_unknown_letters_cost(tiny_gguf, tmp_path):
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -1.0, "xyz": -14.0, "w": -13.0, "yzw": -2.0}

    def store(writer):
        writer.add_tokenizer_model("t5")
        writer.add_token_list([*pieces, "[PAD7]"])
        writer.add_token_scores([*pieces.values(), -10000.0])
        writer.add_token_types([CONTROL, CONTROL, UNKNOWN, *[NORMAL] * 4, UNUSED])

    tiny_gguf(tokenizer=store).write(tmp_path / "tiny.gguf")
    rebuilt = open_checkpoint(tmp_path / "tiny.gguf").tokenizer()
    # sentencepiece: what is unknown costs ten more than the dearest piece, 24 + 2 here, where xyz and w cost 27.
    assert rebuilt("xyzw").input_ids == [3, 2, 6, 1]


def test_unknown_kinds_are_refused(tiny_gguf, tmp_path):
    def store(writer):
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list(["a", "b"])

    tiny_gguf(tokenizer=store).write(tmp_path / "tiny.gguf")
    with pytest.raises(UserError, match=r"unsupported tokenizer in .*: rwkv"):
        open_checkpoint(tmp_path / "tiny.gguf").tokenizer()
    tiny_gguf(tokenizer=store_bpe(trained_bpe(byte_level()), "tekken")).write(tmp_path / "tiny.gguf")
    with pytest.raises(UserError, match=r"unsupported pre-tokenizer in .*: tekken"):
        open_checkpoint(tmp_path / "tiny.gguf").tokenizer()
