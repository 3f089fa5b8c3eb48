"""The tokenizer inside a GGUF file, rebuilt for transformers without torch.

Three kinds: byte-level BPE ("gpt2": Llama 3, SmolLM, Qwen, Pythia) with its merges; SentencePiece BPE ("llama":
Llama 2, Mistral, TinyLlama), whose merges follow from the scores of its pieces; SentencePiece Unigram ("t5").
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # gguf.TokenType
_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_GPT2 = ("default", "gpt-2", "gpt2", "olmo")  # olmo: GPT-NeoX's, which Pythia has
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe")
_QWEN = ("qwen2",)
# Llama 3's own pattern, as in its tokenizer.json; Qwen's differs in how many digits go together.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Kinds, and what llama.cpp takes for keys of theirs that a file leaves out.
_KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "t5": {
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
    },
}


def build_tokenizer(metadata: dict[str, Any], file: Path) -> "PreTrainedTokenizerFast":
    """A fast tokenizer with special tokens and chat template, from `tokenizer.ggml.*` and `tokenizer.chat_template`.

    Raises:
      UserError: the file has no tokenizer, or one of a kind that is not known here.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    model, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if model is None or not tokens:
        raise UserError(f"no tokenizer in {file}", why="the metadata has no tokenizer.ggml.model and tokens")
    if model not in _KINDS:
        raise UserError(
            f"unsupported tokenizer in {file}: {model}",
            why="byte-level BPE (gpt2) and SentencePiece's BPE (llama) and Unigram (t5) are the ones supported",
            fix="model.path=FOLDER: the same model as an HF folder",
        )
    metadata = _KINDS[model] | metadata
    if model == "t5":
        rebuilt = _unigram(metadata, file)
    else:
        rebuilt = _byte_level(metadata, file) if model == "gpt2" else _sentencepiece(metadata)
    typed = list(zip(tokens, metadata.get("tokenizer.ggml.token_type") or [], strict=False))
    rebuilt.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in typed if kind == _CONTROL]
    )
    rebuilt.add_tokens([AddedToken(token, normalized=False) for token, kind in typed if kind == _USER_DEFINED])
    special = {}
    for role, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = metadata.get(f"tokenizer.ggml.{stored}_token_id")
        if index is not None and 0 <= index < len(tokens):
            special[f"{role}_token"] = tokens[index]
    # llama.cpp's defaults where the key is absent: BOS for SentencePiece and Llama 3, none for other BPE.
    starts = model == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3
    if metadata.get("tokenizer.ggml.add_bos_token", starts) and "bos_token" in special:
        bos = special["bos_token"]
        start = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, rebuilt.token_to_id(bos))]
        )
        byte_level = [processors.ByteLevel(trim_offsets=False)] if model == "gpt2" else []
        rebuilt.post_processor = processors.Sequence([*byte_level, start])
    elif model == "t5" and metadata.get("tokenizer.ggml.add_eos_token", True):
        eos = special["eos_token"]
        rebuilt.post_processor = processors.TemplateProcessing(
            single=["$A", eos], pair=["$A", eos, "$B", eos], special_tokens=[(eos, rebuilt.token_to_id(eos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=rebuilt,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(metadata: dict[str, Any], file: Path) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    # A merge is "left right"; byte-level pieces hold no space.
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _LLAMA3))
    tokenizer.pre_tokenizer = _splits(pre, bool(metadata.get("tokenizer.ggml.add_space_prefix", False)), file)
    tokenizer.decoder = decoders.ByteLevel()
    if pre in (*_QWEN, "olmo"):
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _splits(pre: str, prefix: bool, file: Path) -> "PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if pre in _GPT2:
        return gpt2
    if pre in _DIGITS_THEN_GPT2:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre in _LLAMA3 or pre in _QWEN:
        pattern = _PATTERN.replace("DIGITS", "{1,3}" if pre in _LLAMA3 else "")
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise UserError(
        f"unsupported pre-tokenizer in {file}: {pre}",
        why=f"known are {', '.join((*_GPT2, *_DIGITS_THEN_GPT2, *_LLAMA3, *_QWEN))}; another would split words wrongly",
        fix="model.path=FOLDER: the same model as an HF folder",
    )


def _sentencepiece(metadata: dict[str, Any]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    stripped = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return tokenizer


def _unigram(metadata: dict[str, Any], file: Path) -> "Tokenizer":
    """As T5's tokenizer.json has it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    keys = ("tokenizer.ggml.add_space_prefix", "tokenizer.ggml.remove_extra_whitespaces")
    if off := [key for key in keys if not metadata.get(key, True)]:
        raise UserError(
            f"unsupported tokenizer in {file}: t5 with {' and '.join(f'{key}=false' for key in off)}",
            why="a Unigram whose words begin with one space each is the one supported, as T5 has it",
            fix="model.path=FOLDER: the same model as an HF folder",
        )
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    # Rows of the embedding that no piece has are filled up with pieces of a score far below the others'. What is
    # unknown has the lowest score of all, less ten: it must not follow from those.
    lowest = min((score for score, kind in zip(scores, kinds, strict=True) if kind == _NORMAL), default=0.0)
    pieces = [(token, max(score, lowest)) for token, score in zip(tokens, scores, strict=True)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=metadata["tokenizer.ggml.unknown_token_id"]))
    if charsmap := metadata.get("tokenizer.ggml.precompiled_charsmap"):
        # A list of bytes, in some files signed ones.
        tokenizer.normalizer = normalizers.Precompiled(np.asarray(charsmap).astype(np.uint8).tobytes())
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return tokenizer


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first: SentencePiece merges in that order."""
    found = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[index], index, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
