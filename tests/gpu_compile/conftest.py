"""XLA's own GPU compiler without a GPU: `gpu_compile(jitted, *args)` compiles for an H100; sizes of buffers, HLO.

The program is traced on CPU devices, so that memory kinds such as pinned_host survive (compile-only devices have no
memories), lowered for "cuda", and given to the compile-only client of a topology made from `h100.txtpb`. Nothing is
executed. jax has no public way to do this; the private names used here are the same in jax 0.10.2, 0.11.2 and 0.12.0.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import compiler
from jax._src.lib import xla_client
from jax.experimental import topologies

TARGET = Path(__file__).parent / "h100.txtpb"
sys.path.append(str(Path(__file__).parent))  # the rooms beside this file, which scripts import too


@dataclass(frozen=True)
class Compiled:
    """Sizes in bytes. `device_peak`: arguments, temporaries and results in device memory, aliased ones once.

    `aliased`: results that take the place of donated arguments. `hlo`: the optimized program.
    """

    device_peak: int
    temp: int
    output: int
    aliased: int
    hlo: str = field(repr=False)
    host_arguments: int
    host_aliased: int
    host_temp: int


def _need_plugin() -> None:
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "none"
        if found != jax.__version__:
            pytest.fail(
                f"{package} {jax.__version__} is needed, found {found}: run .ci/gpu_compile, or, in an environment of "
                "its own, pip install --no-deps "
                f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}",
                pytrace=False,
            )


@pytest.fixture(scope="session")
def gpu_compile() -> Callable[..., Compiled]:
    _need_plugin()
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology="1x1x1")
    client = topology.devices[0].client

    def compile_for_gpu(jitted: Any, *args: Any, **xla_options: Any) -> Compiled:
        module = jitted.trace(*args).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
        options = compiler.get_compile_options(
            num_replicas=1,
            num_partitions=1,
            device_assignment=np.zeros((1, 1), np.int64),
            backend=client,
            # Autotuning would run kernels.
            env_options_overrides={"xla_gpu_autotune_level": "0"} | xla_options,
        )
        options.executable_build_options.use_shardy_partitioner = True
        devices = xla_client.DeviceList(tuple(topology.devices[:1]))
        executable = client.compile(module, executable_devices=devices, compile_options=options)
        m = executable.get_compiled_memory_stats()
        return Compiled(
            device_peak=m.argument_size_in_bytes
            + m.temp_size_in_bytes
            + m.output_size_in_bytes
            - m.alias_size_in_bytes,
            temp=m.temp_size_in_bytes,
            output=m.output_size_in_bytes,
            aliased=m.alias_size_in_bytes,
            hlo=executable.hlo_modules()[0].to_string(),
            host_arguments=m.host_argument_size_in_bytes,
            host_aliased=m.host_alias_size_in_bytes,
            host_temp=m.host_temp_size_in_bytes,
        )

    return compile_for_gpu
