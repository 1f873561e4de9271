"""A starting file for a component of a user's own."""

from __future__ import annotations

import ast
import keyword
from pathlib import Path

from lattice import registry
from lattice.atomic import make_folder

TEMPLATES = Path(__file__).parent / "templates"


def write(role: str, name: str, folder: Path) -> tuple[Path, Path]:
    """Writes NAME.py and NAME.toml to `folder`; returns their paths. Raises ValueError for a role without a
    template, a name that cannot be one, and a kind that exists; FileExistsError rather than overwrite."""
    roles = sorted(path.stem for path in TEMPLATES.glob("*.py.txt"))
    roles = [role.removesuffix(".py") for role in roles]
    if role not in roles:
        raise ValueError(f"role '{role}' has no starting file; must be one of {', '.join(roles)}")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"name '{name}': must be a Python identifier, such as my_variant")
    if name in registry.kinds(role):
        raise ValueError(f"kind '{name}' of role '{role}' exists already; choose another name")
    modules, imported = _imports((TEMPLATES / f"{role}.py.txt").read_text(encoding="utf-8"))
    if name in modules:
        raise ValueError(f"name '{name}': {name}.py would hide the module '{name}'; choose another name")
    make_folder(folder)
    paths = folder / f"{name}.py", folder / f"{name}.toml"
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} exists already; choose another name or remove it")
    title = "".join(part.capitalize() for part in name.split("_"))
    if title in imported or not title.isidentifier() or keyword.iskeyword(title):
        title = f"My{title}"
    for path in paths:
        text = (TEMPLATES / f"{role}{path.suffix}.txt").read_text(encoding="utf-8")
        path.write_text(text.replace("NAME", name).replace("TITLE", title), encoding="utf-8")
    return paths


def _imports(code: str) -> tuple[set[str], set[str]]:
    """The modules that a starting file imports from, and the names that it imports."""
    modules, names = set(), set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = {alias.name for alias in node.names}
            names |= imported
            modules |= {node.module or ""} if isinstance(node, ast.ImportFrom) else imported
    return {module.partition(".")[0] for module in modules}, names
