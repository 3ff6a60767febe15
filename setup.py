from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

DEMO = ["gguf>=0.17", "accelerate>=1.1", "matplotlib>=3.8"]
TENSORBOARD = ["tensorboard>=2.18"]
README = Path(__file__).parent / "README.md"

setup(
    name="maskpro-kernels",
    version="0.1.0",
    description="Fused kernels that learn N:M sparsity masks of frozen language models by policy gradient",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["maskpro_kernels", "maskpro_kernels.*"]),
    package_data={"maskpro_kernels": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "transformers>=5",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "tqdm>=4.60",
        "filelock>=3.12",
        "llvmlite>=0.45",
    ],
    extras_require={
        "demo": DEMO,
        "data": ["datasets>=3"],
        "tensorboard": TENSORBOARD,
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "mpmath>=1.3",
            "ruff>=0.12",
            *DEMO,
            *TENSORBOARD,
        ],
        "bench": ["pytest>=8"],
    },
    entry_points={"console_scripts": ["maskpro = maskpro_kernels.cli.main:main"]},
)
