"""T5 against transformers' in torch, float32, same weights: logits at most 1e-4 apart (design table)."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoints.peft import load_adapter, save_adapter
from qlora_jax.checkpoints.source import open_checkpoint
from qlora_jax.errors import UserError
from qlora_jax.models.loading import load_model
from qlora_jax.models.relative import distance_buckets
from qlora_jax.nf4 import NF4Tensor, dequantize

from .t5_models import V1_0, V1_1, random_batch, save_random_t5, torch_logits

pytestmark = pytest.mark.interop

VARIANTS = {
    "1.0": V1_0,
    "1.1": V1_1,
    "gated, tied head": {"feed_forward_proj": "gated-gelu"},
    "plain, untied head": {"tie_word_embeddings": False},
    "gated silu, deep decoder": V1_1 | {"feed_forward_proj": "gated-silu", "num_layers": 2, "num_decoder_layers": 4},
}


@pytest.fixture
def seed() -> int:
    """Drawn anew for each test; pytest shows it where the test fails."""
    drawn = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {drawn}")
    return drawn


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path: Path, variant: str, seed: int) -> None:
    theirs = save_random_t5(tmp_path, seed, **VARIANTS[variant])
    model = load_model(tmp_path, quant_type=None, dtype=jnp.float32)
    input_ids, decoder_input_ids, mask = random_batch(seed)
    expected = torch_logits(theirs, input_ids, decoder_input_ids, mask)
    assert np.abs(expected).max() > 1
    got = np.asarray(model(input_ids, decoder_input_ids, segment_ids=jnp.asarray(mask)))
    assert np.abs(got - expected).max() < 1e-4
    unpadded = np.asarray(model(input_ids[:1], decoder_input_ids[:1]))
    assert np.abs(unpadded - expected[:1]).max() < 1e-4


@pytest.mark.parametrize("variant", ["1.0", "1.1"])
def test_4_bit_logits_equal_those_of_the_dequantized_weights(tmp_path: Path, variant: str, seed: int) -> None:
    import torch

    theirs = save_random_t5(tmp_path, seed, **VARIANTS[variant])
    model = load_model(tmp_path, dtype=jnp.float32)
    modules = dict(theirs.named_modules())
    for stack, blocks in (("encoder", model.encoder.block), ("decoder", model.decoder.block)):
        for linear in model.config.block_linears(stack):
            dense = blocks
            for part in linear.split("."):
                dense = dense[int(part)] if part.isdigit() else getattr(dense, part)
            kernels = np.asarray(dequantize(dense.kernel.get_value(), jnp.float32))
            for block, kernel in enumerate(kernels):
                modules[f"{stack}.block.{block}.{linear}"].weight.data = torch.from_numpy(kernel.T.copy())
    input_ids, decoder_input_ids, mask = random_batch(seed)
    expected = torch_logits(theirs, input_ids, decoder_input_ids, mask)
    got = np.asarray(model(input_ids, decoder_input_ids, segment_ids=jnp.asarray(mask)))
    assert np.abs(got - expected).max() < 1e-4


@pytest.mark.parametrize("variant", ["1.0", "1.1"])
def test_folders_of_older_transformers(tmp_path: Path, variant: str, seed: int) -> None:
    """Version 4 wrote what tie_word_embeddings is, and every name of the embedding."""
    from safetensors.numpy import load_file, save_file

    theirs = save_random_t5(tmp_path, seed, dtype="float16", **VARIANTS[variant])
    tied = VARIANTS[variant]["tie_word_embeddings"]
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scale_decoder_outputs"], config["dtype"]
    config |= {"tie_word_embeddings": tied, "torch_dtype": "float16", "architectures": ["T5WithLMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"]
    tensors.setdefault("lm_head.weight", tensors["shared.weight"])
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unread] = np.ones((32, 4), np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path, quant_type=None, dtype=jnp.float32)
    assert (model.lm_head is None) == tied
    input_ids, decoder_input_ids, mask = random_batch(seed)
    expected = torch_logits(theirs, input_ids, decoder_input_ids, mask)
    got = np.asarray(model(input_ids, decoder_input_ids, segment_ids=jnp.asarray(mask)))
    assert np.abs(got - expected).max() < 1e-4


def test_a_folder_that_bitsandbytes_has_quantized(tmp_path: Path, seed: int) -> None:
    import torch
    from transformers import BitsAndBytesConfig, T5ForConditionalGeneration

    theirs = save_random_t5(tmp_path / "base", seed, **V1_1)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantized = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "base", quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    quantized.save_pretrained(tmp_path / "4bit")
    checkpoint = open_checkpoint(tmp_path / "4bit")
    assert any(checkpoint.form(name) for name in checkpoint.names())
    weights = {name: torch.tensor(checkpoint.read(name).astype(np.float32)) for name in checkpoint.names()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    model = load_model(tmp_path / "4bit", dtype=jnp.float32)
    assert isinstance(model.decoder.block.layer[1].EncDecAttention.k.kernel.get_value(), NF4Tensor)
    input_ids, decoder_input_ids, mask = random_batch(seed)
    expected = torch_logits(theirs, input_ids, decoder_input_ids, mask)
    got = np.asarray(model(input_ids, decoder_input_ids, segment_ids=jnp.asarray(mask)))
    assert np.abs(got - expected).max() < 1e-4


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 40), (64, 1000)])
def test_buckets_of_distances(bidirectional: bool, buckets: int, max_distance: int) -> None:
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-1500, 1501)
    expected = T5Attention._relative_position_bucket(distance, bidirectional, buckets, max_distance).numpy()
    half = buckets // 2 if bidirectional else buckets
    table = distance_buckets(half, max_distance)
    back = np.abs(distance.numpy()) if bidirectional else np.maximum(-distance.numpy(), 0)
    got = table[np.minimum(back, max_distance)] + (half * (distance.numpy() > 0) if bidirectional else 0)
    np.testing.assert_array_equal(got, expected)


def test_target_token_by_token(tmp_path: Path, seed: int) -> None:
    theirs = save_random_t5(tmp_path, seed, **V1_0)
    model = load_model(tmp_path, quant_type=None, dtype=jnp.float32)
    input_ids, decoder_input_ids, mask = random_batch(seed, target=6)
    expected = torch_logits(theirs, input_ids, decoder_input_ids, mask)
    cache = model.init_cache(input_ids, segment_ids=jnp.asarray(mask), max_len=8)
    got = []
    for part in (slice(0, 3), slice(3, 4), slice(4, 6)):
        h, cache = model.decode(decoder_input_ids[:, part], cache)
        got.append(np.asarray(model.head(h)))
    assert int(cache.length) == 6
    assert np.abs(np.concatenate(got, axis=1) - expected).max() < 1e-4


def test_packed_examples_do_not_see_each_other(tmp_path: Path, seed: int) -> None:
    save_random_t5(tmp_path, seed, **V1_1)
    model = load_model(tmp_path, quant_type=None, dtype=jnp.float32)
    input_ids, decoder_input_ids, _ = random_batch(seed, source=20, target=12)
    alone = np.asarray(model(input_ids, decoder_input_ids))
    segments, decoder_segments = (np.repeat(np.int32([[1, 2]]), length, axis=1) for length in (20, 12))
    packed = model(
        input_ids.reshape(1, -1),
        decoder_input_ids.reshape(1, -1),
        segment_ids=jnp.asarray(segments),
        decoder_segment_ids=jnp.asarray(decoder_segments),
    )
    assert np.abs(np.asarray(packed).reshape(alone.shape) - alone).max() < 1e-5 * np.abs(alone).max()


def test_what_a_t5_is_not(tmp_path: Path) -> None:
    save_random_t5(tmp_path, 0)
    with pytest.raises(UserError, match="dtype=float16 for a T5"):
        load_model(tmp_path, dtype=jnp.float16)
    with pytest.raises(UserError, match="linears of a block are q, k, v, o, wi, wo"):
        load_model(tmp_path, rank=2, targets=["q_proj"])
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
        ({"d_kv": None}, "no usable d_kv"),
        ({"feed_forward_proj": "gated-swish2"}, "feed_forward_proj='gated-swish2'"),
        ({"d_ff": 64}, "expected"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load_model(tmp_path)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_in_peft_and_here(tmp_path: Path, seed: int) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSeq2SeqLM

    theirs = save_random_t5(tmp_path / "base", seed, **V1_1)
    linears = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    config = LoraConfig(r=4, lora_alpha=64, target_modules=linears, task_type="SEQ_2_SEQ_LM")
    theirs = get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base", quant_type=None, dtype=jnp.float32)
    input_ids, decoder_input_ids, _ = random_batch(seed)
    before = np.asarray(model(input_ids, decoder_input_ids))
    got = np.asarray(load_adapter(model, tmp_path / "adapter")(input_ids, decoder_input_ids))
    expected = torch_logits(theirs, input_ids, decoder_input_ids)
    assert np.abs(expected - before).max() > 0.1
    assert np.abs(got - expected).max() < 1e-3
    save_adapter(model, tmp_path / "again", base_model=str(tmp_path / "base"), base_sha256="0" * 64)
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "again/README.md").read_text()
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    written = torch_logits(PeftModel.from_pretrained(base, tmp_path / "again").eval(), input_ids, decoder_input_ids)
    assert np.abs(got - written).max() < 1e-3
