"""What holds for the source tree as a whole: its dependencies and the calls it must not make."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import TypeCheckError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from zipir_jax.restorer import pad_by_reflection

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "zipir_jax").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def imports(path):
    """Full names that a file imports: "flax.nnx" for `from flax import nnx`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_using(pattern):
    """Files with an import or attribute, such as "nnx.Module", in which a pattern is found."""
    found = set()
    for path in SOURCES:
        nodes = ast.walk(ast.parse(path.read_text()))
        names = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)] + [*imports(path)]
        if any(re.search(pattern, name) for name in names):
            found.add(str(path.relative_to(ROOT)))
    return found


def test_attention_has_one_door():
    assert files_using(r"\bdot_product_attention$") == {"zipir_jax/models/attention.py"}


def test_steps_are_plain_jax():
    assert files_using(r"\bnnx\.(jit|grad|value_and_grad|scan|Optimizer)\b") == set()


def test_no_private_jax():
    assert files_using(r"\bjax\._src\b") == set()


def test_every_import_is_a_declared_dependency():
    extras = [line for extra in ("app", "eval", "heif", "parity", "plots", "tfds") for line in EXTRAS[extra]]
    lines = PROJECT["project"]["dependencies"] + extras
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    distributions = packages_distributions()
    for path in SOURCES:
        packages = {name.partition(".")[0] for name in imports(path)}
        for package in packages - sys.stdlib_module_names - {"zipir_jax"}:
            names = {canonicalize_name(name) for name in distributions.get(package, [package])}
            assert names & declared, f"{path.relative_to(ROOT)} imports {package}, which pyproject.toml lacks"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_pins_satisfy_the_bounds(python):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {}
    for pin in (Requirement(line) for line in lines if line and not line.startswith("#")):
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            name, (specifier,) = canonicalize_name(pin.name), pin.specifier
            assert specifier.operator == "==", f"{pin} is no exact version"
            assert name not in pins, f"{name} is pinned twice"
            pins[name] = specifier.version
    for bound in map(Requirement, PROJECT["project"]["dependencies"] + EXTRAS["dev"]):
        assert bound.specifier.contains(pins[canonicalize_name(bound.name)])


def test_import_contract_knows_every_entry_point():
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (protected,) = (
        contract["protected_modules"] for contract in contracts if contract["type"] == "protected"
    )
    with_main = (path for path in SOURCES if '__name__ == "__main__"' in path.read_text())
    assert set(protected) == {f"zipir_jax.{path.stem}" for path in with_main}


def test_shapes_are_checked_while_the_tests_run():
    with pytest.raises(TypeCheckError):
        pad_by_reflection(np.zeros((2, 32, 32), np.float32), 32, 32)
