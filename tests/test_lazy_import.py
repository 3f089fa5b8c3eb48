"""`from qlora_jax import nf4_dense` must stay light: none of the libraries that only other rooms need."""

import subprocess
import sys

import pytest

HEAVY = (
    "transformers",
    "grain",
    "orbax",
    "torch",
    "matplotlib",
    "tokenizers",
    "sentencepiece",
    "gguf",
    "pydantic",
    "tyro",
)


def loaded_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "from qlora_jax import nf4_dense, quantize_model, scan_layers, trainable",
        "from qlora_jax.linen import nf4_dense",
    ],
)
def test_taking_the_layer_does_not_import_the_rest(code):
    assert not loaded_after(code) & set(HEAVY)


def test_importing_the_package_does_not_import_jax():
    assert not loaded_after("import qlora_jax") & {*HEAVY, "jax", "flax", "optax", "numpy"}


def test_every_public_name_is_found():
    import qlora_jax

    assert set(qlora_jax.__all__) <= set(dir(qlora_jax))
    with pytest.raises(AttributeError, match="no_such_name"):
        qlora_jax.no_such_name  # noqa: B018
