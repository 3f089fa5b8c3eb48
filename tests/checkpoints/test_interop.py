"""Our files in torch, transformers and PEFT, and theirs here."""

import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as Q

from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.checkpoints.bitsandbytes_writer import save_bitsandbytes
from qlora_jax.checkpoints.conversion import convert, write_dense
from qlora_jax.checkpoints.merging import MergedCheckpoint, adapter_for
from qlora_jax.checkpoints.peft import load_adapter, save_adapter
from qlora_jax.models.config import BLOCK_LINEARS
from qlora_jax.models.loading import load_model
from qlora_jax.nf4 import NF4Tensor, dequantize
from qlora_jax.nn import FrozenParam

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT calls what transformers will remove
]

IDS = np.arange(3, 35, dtype=np.int32).reshape(1, 32)


@pytest.fixture(scope="module", autouse=True)
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch and its friends warn about at import is theirs
        import peft
        import torch
        import transformers

        yield torch
    del peft, transformers


def adapted(model, seed):
    """Random values in A and B, of a size that moves the logits."""
    rng = np.random.default_rng(seed)
    for _, leaf in nnx.iter_graph(model):
        if isinstance(leaf, nnx.LoRAParam):
            leaf.set_value(jnp.asarray(0.1 * rng.normal(size=leaf.get_value().shape), jnp.float32))
    return model


