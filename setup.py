"""Packaging read from settings.ini, so that nbdev and pip share one list of versions and
requirements."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here / "settings.ini", encoding="utf-8")
c = cfg["DEFAULT"]

setup(
    name=c["lib_name"],
    version=c["version"],
    description=c["description"],
    keywords=c["keywords"].split(),
    author=c["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=" + c["min_python"],
    packages=[c["lib_path"]],
    install_requires=c["requirements"].split(),
    extras_require={"dev": c["dev_requirements"].split()},
    entry_points={"console_scripts": c["console_scripts"].split()},
    zip_safe=False,
)
