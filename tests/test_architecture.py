"""The architecture, held by the syntax tree: which part may import which, and where an op and its
kernels live. docs/architecture.md says why."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from tinygrad_llm import backend
from tinygrad_llm.ops import TABLE

ROOT = Path(__file__).parent.parent
ENGINE = [
    "threads",
    "ops",
    "device",
    "precision",
    "backend",
    "tensor",
    "random",
    "functional",
    "pencil",
    "check",
    "explain",
]
MODEL = ["nn", "optim", "gpt", "data", "tokenizer", "checkpoint", "generate"]
PARTS = [*ENGINE, *MODEL, "parallel", "step", "train", "finetune", "evaluate", "cli", "__main__"]
MAY_IMPORT = {part: set(PARTS[:i]) for i, part in enumerate(PARTS)}  # what stands before it
MAY_IMPORT |= {part: may - {"ops"} for part, may in MAY_IMPORT.items() if part not in ENGINE}
MAY_IMPORT |= {"kernels": {"threads"}, "data": {"random"}, "tokenizer": {"data"}}
MAY_IMPORT |= {"__init__": {"tensor"}}
MAY_IMPORT["gpt"] |= {"checkpoint", "tokenizer"}  # from_pretrained, save_pretrained: when called
MAY_IMPORT |= {"pencil": {"ops"}, "device": {"kernels"}, "precision": set()}
MAY_IMPORT["backend"] |= {"kernels"}
PACKAGES = {"threads": {"threadpoolctl"}, "ops": set()}
PACKAGES |= {"kernels": {"numpy", "cupy", "triton", "ml_dtypes"}}
PACKAGES |= {part: {"numpy"} for part in [*ENGINE[2:], "nn", "optim", "gpt"]}
PACKAGES |= {"device": {"numpy", "cupy"}, "precision": {"numpy", "ml_dtypes"}}
PACKAGES |= {"pencil": set(), "check": {"numpy", "hypothesis"}}
FILES = sorted(ROOT.glob("tinygrad_llm/**/*.py")) + sorted(ROOT.glob("kernels/**/*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))


def module_of(file):
    """The name under which the file is imported, as a list."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return parts if parts[0] == "tinygrad_llm" else ["tinygrad_llm", *parts]


def imports(file):
    """Absolute names of all that a file imports, also inside functions and by import_module."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module_of(file)[: -node.level] if node.level else []
            base = [*base, node.module] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


@every_file
def test_imports_keep_their_direction(file):
    part = module_of(file)[1]
    assert part in MAY_IMPORT, f"say in {__file__} what {part} may import"
    names = [name.split(".") for name in imports(file)]
    inside = {name[1] for name in names if name[0] == "tinygrad_llm"} & {*PARTS, "kernels"}
    assert inside - {part} <= MAY_IMPORT[part]
    outside = {name[0] for name in names} - {"tinygrad_llm"} - sys.stdlib_module_names
    assert "torch" not in outside
    assert outside <= PACKAGES.get(part, outside)


def run(program):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split()


def test_importing_the_library_loads_nothing_heavy():
    loaded = set(run("import tinygrad_llm, sys; print(*sys.modules)"))
    assert not loaded & {"torch", "triton", "cupy", "matplotlib", "tiktoken", "rich", "typer"}


def test_every_module_can_be_imported_where_there_is_no_torch():
    names = [m.name for m in pkgutil.walk_packages([str(ROOT / "tinygrad_llm")], "tinygrad_llm.")]
    names = [n for n in names if not n.endswith("__main__")]
    assert "tinygrad_llm.tensor" in names
    run(f"import sys; sys.modules['torch'] = None\nimport {', '.join(names)}")


GPU_KERNELS = backend._load_kernels("tinygrad_llm.kernels.gpu")  # whether or not they can run


@pytest.mark.parametrize("name, kernel", [*backend.CPU.kernels.items(), *GPU_KERNELS.items()])
def test_every_kernel_lives_in_the_file_of_its_ops_name(name, kernel):
    op = TABLE[name]
    assert kernel.__module__.rpartition(".")[2] == op.vjp.__module__.rpartition(".")[2]
    assert kernel.__name__ == name
    assert kernel.__doc__
