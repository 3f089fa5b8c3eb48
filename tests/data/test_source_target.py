"""Rows for an encoder-decoder: what the encoder reads, what the decoder reads, and what is trained."""

import numpy as np
import pytest

from qlora_jax.data.formats import Conversation, Message
from qlora_jax.data.source_target import SourceTargetRenderer
from qlora_jax.errors import UserError

ASKED, ANSWERED = "What does the function do?", "It returns an iterator."


def conversation(*messages: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(*message) for message in messages), 7, "rows.jsonl")


def test_source_and_target_end_and_the_target_begins_with_the_start_token(make_tokenizer) -> None:
    tokenizer = make_tokenizer(eos="</s>")
    renderer = SourceTargetRenderer(tokenizer, start_id=3)
    example = renderer.render(conversation(("user", ASKED), ("assistant", ANSWERED)))
    eos = tokenizer.eos_token_id
    source, target = (tokenizer(text, add_special_tokens=False).input_ids for text in (ASKED, ANSWERED))
    assert example.source_ids is not None
    assert example.source_ids.tolist() == [*source, eos]
    assert example.input_ids.tolist() == [3, *target, eos]
    assert example.loss_mask.tolist() == [False, *[True] * len(target), True]
    assert (example.line, example.tokens) == (7, len(source) + len(target) + 3)
    assert renderer.stop_ids == (eos,)
    assert renderer.prompt([Message("user", ASKED)]) == example.source_ids.tolist()


def test_an_end_that_the_tokenizer_writes_is_not_doubled(make_tiny_t5, tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_t5(tmp_path / "t5"))
    example = SourceTargetRenderer(tokenizer, start_id=0).render(conversation(("user", "ab"), ("assistant", "c")))
    assert example.source_ids is not None
    assert [np.sum(ids == 1) for ids in (example.source_ids, example.input_ids)] == [1, 1]


def test_a_system_message_goes_before_the_source(make_tokenizer) -> None:
    renderer = SourceTargetRenderer(make_tokenizer(), start_id=0)
    messages = [Message("system", "Be brief."), Message("user", ASKED)]
    assert renderer.prompt(messages) == renderer.prompt([Message("user", f"Be brief.\n\n{ASKED}")])


def test_what_an_encoder_decoder_does_not_read(make_tokenizer) -> None:
    turns = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    renderer = SourceTargetRenderer(make_tokenizer(), start_id=0)
    with pytest.raises(UserError, match=r"rows.jsonl:7: a conversation of several turns"):
        renderer.render(turns)
    with pytest.raises(UserError, match="a conversation of several turns"):
        renderer.prompt(turns.messages)
    with pytest.raises(UserError, match=r"(?s)data.template=plain for an encoder-decoder.*data.template=auto"):
        SourceTargetRenderer(make_tokenizer(), start_id=0, template="plain")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        SourceTargetRenderer(tokenizer, start_id=0)
