"""Tokenizers trained here on a few sentences, with chat templates of the kinds in use."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Return the size of a file, reported by the operating system.\n\nRaise an error where there is none.",
    "What does the function do? It returns an iterator for one month, assistant and user alike.",
    "### Instruction:\nTranslate to French: good morning\n\n### Response:\nbonjour",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>"]

TEMPLATES = {
    # With a default system message, as SmolLM2 and Qwen have it.
    "chatml": "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Mistral and Llama 2: no header before an answer but the space that it begins with; only users and assistants.
    "inst": "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}",
    # Llama 3: contents are stripped, answers end with a token that is not eos.
    "llama3": "{{ bos_token }}{% for m in messages %}"
    "{{ m['role'] + ':\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n\n' }}{% endif %}",
    # DeepSeek and Qwen 3 cut the reasoning out of earlier answers.
    "forgetful": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>') | last }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # An answer ends like any other text.
    "endless": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
}

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """make_tokenizer(template=None, *, eos="<|im_end|>", starts=False, trim=False): byte-level BPE, pad == eos.

    `starts`: bos `<s>` goes before a text, unless special tokens are turned off. `trim`: offsets leave out white space.
    """
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    base.train_from_iterator(TEXT, trainer)
    trained = base.to_str()

    def make(
        template: str | None = None, *, eos: str | None = "<|im_end|>", starts: bool = False, trim: bool = False
    ) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer.from_str(trained)
        steps = [processors.ByteLevel(trim_offsets=trim)]
        if starts:
            bos = ("<s>", tokenizer.token_to_id("<s>"))
            steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[bos]))
        tokenizer.post_processor = processors.Sequence(steps)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=TEMPLATES[template] if template else None,
            clean_up_tokenization_spaces=False,
            bos_token="<s>",
            **({"eos_token": eos, "pad_token": eos} if eos else {}),
        )

    return make
