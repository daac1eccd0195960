"""What is installed: the folder `kernels/` becomes the package `tinygrad_llm.kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="tinygrad_llm",
    version="0.1.0",
    description="A GPT from first principles: NumPy autograd, every gradient derived and checked",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["tinygrad_llm*"]),
        *["tinygrad_llm." + name for name in find_packages(include=["kernels*"])],
    ],
    package_data={"tinygrad_llm.kernels.gpu": ["tuned/*.json"]},
    package_dir={"tinygrad_llm.kernels": "kernels"},
    install_requires=[
        "numpy>=2.1",
        "tiktoken>=0.7",
        "regex",
        "threadpoolctl>=3",
        "safetensors>=0.4.4",
        "huggingface_hub>=0.30",
        "typer>=0.12",
        "rich>=13",
        "matplotlib>=3.8",
        "hypothesis>=6.100",
        "ml_dtypes>=0.5",
        "pooch>=1.8",
    ],
    extras_require={
        "tensorboard": ["tensorboardX>=2.6"],
        "gpu": ["triton>=3.6,<3.10", "cupy-cuda13x>=14"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "torch==2.13.0",
            "array-api-compat>=1.12",
            "array-api-strict>=2.3",
            "transformers>=4.40",
            "peft>=0.15",
            "tensorboardX>=2.6",
            "triton>=3.6,<3.10",
            "ruff",
        ],
    },
    entry_points={"console_scripts": ["tinygrad-llm = tinygrad_llm.cli:main"]},
)
