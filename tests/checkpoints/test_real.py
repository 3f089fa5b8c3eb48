"""SmolLM2-135M-Instruct, a real GGUF file."""

import hashlib

import pytest

from qlora_jax.checkpoints import open_checkpoint

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def checkpoint():
    from qlora_jax.training.demo import fetch_demo_model

    return open_checkpoint(fetch_demo_model())


def test_tensors_are_those_of_transformers(checkpoint):
    """The digest is of transformers 5.23.0's own dequantized bfloat16 weights, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.names()):
        digest.update(checkpoint.read(name).tobytes())
    assert len(checkpoint.names()) == 272
    assert digest.hexdigest() == "5d9bacfb6e704b2142088ab0e2548bc0de0a6b3a3179fcde6595ff2a6b30c1ec"


def test_config(checkpoint):
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [checkpoint.config[key] for key in shape] == [576, 1536, 30, 9, 3]
    assert [checkpoint.config[key] for key in ("head_dim", "vocab_size", "rms_norm_eps")] == [64, 49152, 1e-5]
    assert (checkpoint.config["rope_theta"], checkpoint.config["rope_scaling"]) == (100000.0, None)
    assert checkpoint.config["tie_word_embeddings"]
    assert checkpoint.fingerprint() == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_tokenizer(checkpoint):
    tokenizer = checkpoint.tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer.all_special_ids) >= 3
    assert tokenizer("  42").input_ids == [256, 36, 34]  # digits are split before words
    text = "In one sentence, what does `os.path.join` do?\n\tnaïve café 東京 🙂 12345 <|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_start|>").input_ids == [1]


def test_chat_template(checkpoint):
    rendered = checkpoint.tokenizer().apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
