"""Package moth_jax; requirements.txt is the list of its dependencies."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def requirements() -> list[str]:
    """Return the requirements, comments removed."""
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    stripped = [line.partition("#")[0].strip() for line in lines]
    return [line for line in stripped if line]


def long_description() -> str:
    """Return the README, if there is one."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="moth_jax",
    version="0.1.0",
    description="Model orthogonalization in JAX: class distances, measured and hardened",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The moth_jax authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["moth_jax", "moth_jax.*"]),
    package_data={"moth_jax": ["py.typed"], "moth_jax.report": ["*.html", "*.css"]},
    install_requires=requirements(),
    extras_require={
        # Reading PyTorch's own files; weights_only is the default from 2.6 on. torchvision is for
        # weights of its classifiers that are given by name.
        "torch": ["torch>=2.6,<3", "torchvision>=0.21,<1"],
        # ruff within a minor version, because the next one formats differently.
        "test": [
            "dm-haiku>=0.0.13,<0.1",
            "equinox>=0.11,<0.14",
            "hypothesis>=6.100,<7",
            "pyright[nodejs]>=1.1.400,<2",
            "pytest>=8.2,<10",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17,<0.18",
        ],
        "cuda": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
