"""Package metadata; lint, type-check and test settings live in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

REMOTE = ["httpx2>=2.16", "tenacity>=9.1"]
SERVE = ["starlette>=1.0", "uvicorn>=0.50", "pydantic>=2.12"]
GENERATE = ["rapidfuzz>=3.10"]
TEST = [
    *(*REMOTE, *SERVE, *GENERATE, "openai>=3.0", "playwright>=1.60"),
    *("pytest>=9", "pytest-xdist>=3.8", "hypothesis>=6.150", "ruff>=0.17", "mypy>=2.4", "import-linter>=2.11"),
]


class BuildWithConfigs(build_py):
    """A wheel holds `configs/` as rlver_jax/configs, so that none called `configs` lies beside other packages."""

    def run(self) -> None:
        """Copies them behind what setuptools itself copies."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "rlver_jax" / "configs"
            shutil.copytree("configs", target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


setup(
    name="rlver_jax",
    version=re.search(r'__version__ = "(.+)"', Path("rlver_jax/__init__.py").read_text(encoding="utf-8"))[1],
    license="Apache-2.0",
    license_files=["LICENSE"],
    description="RLVER in JAX: train empathetic language models against a simulated user, on TPU pods",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    classifiers=[
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["rlver_jax", "rlver_jax.*"]),
    cmdclass={"build_py": BuildWithConfigs},
    package_data={
        "rlver_jax": ["py.typed"],
        "rlver_jax.user.prompts": ["[!_]*/*"],  # a folder for each language, but no __pycache__
        "rlver_jax.reports": ["assets/*"],
        "rlver_jax.evaluation": ["prompts/*/*"],
        "rlver_jax.miniature": ["prompts/*", "shipped/*", "shipped/*/*"],
    },
    entry_points={"console_scripts": ["rlver = rlver_jax.__main__:main"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "transformers>=5.20",  # tokenizer and config files only; nothing here imports torch
        "huggingface_hub>=1.31",  # transformers needs it too
        "tokenizers>=0.22",
        "sentencepiece>=0.2.1",
        "safetensors>=0.7",
        "ml-collections>=1.1",
        "absl-py>=2.3",
        "tensorflow-datasets>=4.9.10",
        "array-record>=0.8",
        "importlib_resources>=6.5",  # tensorflow-datasets needs it and does not ask for it
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "rich>=14",
        "tensorboardX>=2.6.4",
        "scipy>=1.15",
        "packaging>=24",  # transformers needs it too
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "test": TEST,
        "remote": REMOTE,
        "serve": SERVE,
        "parity": ["torch==2.13.0", "peft>=0.19"],
        "generate": GENERATE,
        "wandb": ["wandb>=0.21"],
    },
)
