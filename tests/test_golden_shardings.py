"""Where every parameter of the full-size configs lies, held against files: a change shows as a readable diff.

python tests/test_golden_shardings.py      writes the files anew
"""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden/shardings"
CONFIGS = sorted(
    [
        path
        for folder in ("pisces_8b", "pisces_1b")
        for path in (ROOT / "configs" / folder).glob("*.py")
        if path.stem != "parts"  # what these configs share
    ]
    + [ROOT / "configs/text_8b.py"]
)
# v4-128 and v5p-128; v5e-256 and v6e-256; the former with tensor parallelism. The 1B model is for one host of GPUs, and
# so are the 8B configs that fit on one GPU.
HOST = (dict(fsdp=8), dict(fsdp=4, tensor=2))
MESHES = {
    "pisces_8b": (dict(fsdp=64), dict(fsdp=256), dict(fsdp=16, tensor=4)),
    "pisces_1b": HOST,
    "stage1_lora": HOST,
    "stage1_1gpu": HOST,
}


def name_of(path):
    return "-".join(path.relative_to(ROOT / "configs").with_suffix("").parts)


def shardings(path):
    from pisces_jax.planning.shardings import describe, trainer_without_devices
    from pisces_jax.training.config_files import load_stages

    (config,) = load_stages(str(path), {}).values()
    sections = []
    for mesh in MESHES.get(path.stem) or MESHES.get(path.parent.name, MESHES["pisces_8b"]):
        head = ",".join(f"{axis}={size}" for axis, size in mesh.items())
        sections.append(f"# {head}\n{describe(trainer_without_devices(config, mesh))}\n")
    return "\n".join(sections)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_shardings(path):
    expected = (GOLDEN / f"{name_of(path)}.txt").read_text()
    assert shardings(path).splitlines() == expected.splitlines(), f"see the diff; then run python {__file__}"


def test_every_large_matrix_is_sharded_over_all_devices():
    """What the files cannot show to be right: no matrix of a million numbers or more is held whole, on any mesh."""
    for path in GOLDEN.glob("*.txt"):
        for section in path.read_text().split("# ")[1:]:
            for line in section.splitlines()[1:]:
                if not line or line.startswith("does not") or line.endswith(" parameters"):
                    continue
                _, shape, _, _, where = line.split(" ", 4)
                size = 1
                for n in shape.split("x"):
                    size *= int(n or 1)
                if size >= 2**20 and "position_embedding" not in line:
                    assert "fsdp" in where, f"{path.name}: {line}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for config in CONFIGS:
        (GOLDEN / f"{name_of(config)}.txt").write_text(shardings(config))
