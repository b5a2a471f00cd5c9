"""Build the package from settings.ini, the one source of facts."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(root / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
lib = cfg["lib_name"]

setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=f">={cfg['min_python']}",
    # data_samples/ lies at the top of a checkout and travels inside the package in a wheel.
    packages=find_packages(include=[lib, f"{lib}.*"]) + [f"{lib}.data_samples"],
    package_dir={f"{lib}.data_samples": "data_samples"},
    package_data={lib: ["lab/*", "models/*.json", "study/results/*.json", "train/configs/*.yaml"], f"{lib}.data_samples": ["*", "*/*", "*/*/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "docs": cfg["docs_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
