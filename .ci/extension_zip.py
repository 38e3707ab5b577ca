"""The extension as one ZIP that unpacks to `gptq_webui`: python .ci/extension_zip.py [FOLDER TO PUT IT IN]

Holds the tracked files that run, without tests, pictures and what builds them; the same files give the same bytes.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "gptq_webui"  # importable, whatever the checkout's folder is called
LEFT_OUT = (".", "tests/", "docs/", "benchmarks/", "MANIFEST.in")


def files() -> list[str]:
    """Paths of the tracked files that belong to the extension."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return sorted(each for each in listed.split("\0") if each and not each.startswith(LEFT_OUT) and (ROOT / each).is_file())


def build(folder: Path) -> Path:
    path = folder / f"{NAME}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for each in files():
            entry = zipfile.ZipInfo(f"{NAME}/{each}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, (ROOT / each).read_bytes(), zipfile.ZIP_DEFLATED)
    return path


if __name__ == "__main__":
    print(build(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()))
