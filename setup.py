"""Installs the package: everything it says stands in settings.ini, where nbdev reads it too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

expected = "lib_name version description keywords author min_python license status audience language".split()
missing = [name for name in expected if name not in settings]
assert not missing, f"settings.ini lacks {missing}"

licenses = {"apache2": "Apache-2.0"}
stages = "Planning|Pre-Alpha|Alpha|Beta|Production/Stable|Mature|Inactive".split("|")
pythons = ["3.10", "3.11", "3.12"]
license_name = licenses[settings["license"]]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    keywords=settings["keywords"],
    author=settings["author"],
    license=license_name,
    classifiers=[
        f"Development Status :: {settings['status']} - {stages[int(settings['status']) - 1]}",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        *[f"Programming Language :: Python :: {version}" for version in pythons],
    ],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=[settings["lib_name"], settings["lib_name"] + ".*"]),
    package_data={settings["lib_name"]: settings["package_data"].split()},
    include_package_data=False,  # package_data says which files: those in MANIFEST.in are for the source archive
    install_requires=settings["requirements"].split(),
    extras_require={"dev": settings["dev_requirements"].split()},
    entry_points={"nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"], "console_scripts": settings["console_scripts"].split()},
    zip_safe=False,
)
