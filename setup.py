"""Map the three source folders to one import namespace; pyproject.toml holds the rest."""

from setuptools import find_packages, setup

ROOTS = {"quire": "core_engine", "quire.kernels": "kernels", "quire.integrations": "integrations"}

packages = [
    name
    for root, folder in ROOTS.items()
    for name in (root, *(f"{root}.{package}" for package in find_packages(folder)))
]

setup(package_dir=ROOTS, packages=packages)
