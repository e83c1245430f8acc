"""Nothing in our code unpickles, evaluates text, or hands a line to a shell; importing it changes nothing around it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("mlxlora", "convert") for path in (ROOT / folder).rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pty", "commands"}
NAMES = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnl", "os.spawnv", "subprocess.getoutput",
    "subprocess.getstatusoutput", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load", "jinja2.Template",
    "jinja2.Environment", "input", "builtins.input", "tempfile.mktemp",
}  # fmt: skip
# What is allowed, where, and why
ALLOWED = {
    # Our own template of the report, with autoescape; nothing that came with a model or with data is compiled.
    ("mlxlora/reporting/report.py", "jinja2.Environment"),
    # The line prompt of the chat verb: reading a person's turn from a terminal is its purpose.
    ("mlxlora/chat.py", "input"),
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source: str) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            names = [str(node.module)]
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in NAMES | CALLS:
                names = [name]
            for flag in ("shell", "allow_pickle"):
                value = keywords.get(flag)
                if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                    names.append(f"{flag}=")
            weights_only = keywords.get("weights_only")
            if name.endswith("torch.load") and isinstance(weights_only, ast.Constant) and weights_only.value is True:
                names.remove(name)
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            fixed = isinstance(node.value, ast.Constant) and node.value.value is not False
            names = ["trust_remote_code="] if fixed else []
        found += [(getattr(node, "lineno", 0), name) for name in names]
    return found


def test_the_scan_finds_what_it_looks_for() -> None:
    bad = {
        "import pickle": "pickle",
        "from pickle import loads": "pickle",
        "eval('1')": "eval",
        "import os\nos.system('x')": "os.system",
        "import subprocess\nsubprocess.run('x', shell=True)": "shell=",
        "import numpy as np\nnp.load('x', allow_pickle=True)": "allow_pickle=",
        "import torch\ntorch.load('x')": "torch.load",
        "load('x', trust_remote_code=True)": "trust_remote_code=",
    }
    assert {source: [name for _, name in dangers(source)] for source in bad} == {s: [n] for s, n in bad.items()}
    assert not dangers("import torch\ntorch.load('x', weights_only=True)\nmodel.eval()\nmx.eval(x)\nre.compile('x')")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_eval_exec_or_shell(path: Path) -> None:
    where = str(path.relative_to(ROOT))
    found = [f"{where}:{line}: {name}" for line, name in dangers(path.read_text()) if (where, name) not in ALLOWED]
    assert not found, "\n".join(found)


LOOK = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
from tests.faults.surroundings import look
before = look()
import mlxlora
for module in sys.argv[1:]:
    __import__(module)
after = look()
same = set(before["classes"])
after["classes"] = {name: value for name, value in after["classes"].items() if name in same}
print(json.dumps({k: [before[k], after[k]] for k in before if before[k] != after[k]}))
"""
# Modules that may be run as programs, or that belong to a platform
SKIPPED = {"mlxlora.__main__"}


def test_importing_changes_nothing() -> None:
    modules = {
        ".".join(path.relative_to(ROOT / "mlxlora").with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if path.is_relative_to(ROOT / "mlxlora")
    }
    names = sorted({f"mlxlora.{name}" for name in modules if name and name != "__init__"} - SKIPPED)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOOK, str(ROOT), *names],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {}
    assert not done.stderr and len(done.stdout.splitlines()) == 1


def test_importing_is_quick_and_leaves_the_heavy_ones_out() -> None:
    code = "import sys, mlxlora, mlxlora.cli\n"
    code += "print([n for n in ('torch','transformers','mlx_lm','datasets') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.strip() == "[]"
