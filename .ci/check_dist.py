"""Check the wheel and the sdist of a folder: the demo's weights once, the scripts, no tests, no leftovers."""

import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

WANTED = (
    "blob_hf/app/style.css",
    "blob_hf/data/demo/backbone/model.safetensors",
    "blob_hf/lm_eval/blob_choices.yaml",
    "blob_hf/py.typed",
    "run_glue_blob.py",
    "run_multiple_choice_blob.py",
    "run_sft_blob.py",
    "run_summarization_blob.py",
)


def check(archive: Path, names: list[str]) -> None:
    sizes = f"{archive.name}: {archive.stat().st_size / 2**20:.1f} MiB, {len(names)} files"
    found = Counter(names)
    wrong = [f"{name} is in it {found[name]} times" for name in WANTED if found[name] != 1]
    weights = [name for name in names if name.endswith(".safetensors")]
    if len(weights) != 1:
        wrong.append(f"weights: {weights}")
    wrong += [f"{name} does not belong in it" for name in names if name.split("/")[0] in ("tests", "build", "dist")]
    if wrong:
        sys.exit(f"{sizes}\n" + "\n".join(wrong))
    print(f"{sizes}: complete")


def main() -> None:
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        check(wheel, archive.namelist())
    with tarfile.open(sdist) as archive:  # its names begin with a folder of name and version
        check(sdist, [one.name.split("/", 1)[1] for one in archive.getmembers() if one.isfile()])


if __name__ == "__main__":
    main()