def write_dequantized(model, source, torch):
    """The folder's torch model, float32, with the linears' weights replaced by what our model multiplies with."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state = reference.state_dict()
    for linear in BLOCK_LINEARS:
        part, name = linear.split(".")
        kernel = getattr(getattr(model.layers, part), name).kernel.get_value()
        values = np.asarray(dequantize(kernel) if isinstance(kernel, NF4Tensor) else kernel, np.float32)
        for i, layer in enumerate(values):
            state[f"model.layers.{i}.{linear}.weight"].copy_(torch.tensor(layer.T.copy()))
    return reference


def torch_logits(model, torch):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]], ids=["all linears", "two"])
def test_our_adapter_in_peft_gives_our_logits(golden_dir, tmp_path, torch, quant_type, targets):
    """Design table: exported adapter in real PEFT against ours, at most 1e-3 in float32."""
    from peft import PeftModel

    source = golden_dir / "interop" / "tiny_llama_bf16"
    model = load_model(source, quant_type=quant_type, rank=8, alpha=20.0, targets=targets, dtype=jnp.float32)
    reference = write_dequantized(model, source, torch)
    plain = np.asarray(model(jnp.asarray(IDS)))
    adapted(model, 1)
    save_adapter(model, tmp_path / "adapter", base_model=str(source), base_sha256=open_checkpoint(source).fingerprint())
    ours = np.asarray(model(jnp.asarray(IDS)))
    assert np.abs(ours - plain).max() > 0.1  # the adapter matters
    np.testing.assert_allclose(torch_logits(reference, torch), plain, atol=1e-4, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns about keys that it misses or does not know
        with_adapter = PeftModel.from_pretrained(reference, str(tmp_path / "adapter"))
    np.testing.assert_allclose(torch_logits(with_adapter, torch), ours, atol=1e-3, rtol=0)


def test_pefts_adapter_here_gives_pefts_logits(golden_dir, tmp_path, torch):
    from peft import LoraConfig, get_peft_model

    source = golden_dir / "interop" / "tiny_llama_bf16"
    model = load_model(source, dtype=jnp.float32)
    reference = write_dequantized(model, source, torch)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=["v_proj", "gate_proj"], task_type="CAUSAL_LM", use_rslora=True
    )
    theirs = get_peft_model(reference, config)
    for name, value in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = np.asarray(load_adapter(model, tmp_path / "adapter")(jnp.asarray(IDS)))
    np.testing.assert_allclose(ours, torch_logits(theirs, torch), atol=1e-3, rtol=0)


@pytest.mark.parametrize("base", ["folder", "gguf"])
def test_the_readmes_code_loads_the_adapter(golden_dir, tmp_path, tiny_gguf, torch, base):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    source = golden_dir / "interop" / "tiny_llama_bf16"
    if base == "gguf":
        source = tmp_path / "tiny.gguf"
        tiny_gguf({"*": Q.BF16}, norms=1.0).write(source)
    model = load_model(source, quant_type=None, rank=4, dtype=jnp.float32)
    plain = np.asarray(model(jnp.asarray(IDS)))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>")), chat_template="{{ 1 }}"
    )
    save_adapter(adapted(model, 2), tmp_path / "a", base_model=str(source), base_sha256="ab", tokenizer=tokenizer)
    code = (tmp_path / "a" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("bfloat16", "float32"), names)
    ours = np.asarray(model(jnp.asarray(IDS)))
    assert np.abs(ours - plain).max() > 0.1
    np.testing.assert_allclose(torch_logits(names["model"], torch), ours, atol=1e-3, rtol=0)
    assert names["tokenizer"].chat_template == "{{ 1 }}"


def same_bits(checkpoint, state, torch):
    for name in checkpoint.names():
        theirs = state[name].contiguous().view(torch.int16).numpy()
        assert np.array_equal(checkpoint.read(name).view(np.int16), theirs), name


@pytest.mark.parametrize(
    "types", [{"*": Q.Q8_0}, {"*": Q.Q4_1, "attn_q": Q.Q4_0, "token_embd": Q.F16}], ids=["q8", "mixed"]
)
def test_gguf_tensors_have_transformers_bits(tiny_gguf, tmp_path, torch, types):
    from transformers import AutoModelForCausalLM, GgufConfig

    tiny_gguf(types, tied=False).write(tmp_path / "tiny.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    same_bits(open_checkpoint(tmp_path / "tiny.gguf"), theirs.state_dict(), torch)


@pytest.mark.real
def test_smollm2_has_transformers_bits(torch):
    from transformers import AutoModelForCausalLM, GgufConfig

    from qlora_jax.training.demo import fetch_demo_model

    file = fetch_demo_model()
    checkpoint = open_checkpoint(file)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    assert len(checkpoint.names()) == 272
    same_bits(checkpoint, theirs.state_dict(), torch)
    assert checkpoint.config["rope_theta"] == theirs.config.rope_parameters["rope_theta"]
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"):
        assert checkpoint.config[key] == pytest.approx(getattr(theirs.config, key), rel=1e-7)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_transformers_4_bit_folder_gives_its_weights_and_logits(golden_dir, tmp_path, torch, quant_type):
    """Written here by transformers and bitsandbytes; logits in float32 over the weights that bitsandbytes decodes."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=quant_type == "nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.uint8 if quant_type == "nf4" else torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "v_proj"],
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        golden_dir / "interop" / "tiny_llama_bf16", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", dtype=jnp.float32)
    kernel = model.layers.mlp.up_proj.kernel.get_value()
    assert (kernel.quant_type, kernel.absmax_scale is None) == (quant_type, quant_type == "fp4")
    assert not isinstance(model.layers.self_attn.v_proj.kernel.get_value(), NF4Tensor)
    dense = AutoModelForCausalLM.from_pretrained(golden_dir / "interop" / "tiny_llama_bf16", dtype=torch.float32)
    for name, module in theirs.named_modules():
        if isinstance(module, Linear4bit):
            decoded = dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(name).weight.data.copy_(decoded)
    for i, layer in enumerate(np.asarray(dequantize(kernel), np.float32)):
        np.testing.assert_array_equal(layer.T, dense.model.layers[i].mlp.up_proj.weight.detach().numpy())
    np.testing.assert_allclose(torch_logits(dense, torch), np.asarray(model(jnp.asarray(IDS))), atol=1e-3, rtol=0)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_4_bit_folder_of_ours_in_transformers(golden_dir, tmp_path, torch, quant_type):
    """NF4 with double quantization: exactly the logits of the folder that transformers wrote. FP4, v_proj skipped."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    interop = golden_dir / "interop"
    source = interop / ("tiny_llama_bnb4" if quant_type == "nf4" else "tiny_llama_bf16")
    model = load_model(source, quant_type=quant_type, double_quant=quant_type == "nf4", dtype=jnp.float32)
    if quant_type == "fp4":
        plain = load_model(source, quant_type=None)
        model.layers.self_attn.v_proj.kernel = FrozenParam(plain.layers.self_attn.v_proj.kernel.get_value())
    save_bitsandbytes(model, tmp_path / "out", source=source)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    dense = AutoModelForCausalLM.from_pretrained(interop / "tiny_llama_bf16", dtype=torch.float32)
    packed = {name: module for name, module in ours.named_modules() if isinstance(module, Linear4bit)}
    assert len(packed) == (14 if quant_type == "nf4" else 12)
    for name, module in packed.items():
        assert module.weight.quant_state.quant_type == quant_type
        decoded = dequantize_4bit(module.weight.data, module.weight.quant_state)
        dense.get_submodule(name).weight.data.copy_(decoded)
    np.testing.assert_allclose(torch_logits(dense, torch), np.asarray(model(jnp.asarray(IDS))), atol=1e-3, rtol=0)
    if quant_type == "nf4":
        theirs = AutoModelForCausalLM.from_pretrained(source, device_map="cpu")
        with torch.no_grad():
            left, right = (loaded(torch.tensor(IDS, dtype=torch.long)).logits.float() for loaded in (ours, theirs))
        np.testing.assert_array_equal(left.numpy(), right.numpy())


def test_a_converted_folder_in_transformers_gives_our_logits(golden_dir, tmp_path, torch):
    """As loaded by transformers and bitsandbytes, in shards; a tied head too. Logits over the weights they decode."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.float16).save_pretrained(tmp_path / "source")
    for i, source in enumerate([golden_dir / "interop" / "tiny_llama_bf16", tmp_path / "source"]):
        made = convert(open_checkpoint(source), tmp_path / f"out{i}", shard_bytes=100_000)
        assert len(made.files) > 1
        model = load_model(tmp_path / f"out{i}", dtype=jnp.float32)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{i}", device_map="cpu")
        dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        packed = {name: module for name, module in theirs.named_modules() if isinstance(module, Linear4bit)}
        assert len(packed) == 7 * model.config.num_hidden_layers
        for name, module in packed.items():
            dense.get_submodule(name).weight.data.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))
        np.testing.assert_allclose(torch_logits(dense, torch), np.asarray(model(jnp.asarray(IDS))), atol=1e-4, rtol=0)
        with torch.no_grad():  # in training mode: bitsandbytes' own product on the CPU repacks the weights
            rounded = theirs.train()(torch.tensor(IDS, dtype=torch.long)).logits.float().numpy()
        # Activations in 16 bits; tests/golden/README.md has the distances.
        np.testing.assert_allclose(rounded, torch_logits(dense, torch), atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", ["adapter_default", "adapter_all_linear", "adapter_mts"])
def test_every_adapter_that_peft_wrote_here_and_back(golden_dir, tmp_path, torch, name):
    """The fixtures on the base that they were made for, B and a replaced head made to matter; then ours, in PEFT."""
    from peft import PeftModel
    from safetensors.numpy import load_file, save_file

    source, folder = golden_dir / "interop" / "tiny_llama_bnb4", tmp_path / "adapter"
    shutil.copytree(golden_dir / "interop" / name, folder)
    tensors, rng = load_file(folder / "adapter_model.safetensors"), np.random.default_rng(4)
    for key, value in tensors.items():
        if "lora_A" not in key:
            tensors[key] = value + rng.normal(size=value.shape, scale=0.1).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    dense = golden_dir / "interop" / "tiny_llama_bf16"
    model = load_model(source, dtype=jnp.float32)
    theirs = PeftModel.from_pretrained(write_dequantized(model, dense, torch), str(folder))
    plain, ours = np.asarray(model(jnp.asarray(IDS))), np.asarray(load_adapter(model, folder)(jnp.asarray(IDS)))
    assert np.abs(ours - plain).max() > 0.1
    np.testing.assert_allclose(ours, torch_logits(theirs, torch), atol=1e-3, rtol=0)
    save_adapter(model, tmp_path / "again", base_model=str(source), base_sha256="ab")
    again = PeftModel.from_pretrained(write_dequantized(model, dense, torch), str(tmp_path / "again"))
    np.testing.assert_allclose(ours, torch_logits(again, torch), atol=1e-3, rtol=0)


def test_patterns_single_layers_and_a_saved_head_both_ways(golden_dir, tmp_path, torch):
    from peft import LoraConfig, PeftModel, get_peft_model

    source = golden_dir / "interop" / "tiny_llama_bf16"
    model = load_model(source, dtype=jnp.float32)
    torch.manual_seed(5)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        exclude_modules=["model.layers.0.mlp.up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 3},
        alpha_pattern={"v_proj": 11, "model.layers.0.self_attn.q_proj": 3},
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(write_dequantized(model, source, torch), config)
    for name, value in theirs.named_parameters():
        if "lora_B" in name or ("modules_to_save" in name and "lm_head" in name):
            torch.nn.init.normal_(value, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = np.asarray(load_adapter(model, tmp_path / "adapter")(jnp.asarray(IDS)))
    np.testing.assert_allclose(ours, torch_logits(theirs, torch), atol=1e-3, rtol=0)
    save_adapter(model, tmp_path / "again", base_model=str(source), base_sha256="ab")
    reference = write_dequantized(model, source, torch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(reference, str(tmp_path / "again"))
    np.testing.assert_allclose(ours, torch_logits(again, torch), atol=1e-3, rtol=0)


@pytest.mark.parametrize("quantized", [None, {"quant_type": "nf4", "block_size": 64, "double_quant": True}])
def test_a_merged_folder_in_transformers_gives_our_logits(golden_dir, tmp_path, torch, quantized):
    """In shards; what transformers loads computes what our model with its adapter does."""
    from transformers import AutoModelForCausalLM

    interop = golden_dir / "interop"
    checkpoint = open_checkpoint(interop / "tiny_llama_bf16")
    adapter = adapter_for(checkpoint, interop / "adapter_all_linear")
    merged = MergedCheckpoint(checkpoint, adapter, quantized=quantized, dtype="float32")
    assert len(write_dense(merged, tmp_path / "out", shard_bytes=300_000).files) > 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32
    model = load_model(checkpoint, **(quantized or {"quant_type": None}), dtype=jnp.float32)
    ours = np.asarray(load_adapter(model, interop / "adapter_all_linear")(jnp.asarray(IDS)))
    np.testing.assert_allclose(ours, torch_logits(theirs, torch), atol=1e-4, rtol=0)


def test_dora_has_pefts_outputs_and_gradients(golden_dir, tmp_path, torch):
    """On the dequantized 4-bit base: logits, the gradient of every factor and magnitude, and the way back to PEFT."""
    import jax
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.numpy import load_file

    source = golden_dir / "interop" / "tiny_llama_bf16"
    model = load_model(source, dtype=jnp.float32)
    torch.manual_seed(6)
    config = LoraConfig(
        r=4, lora_alpha=12, use_dora=True, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(write_dequantized(model, source, torch), config)
    for name, value in theirs.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            value.data += 0.1 * torch.randn_like(value)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    np.testing.assert_allclose(np.asarray(model(jnp.asarray(IDS))), torch_logits(theirs, torch), atol=1e-3, rtol=0)

    weights = np.random.default_rng(1).normal(size=(1, 32, 256)).astype(np.float32)
    theirs.train()
    (theirs(torch.tensor(IDS, dtype=torch.long)).logits * torch.tensor(weights)).sum().backward()
    graph, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)
    loss = lambda adapters: (nnx.merge(graph, adapters, frozen)(jnp.asarray(IDS)) * weights).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(loss))(adapters)
    compared = 0
    for name, value in theirs.named_parameters():
        if value.grad is None:
            continue
        _, path = name.split("model.layers.")
        layer, part, linear, kind = path.split(".")[:4]
        leaf = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "lora_magnitude"}[kind]
        ours = np.asarray(getattr(gradients["layers"][part][linear][leaf], "get_value", lambda: None)())[int(layer)]
        ours = ours if ours.ndim == 1 else ours.T
        assert np.linalg.norm(ours - value.grad.numpy()) <= 1e-4 * np.linalg.norm(value.grad.numpy()), name
        compared += 1
    assert compared == 2 * 3 * 3

    save_adapter(model, tmp_path / "again", base_model=str(source), base_sha256="ab")
    written, before = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("again", "adapter"))
    assert written.keys() == before.keys()
    again = PeftModel.from_pretrained(write_dequantized(model, source, torch), str(tmp_path / "again"))
    np.testing.assert_allclose(np.asarray(model(jnp.asarray(IDS))), torch_logits(again, torch), atol=1e-3, rtol=0)

    checkpoint = open_checkpoint(source)
    quantized = {"quant_type": "nf4", "block_size": 64, "double_quant": True}
    merged = MergedCheckpoint(
        checkpoint, adapter_for(checkpoint, tmp_path / "again"), quantized=quantized, dtype="float32"
    )
    dense = again.merge_and_unload().state_dict()
    for name in merged.names():
        np.testing.assert_allclose(merged.read(name), dense[name].numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
