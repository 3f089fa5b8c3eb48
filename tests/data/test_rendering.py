"""Which tokens a conversation becomes, and which of them are trained."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from qlora_jax.data.formats import Conversation, Message
from qlora_jax.data.rendering import Example, Renderer
from qlora_jax.errors import UserError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def conversation(*contents: str, system: str | None = None) -> Conversation:
    """User and assistant in turn."""
    messages = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    first = [] if system is None else [Message("system", system)]
    return Conversation((*first, *messages), 7, "rows.jsonl")


def trained_texts(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[str]:
    """The texts of the runs of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], example.loss_mask, [False]])))
    return [tokenizer.decode(example.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def chatml_mask(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[bool]:
    """By walking over ChatML's control tokens: valid where no message contains one."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    mask, role, in_header = [], "", False
    for token in ids:
        if token == start:
            mask.append(False)
            role, in_header = "", True
        elif in_header:
            mask.append(False)
            role += tokenizer.decode([token])
            in_header = not role.endswith("\n")
        else:
            mask.append(role == "assistant\n")
            if token == end:
                role = "after the turn"
    return mask


# Not beginning with a line break, which could become one token with the header's: tested on its own.
contents = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=30).filter(
    lambda text: text[0] not in "\r\n" and not text.isspace()
)


@pytest.mark.parametrize("trim", [False, True])
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(contents, contents), min_size=1, max_size=3), system=st.none() | contents)
def test_mask_is_what_the_control_tokens_say(
    make_tokenizer: MakeTokenizer, trim: bool, turns: list[tuple[str, str]], system: str | None
) -> None:
    tokenizer = make_tokenizer("chatml", trim=trim)
    talk = conversation(*[content for turn in turns for content in turn], system=system)
    example = Renderer(tokenizer).render(talk)
    ids = example.input_ids.tolist()
    messages = [message._asdict() for message in talk.messages]
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert example.loss_mask.tolist() == chatml_mask(tokenizer, ids)
    assert trained_texts(tokenizer, example) == [answer + "<|im_end|>" for _, answer in turns]
    assert (example.input_ids.dtype, example.loss_mask.dtype, example.line) == (np.int32, np.bool_, 7)


@pytest.mark.parametrize("template", ["chatml", "llama3", "inst", None])
def test_every_answer_of_every_template(make_tokenizer: MakeTokenizer, template: str | None) -> None:
    tokenizer = make_tokenizer(template, eos="</s>")
    renderer = Renderer(tokenizer)
    talk = conversation("What is it?", "A file.", "How large?", "Return\n\nthe size ")
    example = renderer.render(talk)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(template or "", "</s>")
    begin = " " if template == "inst" else ""
    last = "Return\n\nthe size" if template == "llama3" else "Return\n\nthe size "
    assert trained_texts(tokenizer, example) == [f"{begin}A file.{end}", f"{begin}{last}{end}"]
    # What generation is asked to continue is how training begins.
    for index in (1, 3):
        prompt = renderer.prompt(talk.messages[:index])
        assert prompt == example.input_ids[: len(prompt)].tolist()
        assert example.loss_mask[len(prompt)]
        assert not example.loss_mask[len(prompt) - 1]
    assert set(renderer.stop_ids) == set(tokenizer.convert_tokens_to_ids([end, "</s>"]))
    assert example.input_ids[example.loss_mask][-1] in renderer.stop_ids


def test_default_system_message_is_kept_and_can_be_replaced(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("chatml")
    renderer = Renderer(tokenizer)
    plain = tokenizer.decode(renderer.render(conversation("x", "y")).input_ids)
    assert plain.startswith("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nx<|im_end|>\n")
    replaced = tokenizer.decode(renderer.prompt(conversation("x", system="Be brief.").messages))
    assert replaced == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )


def test_plain_template(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(eos="</s>")
    example = Renderer(tokenizer).render(conversation("a", "b", "c", "d", system="Be brief."))
    assert tokenizer.decode(example.input_ids) == (
        "Be brief.\n\n### Instruction:\na\n\n### Response:\nb</s>\n\n### Instruction:\nc\n\n### Response:\nd</s>"
    )
    assert trained_texts(tokenizer, example) == ["b</s>", "d</s>"]
    with_template = make_tokenizer("chatml", eos="</s>")
    same = Renderer(with_template, template="plain").render(conversation("a", "b", "c", "d", system="Be brief."))
    np.testing.assert_array_equal(same.input_ids, example.input_ids)
    assert Renderer(with_template, template="plain").stop_ids == (with_template.eos_token_id,)


def test_braces_in_rows_are_text(make_tokenizer: MakeTokenizer) -> None:
    for template in ("chatml", None):
        tokenizer = make_tokenizer(template)
        example = Renderer(tokenizer).render(conversation("{{ 1 + 1 }} {x}", "{} {0} {% if %}"))
        assert trained_texts(tokenizer, example) == ["{} {0} {% if %}<|im_end|>"]
        assert "{{ 1 + 1 }} {x}" in tokenizer.decode(example.input_ids)


@pytest.mark.parametrize("template", ["inst", "llama3", "chatml", None])
@pytest.mark.parametrize("starts", [False, True])
def test_never_two_bos(make_tokenizer: MakeTokenizer, template: str | None, starts: bool) -> None:
    tokenizer = make_tokenizer(template, eos="</s>", starts=starts)
    renderer = Renderer(tokenizer)
    bos = tokenizer.bos_token_id
    # A chat template writes bos or does not; the plain one follows the tokenizer.
    wanted = {"inst": 1, "llama3": 1, "chatml": 0}.get(template or "", int(starts))
    for ids in (renderer.render(conversation("x", "y")).input_ids.tolist(), renderer.prompt([Message("user", "x")])):
        assert ids.count(bos) == wanted
        assert ids[:1].count(bos) == wanted
    assert not renderer.render(conversation("x", "y")).loss_mask[0]


def test_an_answer_that_quotes_the_conversation(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    quoted = "### Response:\nno\n\n### Instruction:\nyes"
    example = Renderer(tokenizer).render(conversation(quoted, quoted, quoted, "z"))
    assert trained_texts(tokenizer, example) == [f"{quoted}<|im_end|>", "z<|im_end|>"]


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_across_header_and_answer_is_the_answers(make_tokenizer: MakeTokenizer, trim: bool) -> None:
    tokenizer = make_tokenizer(eos="</s>", trim=trim)
    assert len(tokenizer(" file", add_special_tokens=False).input_ids) == 1
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if messages[1:] or add_generation_prompt %}{{ ' A: ' }}{% endif %}"
    )
    tokenizer.chat_template += "{% for m in messages[1:] %}{{ m['content'] + eos_token }}{% endfor %}"
    assert trained_texts(tokenizer, Renderer(tokenizer).render(conversation("x", "file"))) == [" file</s>"]


def test_an_end_of_turn_that_swallows_white_space_is_trained(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|end|>")  # Phi 3
    renderer = Renderer(tokenizer)
    example = renderer.render(conversation("x", "y", "z", "w"))
    assert trained_texts(tokenizer, example) == ["y<|end|>", "w<|end|>"]
    assert renderer.stop_ids == tuple(tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_end|>"]))


def test_template_that_rewrites_earlier_answers_is_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("forgetful")
    renderer = Renderer(tokenizer)
    once = renderer.render(conversation("x", "hmm</think>y"))
    assert trained_texts(tokenizer, once) == ["hmm</think>y<|im_end|>"]
    with pytest.raises(
        UserError, match=r"rows\.jsonl:7: the chat template does not simply go on at message 2(.|\n)*plain"
    ):
        renderer.render(conversation("x", "hmm</think>y", "z", "w"))


def test_template_that_refuses_a_conversation(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(
        UserError, match=r"rows\.jsonl:7: .*only user and assistant roles(.|\n)*system, user, assistant"
    ):
        Renderer(make_tokenizer("inst", eos="</s>")).render(conversation("x", "y", system="Be brief."))


def test_template_without_an_end_of_turn_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match="never learn where to stop"):
        Renderer(make_tokenizer("endless"))


def test_chat_insists_on_a_template(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match="no chat template"):
        Renderer(make_tokenizer(), template="chat")
    chat = Renderer(make_tokenizer("chatml"), template="chat")
    auto = Renderer(make_tokenizer("chatml"))
    assert chat.prompt([Message("user", "x")]) == auto.prompt([Message("user", "x")])


def test_tokenizer_without_an_end_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Renderer(make_tokenizer(eos=None))


def test_a_date_in_the_template_stands_still(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    )
    tokenizer.chat_template += (
        "{{ date_string + '\n' }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    assert tokenizer.decode(Renderer(tokenizer).render(conversation("x", "y")).input_ids).startswith("26 Jul 2024\n")
